"""Where the time of a step goes: compute, launch floors, contention, exposed communication, waiting for others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from longcat_sim.ops.op import KINDS, FloatArray, op
from longcat_sim.simulation.lanes import Timeline
from longcat_sim.simulation.program import links_of


@dataclass(frozen=True)
class Account:
    """Seconds of a step, mean over ranks. The parts of ``parts()`` add up to ``step_s``."""

    step_s: float
    compute_s: float
    """Something that moves nothing between ranks runs."""
    communication_s: float
    """Own time of collectives, hidden or not, waiting for others not counted."""
    exposed_s: float
    """No compute runs: exposed communication and waiting."""
    exposed_transfer_s: float
    """No compute runs and bytes move."""
    waiting_s: float
    """No compute runs and nothing moves on this rank: it waits for a slower one."""
    launch_floor_s: float
    """Part of compute: what the ops would cost at the smallest size."""
    contention_loss_s: float
    """Part of compute: what ops lost to others that ran beside them."""
    collectives_s: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Kind of collective -> its own time, and the part of it during which no compute runs."""

    def parts(self) -> dict[str, float]:
        """Return disjoint parts that add up to the step."""
        return {
            "compute": self.compute_s - self.launch_floor_s - self.contention_loss_s,
            "launch floors": self.launch_floor_s,
            "contention loss": self.contention_loss_s,
            "exposed communication": self.exposed_transfer_s,
            "waiting for the slowest rank": self.waiting_s,
        }


def _union(starts: FloatArray, ends: FloatArray) -> list[tuple[float, float]]:
    """Return the union of intervals, sorted."""
    merged: list[tuple[float, float]] = []
    for i in np.argsort(starts, kind="stable"):
        start, end = float(starts[i]), float(ends[i])
        if end <= start:
            continue
        if merged and start <= merged[-1][1]:
            if end > merged[-1][1]:
                merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


def _length(intervals: list[tuple[float, float]]) -> float:
    return sum(end - start for start, end in intervals)


def account(timeline: Timeline, op_times: Any = None, sample: int = 8) -> Account:
    """Return where the time goes, as the mean over ``sample`` ranks spread over all."""
    program = timeline.program
    ranks = np.unique(np.linspace(0, program.ranks - 1, min(sample, program.ranks)).round().astype(int))
    moves = np.array([item.is_collective for item in program.items])
    alone = np.stack([np.broadcast_to(s, (program.draws, program.ranks))[timeline.draw] for s in program.seconds])
    floors = _floors(program.items, op_times)
    kinds = {item.kind: np.array([i.kind == item.kind for i in program.items]) for item in program.items
             if item.is_collective}  # fmt: skip
    rows = []
    by_kind: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for rank in ranks:
        start, own, end = timeline.start_s[:, rank], timeline.own_end_s[:, rank], timeline.end_s[:, rank]
        work = _union(start[~moves], end[~moves])
        both = _union(np.concatenate([start[~moves], start[moves]]), np.concatenate([end[~moves], own[moves]]))
        compute, any_busy = _length(work), _length(both)
        for kind, mine in kinds.items():
            beside = _union(np.concatenate([start[~moves], start[mine]]), np.concatenate([end[~moves], own[mine]]))
            by_kind[kind].append((float((own - start)[mine].sum()), _length(beside) - compute))
        overlapped = float((end - start)[~moves].sum()) - compute  # two kernels of compute at once
        lost = float((end - start)[~moves].sum() - alone[~moves, rank].sum()) - overlapped
        floor = float(np.minimum(floors, alone[:, rank])[~moves].sum())
        rows.append(
            (compute, float((own - start)[moves].sum()), any_busy - compute, timeline.step_s - any_busy, floor, lost)
        )
    compute, communication, transfer, waiting, floor, lost = np.mean(rows, axis=0)
    lost = max(0.0, float(lost))
    return Account(
        timeline.step_s, float(compute), float(communication), float(transfer + waiting), float(transfer),
        float(waiting), float(floor), lost,
        {kind: (float(np.mean([a for a, _ in found])), float(np.mean([b for _, b in found])))
         for kind, found in by_kind.items()},
    )  # fmt: skip


def _floors(items: Any, op_times: Any) -> FloatArray:
    """Return each item's time at the smallest size: one row of one column."""
    known: dict[tuple[str, str], float] = {}
    result = np.zeros(len(items))
    if op_times is None:
        return result
    for i, item in enumerate(items):
        if item.is_collective:
            continue
        key = (item.kind, item.dtype)
        if key not in known:
            known[key] = _smallest(item, op_times)
        result[i] = known[key]
    return result


def _smallest(item: Any, op_times: Any) -> float:
    dims = {name: 1.0 for name in KINDS[item.kind].dims}
    try:
        gap = float(getattr(links_of(op_times), "kernel_gap_s", 0.0))
        return gap + float(op_times.seconds(op(item.kind, dtype=item.dtype, variant=item.variant, **dims)))
    except ValueError:  # a kind without a time, such as host, has no floor either
        return 0.0
