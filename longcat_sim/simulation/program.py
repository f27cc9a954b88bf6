"""``Program``: a step as ops in order on lanes, with what each waits for and how long it takes alone on each rank.

All ranks run the same ops; only durations differ (expert load, stragglers). Arrays are [D, R]: D draws, R ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from longcat_sim.errors import UnmeasuredOpError
from longcat_sim.ops.graph import Block
from longcat_sim.ops.op import FloatArray, OpTimesLike, ResourceShares, Tag
from longcat_sim.ops.shape import OpShape

COMPUTE = "compute"


@dataclass(frozen=True, slots=True)
class Item:
    """One op of the program."""

    name: str
    kind: str
    segment: str
    part: int
    layer: int
    block: str
    lane: int
    waits: tuple[int, ...]
    """Items that end before this one starts, the lane's predecessor not counted."""
    group: int
    """Ranks that meet at a barrier when it ends; neighbours share a group (1: none)."""
    shares: ResourceShares
    tag: Tag
    is_collective: bool
    dtype: str = "bf16"
    variant: str = ""


@dataclass
class Program:
    """Items, their order on each lane, and their durations alone.

    ``seconds`` has one array per item, each broadcastable to [draws, ranks].
    """

    items: list[Item]
    lanes: list[str]
    order: list[list[int]]
    """Per lane, indices of items in order."""
    seconds: list[FloatArray]
    draws: int = 1
    ranks: int = 1
    notes: list[str] = field(default_factory=list)

    def table(self) -> FloatArray:
        """Return durations alone [items, draws, ranks]."""
        whole = np.empty((len(self.items), self.draws, self.ranks))
        for i, seconds in enumerate(self.seconds):
            whole[i] = seconds
        return whole

    def scaled(self, factors: Mapping[int, float], lanes: Sequence[str] = (COMPUTE,)) -> Program:
        """Return the program with a straggler: rank -> factor on its durations on ``lanes``."""
        factor = np.ones(self.ranks)
        for rank, by in factors.items():
            factor[rank] = by
        wanted = {self.lanes.index(lane) for lane in lanes if lane in self.lanes}
        seconds = [s * factor if item.lane in wanted else s for item, s in zip(self.items, self.seconds, strict=True)]
        return Program(self.items, self.lanes, self.order, seconds, self.draws, self.ranks, self.notes)


def links_of(op_times: Any) -> Any:
    """Return what a fit, or a draw of it, knows of collectives and of the gap between kernels; None for data sheets."""
    return getattr(op_times, "links", None)


class Pricer:
    """Prices op shapes once each; ops that a profile cannot time but that may be left out cost nothing, with a note.

    With ``draws`` of the calibration the seconds are those of every draw [draws, 1] (or [layers, draws, ranks]).
    """

    OPTIONAL = frozenset({"host"})

    def __init__(self, op_times: OpTimesLike, draws: Sequence[OpTimesLike] = ()) -> None:
        self.op_times, self.draws = op_times, draws
        self.notes: list[str] = []
        self._cache: dict[int, tuple[OpShape, FloatArray, ResourceShares, Tag]] = {}

    def price(self, shape: OpShape) -> tuple[FloatArray, ResourceShares, Tag]:
        """Return (seconds alone, the gap before the next kernel included; shares while it runs alone; tag)."""
        if id(shape) not in self._cache:
            self._cache[id(shape)] = (shape, *self._price(shape))
        return self._cache[id(shape)][1:]

    def _price(self, shape: OpShape) -> tuple[FloatArray, ResourceShares, Tag]:
        try:
            if self.draws:
                seconds = self._drawn(shape)
            else:
                seconds = _with_gap(shape, shape.seconds(self.op_times), self.op_times)
            typical = shape.typical()
            return seconds, self.op_times.demand(typical), self.op_times.tag(typical)
        except UnmeasuredOpError as error:
            if shape.kind not in self.OPTIONAL:
                raise
            note = f"{shape.name} counts as 0 s: {error}"
            if note not in self.notes:
                self.notes.append(note)
            return np.asarray(0.0), ResourceShares(), "datasheet"

    def _drawn(self, shape: OpShape) -> FloatArray:
        """Return the seconds of each draw: sizes that differ between draws are taken draw by draw."""
        columns = []
        for i, times in enumerate(self.draws):
            dims = {
                name: size[:, i : i + 1] if getattr(size, "ndim", 0) == 3 and size.shape[1] > 1 else size
                for name, size in shape.dims.items()
            }
            one = replace(shape, dims=dims)
            columns.append(_with_gap(shape, one.seconds(times), times))
        if columns[0].ndim == 3:
            return np.concatenate(columns, axis=1)
        return np.stack([column.reshape(1) for column in columns])


