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
from longcat_sim.ops.schedules import COMMUNICATION, schedule
from longcat_sim.ops.shape import OpShape
from longcat_sim.profiling.suites import one_device, own_shapes
from longcat_sim.records.measurement import StepMeasurement
from longcat_sim.simulation.contention import MeasuredLaw, NoContention
from longcat_sim.simulation.lanes import LaneEngine
from longcat_sim.simulation.program import Program, build_program
from longcat_sim.specs.model import ModelSpec
from longcat_sim.studies.beside import ExchangeRates


@dataclass(frozen=True)
class ExchangeTimes:
    """Op times of a device whose exchanges take ``exchange_s`` each."""

    ops: OpTimesLike
    exchange_s: float

    def seconds(self, op: Op) -> float:
        """Return the time of one op or exchange, alone."""
        return self.exchange_s if op.is_collective else self.ops.seconds(op)

    def seconds_many(self, ops: OpArrays) -> FloatArray:
        """Return the times of many ops of one kind [N]."""
        sizes = zip(*ops.dims.values(), strict=True)
        return np.array([self.seconds(Op(ops.kind, size, ops.dtype, ops.variant)) for size in sizes])

    def demand(self, op: Op) -> ResourceShares:
        """Return what the op uses of the device; of an exchange the rates are measured instead."""
        return ResourceShares() if op.is_collective else self.ops.demand(op)

    def tag(self, op: Op) -> Tag:
        """Return where the figure comes from."""
        return "measured" if op.is_collective else self.ops.tag(op)


def predict_s(
    times: OpTimesLike, spec: ModelSpec, step: StepMeasurement, rates: ExchangeRates | None = None, *,
    waits: bool = True,
) -> float:  # fmt: skip
    """Return the predicted time of a step whose exchanges loop back, without the output projection.

    ``rates``: measured rates of ops beside exchanges that take SMs; without, nothing slows anything. ``waits``: whether
    an exchange waits behind the product launched with it.
    """
    blocks = _blocks(spec, step)
    program = build_program(blocks, ExchangeTimes(times, step.exchange_s))
    if rates is None or not step.exchange_sms:
        return LaneEngine(program, NoContention()).run().step_s
    pairs: dict[tuple[str, str], float] = {}
    for shape in [shape for block in blocks for ops in block.parts[0].values() for shape in ops]:
        if not shape.is_collective:
            op_rate, exchange_rate = rates.of(shape.typical(), step.exchange_sms)
            for exchange in COMMUNICATION:
                pairs[shape.name, exchange], pairs[exchange, shape.name] = op_rate, exchange_rate
    if waits:
        _wait_behind_products(program)
    # the law knows ops by kind: here each of the step's own
    program.items = [item if item.is_collective else replace(item, kind=item.name) for item in program.items]
    return LaneEngine(program, MeasuredLaw(pairs, {}, NoContention())).run().step_s


def _wait_behind_products(program: Program) -> None:
    """Let an exchange wait for the product that is launched with it.

    The compute stream needs no event of another stream, so that its product comes first and takes all SMs; blocks of
    the exchange get theirs when it ends. Without this the steps of ``gpu-campaign`` whose exchange takes longest come
    out 6 and 8 % short.
    """
    lane = program.order[0]
    for i, item in enumerate(program.items):
        if item.is_collective and item.lane:
            after = max(lane.index(w) for w in item.waits if program.items[w].lane == 0)
            beside = lane[after + 1] if after + 1 < len(lane) else -1
            if beside >= 0 and program.items[beside].kind == "gemm":
                program.items[i] = replace(item, waits=tuple(sorted({*item.waits, beside})))


def _blocks(spec: ModelSpec, step: StepMeasurement) -> list[Block]:
    """Return the blocks of a measured step under its schedule."""
    tokens = step.sequences * step.queries
    size = StepSize(step.phase, step.sequences, step.queries, step.context)
    load = LayerLoad(step.received, step.received, step.active)
    blocks = []
    for block in step_graph(spec, one_device("bf16"), size, load):
        part = {name: tuple(own_shapes(spec, ops, tokens, "bf16")) for name, ops in block.parts[0].items()}
        if block.schedule is not None:
            part = _looped(part, step.exchange_bytes)
            blocks.append(replace(block, schedule=schedule(step.overlap, "longcat"), parts=(part,)))
        else:
            kept = tuple(shape for shape in part["ops"] if shape.name in ("embedding", "final norm"))
            blocks.append(replace(block, parts=({"ops": kept},)))
    return blocks


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
