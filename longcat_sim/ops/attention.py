"""Ops of one attention block: MLA (absorbed decode, naive prefill, with or without an indexer) and GQA.

A block has two segments: ``proj`` (norm and everything before the core) and ``core`` (the core, output projection,
and what tensor parallelism adds). Sizes are per rank: N = rows (tokens), S = sequences.

Source: kernel sequence of the public engines, sgl-project/sglang ``deepseek_v2.py`` (forward_absorb) and
meituan-longcat/SGLang-FluentLLM ``longcat_flash.py``; shapes follow from the published configs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from longcat_sim.ops.shape import OpShape
from longcat_sim.specs.deployment import Deployment
from longcat_sim.specs.model import ModelSpec

Ops = tuple[OpShape, ...]
PASSES = ("silu", "rope", "concat", "write", "add", "cast", "zero")
"""Variants of elementwise: as a framework runs them they differ by more than their bytes."""


WIDE_ROWS = 32
"""Query rows of one KV head that fill two tensor-core tiles; with more, engines take a kernel that was not written for
decoding (TensorRT-LLM, H200, one sequence of 32,768: 32 us with 32 rows, 233 us with 64; tables of
aiconfigurator-core 0.12.0)."""


def gqa_variant(rows: float) -> str:
    """Return the kernel that decodes with ``rows`` query heads per KV head: ``mha`` (one), ``wide`` (many), or "".

    One row has a kernel of its own, without tensor cores (fp8 KV cache, H200: 256 pairs of sequence and KV head of
    16,384 positions take 376 us with one row, 254 us with two).
    """
    return "mha" if rows <= 1 else "wide" if rows > WIDE_ROWS else ""


NARROW_HEADS = 32
"""Query heads up to which absorbed MLA is computed in narrow tiles, and the latents read once for each of them
(TensorRT-LLM, B200, bf16, 128 sequences of 16,384: 451 us with 16 heads, 642 us with 32, 448 us with 64; tables of
aiconfigurator-core 0.12.0). Elsewhere one law serves both."""
WIDE_HEADS = 64
"""Query heads beyond which a card may have one more (RTX PRO 6000, fp8: 128 heads take 0.4 times as long as 64)."""


def mla_variant(heads: float) -> str:
    """Return the kernel that decodes absorbed MLA with ``heads`` query heads: ``narrow`` (few), ``wide`` (many), or
    ""."""
    return "narrow" if heads <= NARROW_HEADS else "wide" if heads > WIDE_HEADS else ""


@dataclass(frozen=True)
class StepSize:
    """What one GPU's share of a step is: numbers, or arrays [draws, 1]."""

    phase: str
    """``decode`` or ``prefill``."""
    sequences: Any
    """Per GPU."""
    queries: Any
    """Tokens computed per sequence."""
    context: Any
    """Positions that the last of them attends to."""
    beside: StepSize | None = None
    """Sequences that decode in the same pass as a prefill (a mixed step): products see the rows of both."""
    fill: Any = 1.0
    """All ranks' sequences over those of as many ranks that are as full as this one: 1 where all hold the same."""

    @property
    def rows(self) -> Any:
        """Tokens computed per GPU."""
        own = self.sequences * self.queries
        return own if self.beside is None else own + self.beside.rows

    def mean_rows(self, ranks: int, tp_size: int) -> Any:
        """Return the tokens per GPU of a group of ``ranks`` that holds this one: at least this one's are there."""
        share = np.minimum(np.maximum(self.fill, tp_size / ranks), 1.0)
        own = self.sequences * self.queries * share
        return own if self.beside is None else own + self.beside.rows

    @property
    def head_rows(self) -> Any:
        """Rows whose next token is wanted: every one of a decode, the last one of each prompt."""
        if self.phase == "decode":
            return self.rows
        return self.sequences if self.beside is None else self.sequences + self.beside.rows

    def part(self, parts: int) -> StepSize:
        """Return one of ``parts`` equal cuts: by sequence."""
        if parts == 1:
            return self
        beside = self.beside.part(parts) if self.beside else None
        return replace(self, sequences=self.sequences / parts, beside=beside)


def gemm(name: str, m: Any, n: int | float, k: int | float, dtype: str) -> Ops:
    """Return a product with its weights, behind the quantisation of its input where the weights are 8 bits."""
    product = OpShape(name, "gemm", {"m": m, "n": n, "k": k}, dtype)
    if dtype in ("fp8", "int8", "fp4", "nvfp4"):
        return (OpShape(f"{name} cast", "elementwise", {"rows": m, "width": k, "inputs": 1}), product)
    return (product,)


