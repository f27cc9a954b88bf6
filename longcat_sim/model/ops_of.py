"""The ops that each segment of *this* implementation performs, so that a step's prediction is a sum of op times.

``ops.graph`` describes the deployed model (its kernels, precisions and modes); this file describes the code beside it:
what ``layer.py``, ``attention.py``, ``moe.py`` and ``expert_parallel.py`` really run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from longcat_sim.errors import ModelError
from longcat_sim.ops.op import Op, item_bytes, op
from longcat_sim.ops.schedules import LONGCAT_LAYER
from longcat_sim.specs.model import ModelSpec

DTYPES = {"float32": "fp32", "float64": "fp32", "bfloat16": "bf16", "float16": "fp16"}


@dataclass(frozen=True)
class Pass:
    """One pass of the executable model on one device or rank."""

    batch: int
    queries: int
    """New tokens of each sequence."""
    context_tokens: int = 0
    """Tokens in the cache before the pass."""
    attention: Literal["naive", "absorbed"] = "naive"
    """As it runs: prefill and passes without a cache are naive, decode is absorbed."""
    cached: bool = False
    """Whether a cache is written and read."""
    dtype: str = "fp32"
    ep_size: int = 1
    sent_rows: float | None = None
    """Token copies that this rank sends to experts, itself included; default: the expected number."""
    received_rows: float | None = None
    """Token copies that this rank's experts get; default: as many as sent."""
    active_experts: float | None = None
    """This rank's experts with at least one row; default: the expected number under even routing."""

    @property
    def tokens(self) -> int:
        """New tokens."""
        return self.batch * self.queries


def layer_ops(spec: ModelSpec, step: Pass) -> dict[str, list[Op]]:
    """Return the ops of every segment of one layer, in order of execution."""
    return {segment: segment_ops(spec, segment, step) for segment in LONGCAT_LAYER}


def segment_ops(spec: ModelSpec, segment: str, step: Pass) -> list[Op]:
    """Return the ops of one segment: of a layer, or ``embedding`` or ``head`` (final norm and output projection).

    Raises:
        ModelError: no such segment.
    """
    t, h, d = step.tokens, spec.hidden_size, step.dtype
    if segment == "embedding":
        return [op("embedding", dtype=d, tokens=t, width=h)]
    if segment == "head":
        return [_norm(t, h, d), _gemm(t, spec.vocab_size, h, d)]
    if segment == "mla0":
        return [_norm(t, h, d), *_projections(spec, step), *_core(spec, step), _norm(t, h, d)]
    if segment == "mla1_proj":
        return [_norm(t, h, d), *_projections(spec, step)]
    if segment == "mla1_core":
        return _core(spec, step)
    if segment == "ffn0":
        return _ffn(spec, t, d)
    if segment == "ffn1":
        return [_norm(t, h, d), *_ffn(spec, t, d)]
    if segment == "router":
        experts = spec.n_routed_experts + spec.zero_expert_num
        return [op("router", dtype="fp32", tokens=t, hidden=h, experts=experts, top_k=spec.moe_topk)]
    if segment in ("dispatch", "experts", "combine", "add"):
        return _moe(spec, segment, step)
    known = ", ".join([*LONGCAT_LAYER, "embedding", "head"])
    raise ModelError(f"segment: expected one of {known}; got {segment!r}")


def expected_rows(spec: ModelSpec, tokens: float) -> float:
    """Return the token copies that go to FFN experts, by the spec's expected number per token."""
    return tokens * spec.expected_ffn_experts


def expected_active(experts: float, rows: float) -> float:
    """Return the expected number of experts with at least one of ``rows`` rows, every expert equally likely."""
    return experts * (1.0 - (1.0 - 1.0 / experts) ** rows)


def _gemm(m: float, n: float, k: float, d: str) -> Op:
    return op("gemm", dtype=d, m=m, n=n, k=k)


def _norm(rows: float, width: float, d: str) -> Op:
    return op("norm", dtype=d, rows=rows, width=width)


def _elementwise(rows: float, width: float, inputs: int, d: str) -> Op:
    return op("elementwise", dtype=d, rows=rows, width=width, inputs=inputs)


def _projections(spec: ModelSpec, step: Pass) -> list[Op]:
    t, d, heads = step.tokens, step.dtype, spec.num_attention_heads
    latent = spec.kv_lora_rank + spec.qk_rope_head_dim
    return [
        _gemm(t, spec.q_lora_rank + latent, spec.hidden_size, d),
        _norm(t, spec.q_lora_rank, d),
        _gemm(t, heads * spec.qk_head_dim, spec.q_lora_rank, d),
        _elementwise(t, heads * spec.qk_rope_head_dim, 2, d),  # rotary
        _norm(t, spec.kv_lora_rank, d),
        op("permute", dtype=d, rows=t, width=latent),  # latent and rotated rope key side by side
    ]