def _with_gap(shape: OpShape, seconds: FloatArray, op_times: OpTimesLike) -> FloatArray:
    """Return ``seconds`` with the idle time that follows a kernel; nothing follows an op that launches none."""
    gap = float(getattr(links_of(op_times), "kernel_gap_s", 0.0))
    return (
        seconds if shape.is_collective or shape.kind == "host" or not gap else np.where(seconds > 0, seconds + gap, 0)
    )


def build_program(
    blocks: Sequence[Block], op_times: OpTimesLike, *, draws: int = 1, ranks: int = 1, pricer: Pricer | None = None
) -> Program:
    """Return the program of a step's blocks.

    A group is at most ``ranks`` wide: with one rank standing for all, its collectives meet nobody. Programs of the same
    blocks may share a ``pricer`` of ``op_times``.

    Raises:
        ScheduleError: a schedule that cannot run.
        UnmeasuredOpError: ``op_times`` lacks a kind that the step needs.
    """
    pricer = pricer or Pricer(op_times)
    lanes = [COMPUTE]
    for block in blocks:
        lanes += [lane for lane in (block.schedule.lanes if block.schedule else ()) if lane not in lanes]
    program = Program([], lanes, [[] for _ in lanes], [], draws, ranks)
    last: tuple[int, ...] = ()  # items that the next block waits for
    for block in blocks:
        if block.schedule is None:
            for shape in block.parts[0]["ops"]:
                _append(program, pricer, shape, block, "ops", 0, block.first_layer, 0, last, 0)
                last = ()
            last = (len(program.items) - 1,)
        else:
            last = _append_layers(program, pricer, block, last)
    program.notes = pricer.notes
    return program


def _append(
    program: Program, pricer: Pricer, shape: OpShape, block: Block, segment: str, part: int, layer: int, lane: int,
    waits: tuple[int, ...], index: int,
) -> None:  # fmt: skip
    """Add one op at the end of a lane; ``index`` is the layer's place on the layer axis of its durations."""
    seconds, shares, tag = pricer.price(shape)
    if seconds.ndim == 3:
        seconds = seconds[index if len(seconds) > 1 else 0]
    program.order[lane].append(len(program.items))
    program.items.append(
        Item(
            shape.name, shape.kind, segment, part, layer, block.name, lane, waits, min(shape.group, program.ranks),
            shares, tag, shape.is_collective, shape.dtype, shape.variant,
        )
    )  # fmt: skip
    program.seconds.append(seconds)


def _append_layers(program: Program, pricer: Pricer, block: Block, before: tuple[int, ...]) -> tuple[int, ...]:
    """Add a block of layers; return its last items."""
    plan = block.schedule
    assert plan is not None
    plan.check()
    count = block.count
    waits = plan.waits(count)
    orders = plan.unrolled(count)
    previous = {lane: program.order[program.lanes.index(lane)][-1:] for lane in orders}
    lane_of = {at: lane for lane, order in orders.items() for at in order}
    # items must exist before others wait for them, so segments are added in dependency order
    last_item: dict[Any, tuple[int, ...]] = {}
    pending = {lane: list(order) for lane, order in orders.items()}
    while any(pending.values()):
        moved = False
        for lane, order in pending.items():
            while order and all(w in last_item or lane_of[w] == lane for w in waits[order[0]]):
                at = order.pop(0)
                layer, segment, part = at
                number = program.lanes.index(lane)
                needed: list[int] = []
                for other in waits[at]:
                    needed += [i for i in last_item.get(other, ()) if program.items[i].lane != number]
                start = not [w for w in waits[at] if lane_of[w] != lane] and not last_item
                if start or not waits[at]:
                    needed += [i for i in before if program.items[i].lane != number]
                shapes = block.parts[part][segment]
                waiting = tuple(sorted(set(needed)))
                for shape in shapes:
                    _append(
                        program, pricer, shape, block, segment, part, block.first_layer + layer, number, waiting, layer
                    )
                    waiting = ()
                if shapes:
                    last_item[at] = (len(program.items) - 1,)
                else:  # an empty segment passes its waits on
                    passed = [i for other in waits[at] for i in last_item.get(other, ())]
                    last_item[at] = tuple(sorted({*passed, *(() if passed else (*before, *previous[lane]))}))
                moved = True
        assert moved, "a schedule with a cycle passed its check"
    final = {at for at in lane_of if at[0] == count - 1}
    ends = sorted({i for at in final for i in last_item[at]})
    return tuple(ends)