def norm(name: str, rows: Any, width: int) -> OpShape:
    """Return an RMSNorm; those that open a block carry the residual add before them."""
    variant = "residual" if name in ("attn norm", "post norm") else ""
    return OpShape(name, "norm", {"rows": rows, "width": width}, variant=variant)


def elementwise(name: str, rows: Any, width: int | float, inputs: int = 1) -> OpShape:
    """Return a pass over rows; its variant is what it does, where the name tells."""
    variant = next((word for word in PASSES if word in name.split()), "")
    return OpShape(name, "elementwise", {"rows": rows, "width": width, "inputs": inputs}, variant=variant)


def attention(model: ModelSpec, deployment: Deployment, size: StepSize) -> tuple[Ops, Ops]:
    """Return (proj, core) of one attention block on one rank of its tensor-parallel group."""
    if model.is_mla:
        proj, core = _mla(model, deployment, size)
    else:
        proj, core = _gqa(model, deployment, size)
    if size.beside is not None:
        core = (*_decode_core(model, deployment, size.beside), *core)
    tp, h = deployment.tp_size, model.hidden_size
    if tp > 1:
        whole = {"message_bytes": 2.0 * size.rows * tp * h, "ranks": tp}
        if deployment.ep_size > 1:  # rows are scattered between attention and experts
            proj = (OpShape("attn all-gather", "all_gather", whole, group=tp), *proj)
            core = (*core, OpShape("attn reduce-scatter", "reduce_scatter", whole, group=tp))
        else:
            core = (*core, OpShape("attn all-reduce", "all_reduce", whole, group=tp))
    return proj, core


_CORE = frozenset({"absorb k", "index scores", "index top-k", "attention core", "absorb v"})


def _decode_core(model: ModelSpec, deployment: Deployment, size: StepSize) -> Ops:
    """Return what the decoding sequences of a mixed step run on their own: all else they share with the prefill."""
    parts = (_mla if model.is_mla else _gqa)(model, deployment, size)
    return tuple(replace(shape, name=f"decode {shape.name}") for part in parts for shape in part if shape.name in _CORE)


def _mla(model: ModelSpec, deployment: Deployment, size: StepSize) -> tuple[Ops, Ops]:
    tp = deployment.tp_size
    rows, sequences, heads = size.rows * tp, size.sequences * tp, model.num_attention_heads // tp
    h, latent, rope, nope = model.hidden_size, model.kv_lora_rank, model.qk_rope_head_dim, model.qk_nope_head_dim
    weights, precision = deployment.precision.weights, deployment.precision
    core_dtype = precision.kv_cache if size.phase == "decode" else precision.attention
    proj: list[OpShape] = [norm("attn norm", rows, h)]
    q_width = model.q_lora_rank or heads * model.qk_head_dim
    proj += gemm("qkv_a", rows, q_width + latent + rope, h, weights)
    if model.q_lora_rank:
        proj.append(norm("q_a norm", rows, model.q_lora_rank))
    proj.append(norm("kv_a norm", rows, latent))
    if model.q_lora_rank:
        proj += gemm("q_b", rows, heads * model.qk_head_dim, model.q_lora_rank, weights)
    if size.phase == "decode":
        proj.append(OpShape("absorb k", "bmm", {"groups": heads, "m": rows, "n": latent, "k": nope}))
        proj.append(elementwise("rope", rows, heads * rope + rope))
        proj.append(elementwise("kv write", rows, latent + rope))
    else:
        proj.append(elementwise("rope", rows, heads * rope + rope))
        proj.append(elementwise("kv write", rows, latent + rope))
        expanded = sequences * size.context  # the cached part of each prompt is expanded again
        proj += gemm("kv_b", expanded, heads * (nope + model.v_head_dim), latent, weights)
        proj.append(elementwise("concat k", expanded, heads * model.qk_head_dim))
    core: list[OpShape] = []
    if model.index_topk:
        proj += _indexer_projections(model, rows, weights)
        core += _indexer(model, deployment, sequences, size)
    selected = np.minimum(size.context, model.index_topk) if model.index_topk else size.context
    dims: dict[str, Any]
    if model.index_topk:
        dims = {"batch": sequences, "queries": size.queries, "selected": selected, "heads": heads}
        core.append(
            OpShape("attention core", "sparse_mla", {**dims, "latent": latent, "rope": rope}, core_dtype)
        )  # fmt: skip
        absorbed = True
    elif size.phase == "decode":
        dims = {"batch": sequences, "queries": size.queries, "context": size.context, "heads": heads}
        dims |= {"latent": latent, "rope": rope}
        core.append(OpShape("attention core", "mla_decode", dims, core_dtype, mla_variant(heads)))
        absorbed = True
    else:
        dims = {
            "batch": sequences, "queries": size.queries, "context": size.context, "heads": heads, "kv_heads": heads,
            "qk_dim": model.qk_head_dim, "v_dim": model.v_head_dim,
        }  # fmt: skip
        core.append(OpShape("attention core", "attention_prefill", dims, core_dtype))
        absorbed = False
    if absorbed:
        # the core reads one query tensor: sglang forward_absorb_core joins the absorbed and the rotary part
        core.insert(-1, elementwise("concat q", rows, heads * (latent + rope)))
        core.append(OpShape("absorb v", "bmm", {"groups": heads, "m": rows, "n": model.v_head_dim, "k": latent}))
    core += gemm("o_proj", rows, h, heads * model.v_head_dim, weights)
    return tuple(proj), tuple(core)