def _core(spec: ModelSpec, step: Pass) -> list[Op]:
    t, d, heads = step.tokens, step.dtype, spec.num_attention_heads
    latent = spec.kv_lora_rank + spec.qk_rope_head_dim
    context = step.context_tokens + step.queries
    ops = [op("permute", dtype=d, rows=t, width=latent)] if step.cached else []
    if step.attention == "absorbed":
        ops += [
            op("bmm", dtype=d, groups=heads, m=t, n=spec.kv_lora_rank, k=spec.qk_nope_head_dim),
            op(
                "mla_decode", dtype=d, batch=step.batch, queries=step.queries, context=context, heads=heads,
                latent=spec.kv_lora_rank, rope=spec.qk_rope_head_dim,
            ),
            op("bmm", dtype=d, groups=heads, m=t, n=spec.v_head_dim, k=spec.kv_lora_rank),
        ]  # fmt: skip
    else:
        keys = step.batch * context
        ops += [
            _gemm(keys, heads * (spec.qk_nope_head_dim + spec.v_head_dim), spec.kv_lora_rank, d),
            op("permute", dtype=d, rows=keys, width=heads * spec.qk_head_dim),  # k_nope and the shared rope key
            op("permute", dtype=d, rows=keys, width=heads * spec.v_head_dim),
            op("permute", dtype=d, rows=t, width=heads * spec.qk_head_dim),
            op(
                "attention_prefill", dtype=d, batch=step.batch, queries=step.queries, context=context, heads=heads,
                kv_heads=heads, qk_dim=spec.qk_head_dim, v_dim=spec.v_head_dim,
            ),
            op("permute", dtype=d, rows=t, width=heads * spec.v_head_dim),
        ]  # fmt: skip
    return [*ops, _gemm(t, spec.hidden_size, heads * spec.v_head_dim, d), _elementwise(t, spec.hidden_size, 2, d)]


def _ffn(spec: ModelSpec, t: float, d: str) -> list[Op]:
    h, f = spec.hidden_size, spec.ffn_hidden_size
    return [_gemm(t, 2 * f, h, d), _elementwise(t, f, 2, d), _gemm(t, h, f, d), _elementwise(t, h, 2, d)]


def _moe(spec: ModelSpec, segment: str, step: Pass) -> list[Op]:
    t, h, f, d = step.tokens, spec.hidden_size, spec.expert_ffn_hidden_size, step.dtype
    sent = expected_rows(spec, t) if step.sent_rows is None else step.sent_rows
    received = sent if step.received_rows is None else step.received_rows
    held = spec.n_routed_experts / step.ep_size
    active = expected_active(held, received) if step.active_experts is None else step.active_experts
    choices = op("permute", dtype="fp32", rows=t * spec.moe_topk, width=2)  # the sorted choices: token and gate
    row_bytes = item_bytes(d) * h
    away: dict[str, Any] = {"ranks": step.ep_size}
    if segment == "dispatch":
        if step.ep_size == 1:
            return [choices]
        counts = op("all_to_all", dtype="fp32", message_bytes=8.0 * spec.n_routed_experts, **away)
        gather = op("permute", dtype=d, rows=sent, width=h)
        return [choices, counts, gather, op("dispatch", dtype=d, message_bytes=sent * row_bytes, **away)]
    if segment == "combine":
        if step.ep_size == 1:
            return []
        return [op("combine", dtype=d, message_bytes=sent * row_bytes, **away)]
    zero = _elementwise(t, h, 1, d)
    if segment == "add":
        join = _elementwise(t, h, 2, d)
        if step.ep_size == 1:
            return [join]
        return [zero, _elementwise(sent, h, 1, d), op("permute", dtype=d, rows=sent, width=h), join]
    return [
        *([zero] if step.ep_size == 1 else []),
        op("permute", dtype=d, rows=received, width=h),
        op("grouped_gemm", dtype=d, groups=active, m=received, n=2 * f, k=h),
        _elementwise(received, f, 2, d),
        _elementwise(received, f, 1, d),  # the gates
        op("grouped_gemm", dtype=d, groups=active, m=received, n=h, k=f),
        op("permute", dtype=d, rows=received, width=h),
    ]
