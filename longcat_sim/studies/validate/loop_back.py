"""Predict a decode step of the executable model whose exchanges loop back on a GPU, from its ops and one exchange.

The lanes are those of the simulator; so are the segments, save that the sorted rows are gathered behind the router and
scattered before the join, where ``model.loop_back`` does it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from longcat_sim.ops.attention import StepSize
from longcat_sim.ops.graph import Block, LayerLoad, Segments, step_graph
from longcat_sim.ops.op import FloatArray, Op, OpArrays, OpTimesLike, ResourceShares, Tag
from longcat_sim.ops.schedules import schedule
from longcat_sim.ops.shape import OpShape
from longcat_sim.profiling.suites import one_device, own_shapes
from longcat_sim.records.measurement import StepMeasurement
from longcat_sim.simulation.contention import ContentionLaw
from longcat_sim.simulation.lanes import LaneEngine
from longcat_sim.simulation.program import Program, build_program
from longcat_sim.specs.model import ModelSpec


@dataclass(frozen=True)
class ExchangeTimes:
    """Op times of a device whose exchanges take ``exchange_s`` each and use ``shares`` of it."""

    ops: OpTimesLike
    exchange_s: float
    shares: ResourceShares

    def seconds(self, op: Op) -> float:
        """Return the time of one op or exchange, alone."""
        return self.exchange_s if op.is_collective else self.ops.seconds(op)

    def seconds_many(self, ops: OpArrays) -> FloatArray:
        """Return the times of many ops of one kind [N]."""
        sizes = zip(*ops.dims.values(), strict=True)
        return np.array([self.seconds(Op(ops.kind, size, ops.dtype, ops.variant)) for size in sizes])

    def demand(self, op: Op) -> ResourceShares:
        """Return what the op or exchange uses of the device."""
        return self.shares if op.is_collective else self.ops.demand(op)

    def tag(self, op: Op) -> Tag:
        """Return where the figure comes from."""
        return "measured" if op.is_collective else self.ops.tag(op)


def step_program(times: OpTimesLike, spec: ModelSpec, step: StepMeasurement, shares: ResourceShares) -> Program:
    """Return the program of a measured step under its schedule; without the output projection."""
    tokens = step.sequences * step.queries
    size = StepSize(step.phase, step.sequences, step.queries, step.context)
    load = LayerLoad(step.received, step.received, step.active)
    blocks = []
    for block in step_graph(spec, one_device("bf16"), size, load):
        parts = tuple({name: tuple(own_shapes(spec, ops, tokens, "bf16")) for name, ops in part.items()}
                      for part in block.parts)  # fmt: skip
        if block.schedule is not None:
            plan = schedule(step.overlap, "longcat")
            block = replace(block, schedule=plan, parts=tuple(_looped(part, step.exchange_bytes) for part in parts))
        else:
            kept = ("embedding", "final norm")
            block = Block(block.name, 1, None, ({"ops": tuple(s for s in parts[0]["ops"] if s.name in kept)},))
        blocks.append(block)
    return build_program(blocks, ExchangeTimes(times, step.exchange_s, shares))


def predict_s(
    times: OpTimesLike, spec: ModelSpec, step: StepMeasurement, shares: ResourceShares, law: ContentionLaw
) -> float:
    """Return the predicted time of a step whose exchanges loop back."""
    return LaneEngine(step_program(times, spec, step, shares), law).run().step_s


def _looped(segments: Segments, nbytes: float) -> Segments:
    """Return a layer's segments with exchanges, and with the rows gathered before them and scattered after."""
    there, back = (OpShape(name, name, {"message_bytes": nbytes, "ranks": 1}) for name in ("dispatch", "combine"))
    gather = tuple(shape for shape in segments["experts"] if shape.name == "permute")
    scatter = tuple(shape for shape in segments["experts"] if shape.name == "unpermute")
    products = tuple(shape for shape in segments["experts"] if shape.name not in ("permute", "unpermute"))
    return {
        **segments, "router": (*segments["router"], *gather), "dispatch": (there,), "experts": products,
        "combine": (back,), "add": (*scatter, *segments["add"]),
    }  # fmt: skip
