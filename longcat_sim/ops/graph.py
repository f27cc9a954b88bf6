"""The op graph of one step: a ``ModelSpec`` under a ``Deployment`` becomes blocks of layers, segments, and ops.

Sizes are those of one rank. What random routing decides (copies sent and received, experts hit) comes in as a
``LayerLoad`` and may be an array [layers, draws, ranks]; everything else is a number or an array [draws, 1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longcat_sim.ops.attention import Ops, StepSize, attention, elementwise, gemm, norm
from longcat_sim.ops.op import item_bytes
from longcat_sim.ops.schedules import LAYER_INPUTS, Schedule, schedule
from longcat_sim.ops.shape import OpShape, message_bytes
from longcat_sim.specs.deployment import Deployment
from longcat_sim.specs.model import ModelSpec

Segments = dict[str, Ops]


@dataclass(frozen=True)
class LayerLoad:
    """What routing gives one rank in one MoE layer: numbers or arrays [layers, draws, ranks]."""

    sent: Any
    """Token copies that the rank sends to FFN experts (its tokens x their FFN experts)."""
    received: Any
    """Token copies that the rank's experts get."""
    active: Any
    """Experts of the rank that get at least one."""
    fan_out: Any = None
    """(token, node) pairs that the rank sends in the normal mode: copies to one node travel once."""

    @property
    def busiest(self) -> Any:
        """Copies on the rank's busier direction."""
        return (self.sent + self.received + abs(self.sent - self.received)) / 2

    def part(self, parts: int) -> LayerLoad:
        """Return one of ``parts`` equal cuts."""
        if parts == 1:
            return self
        fan_out = None if self.fan_out is None else self.fan_out / parts
        return LayerLoad(self.sent / parts, self.received / parts, self.active, fan_out)


@dataclass(frozen=True)
class Block:
    """A run of equal layers under one schedule, or (``schedule`` None) a run of ops on the compute lane."""

    name: str
    count: int
    schedule: Schedule | None
    parts: tuple[Segments, ...]
    """Ops by segment, for each part of a layer; a plain run has the one segment ``ops``."""
    first_layer: int = 0


def exchange_mode(phase: str) -> str:
    """Return the kernels of dispatch and combine: ``low_latency`` in decode, ``normal`` in prefill.

    Source: DeepEP README; [FL] server arguments of meituan-longcat/SGLang-FluentLLM.
    """
    return "low_latency" if phase == "decode" else "normal"


def dense_ffn(model: ModelSpec, deployment: Deployment, rows: Any, name: str = "ffn") -> Ops:
    """Return one dense FFN on one rank of its tensor-parallel group, with its norm's output as input."""
    tp, h, width = deployment.dense_tp, model.hidden_size, model.ffn_hidden_size
    weights = deployment.precision.weights
    return _sharded(deployment, rows, h, tp, name, _mlp(rows * tp, h, width / tp, weights, name))


def _mlp(rows: Any, h: int, width: float, weights: str, name: str) -> Ops:
    return (
        *gemm(f"{name} gate_up", rows, 2 * width, h, weights),
        elementwise(f"{name} silu", rows, width, 2),
        *gemm(f"{name} down", rows, h, width, weights),
    )


def _sharded(deployment: Deployment, rows: Any, h: int, tp: int, name: str, body: Ops) -> Ops:
    """Return ``body`` between the collectives of its tensor parallelism."""
    if tp == 1:
        return body
    whole = {"message_bytes": 2.0 * rows * tp * h, "ranks": tp}
    if tp == deployment.tp_size and deployment.ep_size == 1:  # every rank holds every row
        return (*body, OpShape(f"{name} all-reduce", "all_reduce", whole, group=tp))
    return (
        OpShape(f"{name} all-gather", "all_gather", whole, group=tp),
        *body,
        OpShape(f"{name} reduce-scatter", "reduce_scatter", whole, group=tp),
    )