def _indexer_projections(model: ModelSpec, rows: Any, weights: str) -> Ops:
    """Return the projections of the lightning indexer.

    Source: transformers 5 ``modeling_deepseek_v32.py``; sglang ``nsa_indexer.py``.
    """
    heads, dim = model.index_n_heads, model.index_head_dim
    return (
        *gemm("index q", rows, heads * dim, model.q_lora_rank, weights),
        *gemm("index k", rows, dim, model.hidden_size, weights),
        OpShape("index weights", "gemm", {"m": rows, "n": heads, "k": model.hidden_size}),
        elementwise("index rope", rows, heads * dim),
        elementwise("index cast", rows, heads * dim),
    )


def _indexer(model: ModelSpec, deployment: Deployment, sequences: Any, size: StepSize) -> Ops:
    # causal prefill scores half of the square, and the scores of a query end at its own position
    mean_context = size.context - (size.queries - 1) / 2 if size.phase == "prefill" else size.context
    dims = {"batch": sequences, "queries": size.queries, "context": mean_context}
    rows = sequences * size.queries
    return (
        OpShape("index scores", "indexer", {**dims, "heads": model.index_n_heads, "dim": model.index_head_dim}, "fp8"),
        OpShape("index top-k", "topk", {"rows": rows, "n": mean_context, "k": model.index_topk}, "fp32"),
    )


def _gqa(model: ModelSpec, deployment: Deployment, size: StepSize) -> tuple[Ops, Ops]:
    tp, h, dim = deployment.tp_size, model.hidden_size, model.head_dim
    rows, sequences = size.rows * tp, size.sequences * tp
    heads, kv_heads = model.num_attention_heads // tp, max(1, model.num_key_value_heads // tp)
    weights, precision = deployment.precision.weights, deployment.precision
    core_dtype = precision.kv_cache if size.phase == "decode" else precision.attention
    proj: list[OpShape] = [norm("attn norm", rows, h)]
    proj += gemm("qkv", rows, (heads + 2 * kv_heads) * dim, h, weights)
    if model.model_type.startswith("qwen3"):
        proj.append(norm("qk norm", rows, (heads + kv_heads) * dim))
    proj.append(elementwise("rope", rows, (heads + kv_heads) * dim))
    proj.append(elementwise("kv write", rows, 2 * kv_heads * dim))
    dims: dict[str, Any] = {
        "batch": sequences, "queries": size.queries, "context": size.context, "heads": heads, "kv_heads": kv_heads,
    }  # fmt: skip
    if size.phase == "decode":
        variant = gqa_variant(heads / kv_heads)  # of one query: tables hold no drafts
        core = OpShape("attention core", "gqa_decode", {**dims, "head_dim": dim}, core_dtype, variant)
    else:
        core = OpShape("attention core", "attention_prefill", {**dims, "qk_dim": dim, "v_dim": dim}, core_dtype)
    return tuple(proj), (core, *gemm("o_proj", rows, h, heads * dim, weights))
