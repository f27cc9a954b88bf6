"""The discrete-event engine of a step: ops on lanes of ranks, rate-shared on each GPU, on a SimPy clock.

Every change of a GPU's set of running ops changes their rates, and completions move. A collective is one op per rank
and a barrier: a rank that has moved its bytes holds nothing while it waits for the others. The clock is in whole
picoseconds, so that no float remainder reaches it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import simpy

from longcat_sim.ops.op import FloatArray
from longcat_sim.records.span import Span
from longcat_sim.simulation.contention import ContentionLaw, MaxMin, Running
from longcat_sim.simulation.program import Program

TICKS_PER_S = 10**12


@dataclass
class Timeline:
    """When each item ran on each rank, in seconds [items, ranks].

    ``own_end_s`` is when a rank had done its own share of a collective; from then to ``end_s`` it waited.
    """

    program: Program
    start_s: FloatArray
    own_end_s: FloatArray
    end_s: FloatArray
    draw: int = 0

    @property
    def step_s(self) -> float:
        """End of the last item on the slowest rank."""
        return float(self.end_s.max(initial=0.0))

    def spans(self, ranks: Any = None, layers: Any = None) -> list[Span]:
        """Return the spans of some ranks and layers (all by default)."""
        chosen = range(self.program.ranks) if ranks is None else ranks
        found = []
        for i, item in enumerate(self.program.items):
            if layers is not None and item.layer not in layers:
                continue
            lane = self.program.lanes[item.lane]
            for rank in chosen:
                start, end = float(self.start_s[i, rank]), float(self.end_s[i, rank])
                found.append(Span(item.name, lane, start, end, rank, item.layer, item.tag))
        return found


@dataclass(frozen=True, slots=True)
class _Run:
    """Ops that follow each other with nothing else happening: ticks from the first's start, and the progress of the
    exchange beside them."""

    items: list[int]
    ends: list[int]
    beside: list[float]


class LaneEngine:
    """Runs one draw of a program. ``events`` counts the clock's events afterwards."""

    def __init__(self, program: Program, law: ContentionLaw | None = None, draw: int = 0) -> None:
        self.program, self.draw = program, draw
        self.law = law or MaxMin()
        self.env = simpy.Environment()  # times are ints
        self.events = 0
        items, ranks = program.items, program.ranks
        self._work: list[list[float]] = [
            (np.broadcast_to(s, (program.draws, ranks))[draw] * TICKS_PER_S).tolist() for s in program.seconds
        ]
        self._start = [[-1] * ranks for _ in items]
        self._own = [[-1] * ranks for _ in items]
        self._end = [[-1] * ranks for _ in items]
        self._at = [[0] * len(program.order) for _ in range(ranks)]  # next position on each lane
        lanes = len(program.order)
        self._running: list[list[int]] = [[-1] * lanes for _ in range(ranks)]  # item that holds each lane
        self._left = [[0.0] * lanes for _ in range(ranks)]
        self._rate = [[1.0] * lanes for _ in range(ranks)]
        self._finish = [[-1] * lanes for _ in range(ranks)]  # -1: nothing moves on the lane
        self._since = [0] * ranks
        self._arrived: dict[tuple[int, int], int] = defaultdict(int)
        classes: dict[tuple[Any, ...], int] = {}
        self._class = [classes.setdefault((i.kind, i.shares, i.is_collective), len(classes)) for i in items]
        self._class_items = {c: Running(*key) for key, c in classes.items()}
        self._memo: dict[tuple[int, ...], tuple[float, ...]] = {}
        self._due: dict[int, list[int]] = {}
        self._uniform = [min(work) == max(work) for work in self._work]
        self._awaited = {w for item in items for w in item.waits if items[w].lane != item.lane}
        self._runs: dict[tuple[int, int], _Run] = {}
        self._ahead: list[tuple[_Run, int, int] | None] = [None] * ranks
        self._lanes_backwards = tuple(range(lanes))[::-1]

    def run(self) -> Timeline:
        """Return when everything ran."""
        changed = [(rank, set(range(len(self.program.order)))) for rank in range(self.program.ranks)]
        for rank, lanes in changed:
            self._go(rank, lanes)
        self.env.run()
        missing = [i for i, ends in enumerate(self._end) if min(ends) < 0]
        assert not missing, f"the step stopped before {self.program.items[missing[0]].name}"
        scale = 1.0 / TICKS_PER_S
        return Timeline(
            self.program,
            np.array(self._start, dtype=float) * scale,
            np.array(self._own, dtype=float) * scale,
            np.array(self._end, dtype=float) * scale,
            self.draw,
        )

    def _go(self, rank: int, free: set[int]) -> None:
        """Start what can start on the lanes in ``free`` and what waited for them; then set rates and completions."""
        if self._ahead[rank] is not None:
            return  # nothing can start before its run of ops ends: that is why it was taken in one go
        now = int(self.env.now)
        items, order, end = self.program.items, self.program.order, self._end
        at, running = self._at[rank], self._running[rank]
        released: list[int] = []
        moved = False
        again = True
        while again:
            again = False
            for lane in self._lanes_backwards:  # exchanges first: what runs beside them depends on it
                sequence = order[lane]
                while running[lane] < 0 and at[lane] < len(sequence):
                    i = sequence[at[lane]]
                    waits = items[i].waits
                    if waits and any(end[w][rank] < 0 for w in waits):
                        break
                    if lane == 0 and not again and self._take_run(rank, i):
                        moved = True
                        break
                    at[lane] += 1
                    self._start[i][rank] = now
                    work = self._work[i][rank]
                    moved = True
                    if work > 0:
                        running[lane] = i
                        self._left[rank][lane] = work
                        self._finish[rank][lane] = 0  # moves, time not set yet
                        break
                    if self._arrive(i, rank, lane, released):
                        again = True
                    else:
                        running[lane] = i
        if (moved or free) and self._ahead[rank] is None:
            self._refresh(rank)
        for other in released:
            self._go(other, set(range(len(order))))

    def _take_run(self, rank: int, i: int) -> bool:
        """Take the ops from item ``i`` on in one go, as far as nothing else can happen on this GPU meanwhile.

        That holds up to the next op that another lane waits for or that meets others, and to the end of an exchange
        that runs beside. The times are those of op-by-op steps, tick by tick.
        """
        items, order, running = self.program.items, self.program.order, self._running[rank]
        beside = -1
        for lane in range(1, len(order)):
            if running[lane] >= 0 and self._finish[rank][lane] >= 0:
                if beside >= 0:
                    return False
                beside = lane
            elif running[lane] >= 0:  # waits for others: what follows it must be held by something else
                place = self._at[rank][lane]
                if place < len(order[lane]) and all(
                    w == running[lane] or self._end[w][rank] >= 0 for w in items[order[lane][place]].waits
                ):
                    return False
        other = running[beside] if beside >= 0 else -1
        run = self._run_from(i, self._class[other] if other >= 0 else -1, rank)
        count = len(run.items)
        if beside >= 0:
            if self._finish[rank][beside] > 0:  # its progress until now
                elapsed = int(self.env.now) - self._since[rank]
                self._left[rank][beside] -= elapsed * self._rate[rank][beside]
            self._since[rank] = int(self.env.now)
            count = bisect_left(run.beside, self._left[rank][beside] * (1 - 1e-12))
        if count < 2:
            if beside >= 0 and self._finish[rank][beside] > 0:
                self._rate[rank][beside] = 0.0  # booked above; the refresh that follows sets the time again
                self._finish[rank][beside] = 0
            return False
        if beside >= 0:
            self._finish[rank][beside] = 0
        self._ahead[rank] = (run, count, beside)
        running[0] = i
        self._at[rank][0] += count
        self._due_at(int(self.env.now) + run.ends[count - 1], rank)
        self._finish[rank][0] = int(self.env.now) + run.ends[count - 1]
        return True

    def _run_from(self, i: int, other: int, rank: int) -> _Run:
        """Return the run of ops that starts with item ``i`` beside an op of class ``other`` (-1: alone)."""
        uniform = self._uniform[i]
        if uniform and (i, other) in self._runs:
            return self._runs[i, other]
        items, sequence = self.program.items, self.program.order[0]
        found: list[int] = []
        ends, beside = [], []
        now, progress = 0, 0.0
        for j in sequence[self._place_of(i) :]:
            item = items[j]
            if self._uniform[j] != uniform or item.group > 1 or (found and item.waits):
                break
            key = (self._class[j],) if other < 0 else (self._class[j], other)
            if key not in self._memo:
                self._memo[key] = self.law.rates([self._class_items[c] for c in key])
            rates, work = self._memo[key], self._work[j][rank]
            spent = max(ceil(work / rates[0] - 1e-6), 1) if work > 0 else 0
            now += spent
            progress += spent * rates[-1] if other >= 0 else 0.0
            found.append(j)
            ends.append(now)
            beside.append(progress)
            if j in self._awaited:
                break
        run = _Run(found, ends, beside)
        if uniform:
            self._runs[i, other] = run
        return run

    def _place_of(self, i: int) -> int:
        if not hasattr(self, "_places"):
            self._places = {item: place for place, item in enumerate(self.program.order[0])}
        return self._places[i]

    def _end_run(self, rank: int) -> None:
        """Book the ops of a run that ends now."""
        ahead = self._ahead[rank]
        assert ahead is not None
        run, count, beside = ahead
        began = int(self.env.now) - run.ends[count - 1]
        before = began
        for j, end in zip(run.items[:count], run.ends, strict=False):
            self._start[j][rank] = before
            before = began + end
            self._end[j][rank] = self._own[j][rank] = before
        if beside >= 0:
            self._left[rank][beside] -= run.beside[count - 1]
            self._rate[rank][beside] = 0.0
        self._since[rank] = int(self.env.now)
        self._ahead[rank] = None
        self._running[rank][0] = -1
        self._finish[rank][0] = -1

    def _arrive(self, i: int, rank: int, lane: int, released: list[int]) -> bool:
        """Note that ``rank`` has done its share of item ``i``; return whether the item has ended for it."""
        now = int(self.env.now)
        self._own[i][rank] = now
        group = self.program.items[i].group
        if group == 1:
            self._end[i][rank] = now
            return True
        first = rank // group * group
        self._arrived[i, first] += 1
        members = min(group, self.program.ranks - first)
        if self._arrived[i, first] < members:
            return False
        for member in range(first, first + members):
            self._end[i][member] = now
            if member != rank:
                self._running[member][lane] = -1
                released.append(member)
        return True

    def _refresh(self, rank: int) -> None:
        """Recompute the rates of a rank's running ops and the time of its next completion."""
        now = int(self.env.now)
        running, finish, left, rate = self._running[rank], self._finish[rank], self._left[rank], self._rate[rank]
        lanes = [lane for lane, f in enumerate(finish) if f >= 0 and running[lane] >= 0]
        if not lanes:
            return
        key = tuple(self._class[running[lane]] for lane in lanes)
        rates = self._memo.get(key)
        if rates is None:
            rates = self._memo[key] = self.law.rates([self._class_items[c] for c in key])
        elapsed = now - self._since[rank]
        self._since[rank] = now
        soonest = None
        for lane, new in zip(lanes, rates, strict=True):
            if finish[lane] > 0:
                left[lane] -= elapsed * rate[lane]
                if new != rate[lane]:
                    finish[lane] = now + max(ceil(left[lane] / new - 1e-6), 1)
            else:
                finish[lane] = now + max(ceil(left[lane] / new - 1e-6), 1)
            rate[lane] = new
            if soonest is None or finish[lane] < soonest:
                soonest = finish[lane]
        assert soonest is not None
        self._due_at(soonest, rank)

    def _due_at(self, when: int, rank: int) -> None:
        """Look at ``rank`` again at ``when``: one event of the clock serves all ranks that are due together."""
        if when in self._due:
            self._due[when].append(rank)
        else:
            self._due[when] = [rank]
            self.env.timeout(when - int(self.env.now)).callbacks.append(self._tick)

    def _tick(self, _: Any) -> None:
        """Complete what is due now on every rank that is due."""
        now = int(self.env.now)
        self.events += 1
        for rank in dict.fromkeys(self._due.pop(now)):
            finish, running = self._finish[rank], self._running[rank]
            if self._ahead[rank] is not None:
                if finish[0] == now:
                    self._end_run(rank)
                    self._go(rank, {0})
                continue
            freed: set[int] = set()
            released: list[int] = []
            for lane, when in enumerate(finish):
                if when == now and running[lane] >= 0:
                    finish[lane] = -1
                    if self._arrive(running[lane], rank, lane, released):
                        running[lane] = -1
                    freed.add(lane)
            if freed:
                self._settle(rank, freed)
                self._go(rank, freed)
                for other in released:
                    self._go(other, {0})

    def _settle(self, rank: int, freed: set[int]) -> None:
        """Book the progress of the ops that go on, before rates change."""
        now = int(self.env.now)
        elapsed = now - self._since[rank]
        if elapsed:
            for lane, f in enumerate(self._finish[rank]):
                if f > 0 and lane not in freed and self._running[rank][lane] >= 0:
                    self._left[rank][lane] -= elapsed * self._rate[rank][lane]
            self._since[rank] = now