def moe(model: ModelSpec, deployment: Deployment, size: StepSize, load: LayerLoad) -> Segments:
    """Return router, dispatch, experts and combine of one rank."""
    precision, ep, tp = deployment.precision, deployment.ep_size, deployment.tp_size
    h, f, rows = model.hidden_size, model.expert_ffn_hidden_size, size.rows
    mode = exchange_mode(size.phase)
    router = OpShape(
        "router", "router",
        {
            "tokens": rows if ep > 1 else rows * tp, "hidden": h,
            "experts": model.n_routed_experts + model.zero_expert_num, "top_k": model.moe_topk,
        }, "fp32",
    )  # fmt: skip
    to_fp32 = elementwise("router cast", rows if ep > 1 else rows * tp, h)  # the router runs in fp32
    grouped = "masked" if mode == "low_latency" else "contiguous"
    width = f if ep > 1 else f / tp  # without expert parallelism the experts are cut like the rest
    received = load.received
    eight_bit = item_bytes(precision.weights) <= 1
    experts: list[OpShape] = []
    if mode == "normal" or ep == 1:
        experts.append(OpShape("permute", "permute", {"rows": received, "width": h}, precision.dispatch))
    if ep == 1 and eight_bit:
        experts.append(elementwise("experts cast", received, h))
    experts += [
        OpShape(
            "experts gate_up", "grouped_gemm", {"groups": load.active, "m": received, "n": 2 * width, "k": h},
            precision.weights, grouped,
        ),
        elementwise("experts silu", received, width, 2),
    ]  # fmt: skip
    if eight_bit and mode == "normal":
        experts.append(elementwise("experts hidden cast", received, width))
    experts.append(
        OpShape(
            "experts down", "grouped_gemm", {"groups": load.active, "m": received, "n": h, "k": width},
            precision.weights, grouped,
        )
    )  # fmt: skip
    if mode == "normal" or ep == 1:
        experts.append(OpShape("unpermute", "permute", {"rows": received, "width": h}, precision.combine))
    if ep == 1:
        whole = {"message_bytes": 2.0 * rows * tp * h, "ranks": tp}
        combine: Ops = () if tp == 1 else (OpShape("experts all-reduce", "all_reduce", whole, group=tp),)
        return {"router": (to_fp32, router), "dispatch": (), "experts": tuple(experts), "combine": combine}
    copies = load.busiest if mode == "low_latency" or load.fan_out is None else load.fan_out
    sent = message_bytes(copies, h, precision.dispatch)
    returned = message_bytes(copies, h, precision.combine)
    before: Ops = ()
    if mode == "normal" and item_bytes(precision.dispatch) <= 1:  # the low-latency kernel casts by itself
        before = (elementwise("dispatch cast", rows, h),)
    return {
        "router": (to_fp32, router, *before),
        "dispatch": (
            OpShape("dispatch", "dispatch", {"message_bytes": sent, "ranks": ep}, precision.dispatch, mode, ep),
        ),
        "experts": tuple(experts),
        "combine": (
            OpShape("combine", "combine", {"message_bytes": returned, "ranks": ep}, precision.combine, mode, ep),
        ),
    }


def layer_segments(
    model: ModelSpec, deployment: Deployment, size: StepSize, kind: str, load: LayerLoad | None
) -> Segments:
    """Return the ops of every segment of one layer of ``kind`` on one rank."""
    h, rows = model.hidden_size, size.rows
    gathered = size.mean_rows(deployment.dense_tp, deployment.tp_size)
    proj, core = attention(model, deployment, size)
    held = rows if deployment.ep_size > 1 else rows * deployment.tp_size  # rows in the residual stream of a rank
    after = norm("post norm", held, h)
    if kind == "dense":
        segments = {"attn_proj": proj, "attn_core": (*core, after), "ffn": dense_ffn(model, deployment, gathered)}
    elif kind == "moe":
        assert load is not None
        shared: Ops = ()
        if model.n_shared_experts:
            shared_width = model.expert_ffn_hidden_size * model.n_shared_experts
            if deployment.ep_size == 1:
                shared_width //= deployment.tp_size
            shared = _mlp(held, h, shared_width, deployment.precision.weights, "shared")
        segments = {
            "attn_proj": proj,
            "attn_core": (*core, after),
            "shared": shared,
            "add": (elementwise("add", held, h, 2 + bool(shared)),),
            **moe(model, deployment, size, load),
        }
    else:
        assert load is not None
        add: Ops = (elementwise("add", held, h, 2 + bool(model.zero_expert_num)),)
        if model.zero_expert_num:  # a kernel of its own in sglang longcat_flash.py (zero_experts_compute)
            add = (elementwise("zero experts", held, h), *add)
        segments = {
            "mla0": (*proj, *core, after),
            "ffn0": dense_ffn(model, deployment, gathered, "ffn0"),
            "mla1_proj": proj,
            "mla1_core": (*core, after),
            "ffn1": dense_ffn(model, deployment, gathered, "ffn1"),
            "add": add,
            **moe(model, deployment, size, load),
        }
    assert set(segments) == set(LAYER_INPUTS[kind])
    return segments


