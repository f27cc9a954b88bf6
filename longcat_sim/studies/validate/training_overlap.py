"""Training overlap: the share of time in which dispatch and combine are not hidden, without and with ScMoE.

Forward and backward of one LongCat-Flash layer on the lanes. The backward graph is the forward one with time reversed
(the gradient of combine is a gather, that of dispatch a scatter), so its length is that of the forward schedule with
twice the compute. Batch, node size and FLOP rate are assumed: the report names none of them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from longcat_sim.ops.attention import StepSize
from longcat_sim.ops.graph import Block, LayerLoad, layer_segments
from longcat_sim.ops.op import FloatArray, Op, OpArrays, ResourceShares, Tag
from longcat_sim.ops.schedules import Schedule, schedule
from longcat_sim.simulation.contention import NoContention
from longcat_sim.simulation.lanes import LaneEngine
from longcat_sim.simulation.program import build_program
from longcat_sim.specs.deployment import Deployment, Precision
from longcat_sim.specs.model import ModelSpec, model_spec
from longcat_sim.studies.validate.section import Row, Section
from longcat_sim.studies.validate.targets import targets

SEQUENCE_TOKENS = 8192
"""Pre-training sequence length. Source: arXiv 2509.01322v2, section 3.2."""
CONTEXT_PARALLEL = 8
"""Source: arXiv 2509.01322v2, section 5. One sequence per group is assumed: 1,024 tokens per device."""
DEVICES_PER_NODE = 8
"""Assumed."""
PEAK_FLOP_PER_S, MFU = 989e12, 0.40
"""Assumed: an H800-class device at the utilisation customary in training (DeepSeek-V3 on H800: 0.39, ISCA 2025)."""
LINK_BYTES_PER_S = 25e9
"""200 Gb/s per device. Source: arXiv 2509.01322v2, section 5."""


@dataclass(frozen=True)
class TrainingTimes:
    """Compute at one FLOP rate, exchanges as pipelined all-gather and reduce-scatter over the NICs.

    Each node takes every token of the other nodes in once, shared out over its devices' NICs, and spreads them over
    the faster inner link meanwhile: a NIC carries ``nodes - 1`` shards of its own size.
    """

    model: ModelSpec
    tokens: float
    nodes: float
    message_bytes: float
    """Of the whole dispatch as the graph counts it; a chunk takes its share."""
    flop_per_s: float
    factor: float = 1.0
    """On compute: 2 for backward."""

    def seconds(self, op: Op) -> float:
        """Return the time of one op."""
        return float(self.seconds_many(OpArrays(op.kind, {n: np.array([s]) for n, s in op.dims.items()}, op.dtype))[0])

    def seconds_many(self, ops: OpArrays) -> FloatArray:
        """Return the times of many ops [N]."""
        if ops.kind in ("dispatch", "combine"):
            share = np.asarray(ops.dims["message_bytes"], dtype=float) / self.message_bytes
            return share * (self.nodes - 1) * self.tokens * self.model.hidden_size * 2.0 / LINK_BYTES_PER_S
        return self.factor * ops.flop / self.flop_per_s

    def demand(self, op: Op) -> ResourceShares:
        """Return no shares: what the overlap costs the kernels is inside the assumed FLOP rate."""
        return ResourceShares()

    def tag(self, op: Op) -> Tag:
        """Return ``datasheet``."""
        return "datasheet"


def exposed_share(plan: Schedule, layers: int = 4) -> tuple[float, dict[str, float]]:
    """Return the share of forward and backward time without compute, and the sizes behind it."""
    model = model_spec("longcat-flash")
    ep = targets("longcat-flash")["training_overlap"]["ep_size"]
    deployment = Deployment(
        num_gpus=ep, ep_size=ep, precision=Precision(weights="bf16", dispatch="bf16"), overlap=plan.name
    )  # fmt: skip
    tokens = SEQUENCE_TOKENS / CONTEXT_PARALLEL
    # context parallelism: each device holds an eighth of the queries of a causal sequence, balanced
    size = StepSize("prefill", tokens / SEQUENCE_TOKENS, float(SEQUENCE_TOKENS), float(SEQUENCE_TOKENS))
    copies = tokens * model.expected_ffn_experts
    load = LayerLoad(copies, copies, model.n_routed_experts / ep, copies)
    whole = layer_segments(model, deployment, size, "longcat", load)
    cut = layer_segments(model, deployment, size, "longcat", load.part(plan.parts))
    segments = {name: whole[name] if name in plan.whole or plan.parts == 1 else ops for name, ops in cut.items()}
    block = Block("layers", layers, plan, (segments,) * plan.parts)
    message = float(whole["dispatch"][0].dims["message_bytes"])
    times = TrainingTimes(model, tokens, ep / DEVICES_PER_NODE, message, PEAK_FLOP_PER_S * MFU)
    total, compute, exchange = 0.0, 0.0, 0.0
    for factor in (1.0, 2.0):
        program = build_program([block], replace(times, factor=factor))
        line = LaneEngine(program, NoContention()).run()
        total += line.step_s
        lengths = line.own_end_s[:, 0] - line.start_s[:, 0]
        moves = np.array([item.is_collective for item in program.items])
        compute += float(lengths[~moves].sum())
        exchange += float(lengths[moves].sum())
    figures = {"compute_s": compute / layers, "exchange_s": exchange / layers, "step_s": total / layers}
    return (total - compute) / total, figures


def run(**_: Any) -> Section:
    """Return the section."""
    published = targets("longcat-flash")["training_overlap"]
    section = Section("training_overlap", "Training overlap: exposed dispatch and combine, EP32, 200 Gb/s per device")
    chunked = schedule("chunked", "longcat")
    free = replace(chunked, after={})
    for name, plan, target, limit in (
        ("without ScMoE overlap", schedule("none", "longcat"), published["exposed_without"], 0.02),
        ("ScMoE in two token chunks", chunked, published["exposed_with"], 0.02),
        ("two chunks, exchange also beside the second MLA", free, None, None),
    ):
        share, figures = exposed_share(plan)
        points = None if target is None else share - target
        section.rows.append(
            Row(
                f"exposed share, {name}", "of time", share, target, error=points, limit=limit,
                note=f"error in points; {figures['step_s'] * 1e3:.1f} ms a layer, forward and backward",
            )
        )  # fmt: skip
    figures = exposed_share(schedule("none", "longcat"))[1]
    section.notes.append(
        f"assumed: {SEQUENCE_TOKENS / CONTEXT_PARALLEL:.0f} tokens per device, {DEVICES_PER_NODE} devices a node, "
        f"{PEAK_FLOP_PER_S * MFU / 1e12:.0f} TFLOP/s; exchange {figures['exchange_s'] * 1e3:.2f} ms and compute "
        f"{figures['compute_s'] * 1e3:.2f} ms a layer. Both grow with the tokens, so the share does not depend on them."
    )
    return section