def _layers(
    model: ModelSpec, deployment: Deployment, size: StepSize, kind: str, load: LayerLoad | None, name: str,
    count: int, first: int,
) -> Block:  # fmt: skip
    overlap = deployment.overlap if deployment.ep_size > 1 else "none"
    if (overlap, kind, size.phase) == ("tbo", "moe", "prefill"):
        overlap = "tbo_prefill"
    plan = schedule(overlap, kind)
    cut = layer_segments(model, deployment, size.part(plan.parts), kind, load.part(plan.parts) if load else None)
    if plan.whole:
        uncut = layer_segments(model, deployment, size, kind, load)
        cut = {name: uncut[name] if name in plan.whole else ops for name, ops in cut.items()}
    return Block(name, count, plan, (cut,) * plan.parts, first)


def _run(name: str, ops: Ops) -> Block:
    return Block(name, 1, None, ({"ops": ops},))


def step_graph(
    model: ModelSpec, deployment: Deployment, size: StepSize, load: LayerLoad | None, draft_tokens: int = 0
) -> list[Block]:
    """Return the blocks of one step on one rank, in order.

    ``load`` counts MoE layers only, a draft layer's last. With drafts a decode step verifies ``draft_tokens`` + 1
    positions per sequence and then runs the MTP layer once over them and once more per further draft token.

    Source: arXiv 2509.01322v2, section 6.2.1 (target, verify and draft in one graph).
    """
    h, decode = model.hidden_size, size.phase == "decode"
    tp = deployment.tp_size
    blocks = [_run("embedding", (OpShape("host", "host", {"calls": 1.0}), _embedding(model, size.rows * tp)))]
    kinds, moe_layers, start = model.layer_kinds, 0, 0
    while start < len(kinds):
        end = start
        while end < len(kinds) and kinds[end] == kinds[start]:
            end += 1
        kind = kinds[start]
        blocks.append(
            _layers(model, deployment, size, kind, _slice(load, moe_layers, end - start), kind, end - start, start)
        )
        moe_layers += (end - start) if kind != "dense" else 0
        start = end
    head_rows = size.head_rows * tp
    blocks.append(_run("head", _head(model, deployment, head_rows)))
    if decode and draft_tokens and model.num_nextn_predict_layers:
        kind = "dense" if model.layer_kind == "longcat" else "moe"
        for draft in range(draft_tokens):
            rows = size if draft == 0 else StepSize("decode", size.sequences, 1.0, size.context)
            joined = (
                _embedding(model, rows.rows * tp),
                norm("draft embedding norm", rows.rows * tp, h),
                norm("draft hidden norm", rows.rows * tp, h),
                elementwise("draft concat", rows.rows * tp, 2 * h),
                *gemm("eh_proj", rows.rows * tp, h, 2 * h, deployment.precision.weights),
            )
            blocks.append(_run("draft input", joined))
            share = _slice(load, moe_layers, 1) if kind == "moe" else None
            blocks.append(_layers(model, deployment, rows, kind, share, "draft", 1, len(kinds)))
            blocks.append(_run("draft head", _head(model, deployment, size.sequences * tp)))
    return blocks


def _embedding(model: ModelSpec, rows: Any) -> OpShape:
    return OpShape("embedding", "embedding", {"tokens": rows, "width": model.hidden_size})


def _head(model: ModelSpec, deployment: Deployment, rows: Any) -> Ops:
    vocab = model.vocab_size / deployment.tp_size
    return (
        norm("final norm", rows, model.hidden_size),
        OpShape("lm_head", "gemm", {"m": rows, "n": vocab, "k": model.hidden_size}),
        OpShape("sampling", "sampling", {"rows": rows, "vocab": vocab}, "fp32"),
    )


def _slice(load: LayerLoad | None, first: int, count: int) -> LayerLoad | None:
    """Return the loads of ``count`` MoE layers; loads without a layer axis serve every layer."""
    if load is None:
        return None

    def cut(value: Any) -> Any:
        return value[first : first + count] if getattr(value, "ndim", 0) == 3 and len(value) > 1 else value

    return LayerLoad(cut(load.sent), cut(load.received), cut(load.active), cut(load.fan_out))
