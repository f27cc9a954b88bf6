"""The lanes of a step for many draws and ranks at once: the same rules as ``lanes``, in numpy, as masked lock-step.

Every rank of every draw goes from event to event on its own clock; barriers tie the clocks together. A rank that waits
at a barrier whose release could start something goes on no further than the clock of the last rank to come, so no rank
runs past a change of its rates. ``LaneEngine`` is the oracle.

Shapes: N = draws x ranks, all [N] unless stated.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from longcat_sim.ops.op import FloatArray
from longcat_sim.simulation.contention import ContentionLaw, MaxMin, Running
from longcat_sim.simulation.program import Program

IDLE, RUNNING, ARRIVED = 0, 1, 2


@dataclass(frozen=True)
class StepArrays:
    """Totals of a step, [draws, ranks] each; ``step_s`` [draws] is the slowest rank's end."""

    end_s: FloatArray
    compute_s: FloatArray
    """Time during which at least one op runs that moves nothing between ranks."""
    communication_s: FloatArray
    """Own time of collectives, waiting for others not counted."""

    @property
    def step_s(self) -> FloatArray:
        """End on the slowest rank [draws]."""
        return self.end_s.max(axis=1)

    @property
    def exposed_s(self) -> FloatArray:
        """Time without compute, mean over ranks [draws]: exposed communication, and waiting for others."""
        return self.step_s - self.compute_s.mean(axis=1)


def run_arrays(program: Program, law: ContentionLaw | None = None) -> StepArrays:
    """Return the totals of every draw of a program.

    Raises:
        ValueError: more than two lanes beside each other (use ``LaneEngine``).
    """
    if len(program.order) == 1:
        return _one_lane(program)
    if len(program.order) > 2:
        raise ValueError(f"lanes: expected at most 2; got {', '.join(program.lanes)}; use LaneEngine, draw by draw")
    law = law or MaxMin()
    return _TwoLanes(merged(program, law), law).run()


def merged(program: Program, law: ContentionLaw) -> Program:
    """Return the program with ops that follow each other and always run at the same rates joined into one: exact."""
    classes: dict[Any, int] = {}
    kinds = [classes.setdefault((i.kind, i.shares, i.is_collective), len(classes)) for i in program.items]
    tables = _rate_tables([Running(*key) for key in classes], law, program, kinds)
    awaited = {w for item in program.items for w in item.waits}
    into = list(range(len(program.items)))
    seconds: list[FloatArray] = list(program.seconds)
    for order in program.order:
        for before, i in itertools.pairwise(order):
            first, item = program.items[before], program.items[i]
            head = into[before]
            lane, a, b = item.lane, kinds[head], kinds[i]
            same = a == b or all(
                np.array_equal(table[a] if lane == 0 else table[:, a], table[b] if lane == 0 else table[:, b])
                for table in tables
            )
            if (
                same and not item.waits and before not in awaited and first.group == item.group == 1
                and not first.is_collective and not item.is_collective
            ):  # fmt: skip
                into[i] = head
                seconds[head] = seconds[head] + program.seconds[i]
    last = {head: i for i, head in enumerate(into)}  # others wait for the last op of a joined one
    kept = [i for i, head in enumerate(into) if i == head]
    number = {i: at for at, i in enumerate(kept)}
    assert all(w == last[into[w]] for item in program.items for w in item.waits)
    items = [
        replace(program.items[i], waits=tuple(number[into[w]] for w in program.items[i].waits)) for i in kept
    ]  # fmt: skip
    orders = [[number[i] for i in lane if into[i] == i] for lane in program.order]
    return Program(
        items, program.lanes, orders, [seconds[i] for i in kept], program.draws, program.ranks, program.notes
    )


def _one_lane(program: Program) -> StepArrays:
    """Ops in order: a running sum, with the group's maximum behind each collective."""
    shape = (program.draws, program.ranks)
    now, compute, communication = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for i in program.order[0]:
        item, seconds = program.items[i], program.seconds[i]
        now = now + seconds
        if item.is_collective:
            communication = communication + seconds
        else:
            compute = compute + seconds
        if item.group > 1:
            grouped = now.reshape(shape[0], -1, item.group)
            now = np.broadcast_to(grouped.max(axis=2, keepdims=True), grouped.shape).reshape(shape)
    return StepArrays(now, compute, communication)


class _TwoLanes:
    """State of all ranks of all draws."""

    def __init__(self, program: Program, law: ContentionLaw) -> None:
        items, draws, ranks = program.items, program.draws, program.ranks
        self.program, self.shape = program, (draws, ranks)
        self.n = n = draws * ranks
        self.all = np.arange(n)
        count = len(items)
        # durations: a scalar per item, or a row of a table
        self.scalar = np.zeros(count + 1)
        self.row = np.full(count + 1, -1)
        rows: list[FloatArray] = []
        for i, seconds in enumerate(program.seconds):
            if seconds.size == 1:
                self.scalar[i] = float(seconds.reshape(-1)[0])
            else:
                self.row[i] = len(rows)
                rows.append(np.broadcast_to(seconds, self.shape).reshape(-1))
        self.rows = np.stack(rows) if rows else np.zeros((1, n))
        # ends are kept for items that another lane waits for; row 0 is "nothing to wait for"
        awaited = sorted({w for item in items for w in item.waits})
        place = {w: at + 1 for at, w in enumerate(awaited)}
        self.end_row = np.zeros(count + 1, dtype=int)
        for w, at in place.items():
            self.end_row[w] = at
        self.ends = np.full((len(awaited) + 1, n), np.inf)
        self.ends[0] = 0.0
        width = max(1, max(len(item.waits) for item in items))
        self.waits = np.zeros((count + 1, width), dtype=int)
        for i, item in enumerate(items):
            for at, w in enumerate(item.waits):
                self.waits[i, at] = place[w]
        self.group = np.array([item.group for item in items] + [1])
        self.moves = np.array([item.is_collective for item in items] + [False])
        classes: dict[Any, int] = {}
        kinds = [classes.setdefault((i.kind, i.shares, i.is_collective), len(classes)) for i in items]
        self.kind = np.array([*kinds, len(classes)])
        self.rates = _rate_tables([Running(*key) for key in classes], law, program, kinds)
        self.sequence = [np.array([*order, count]) for order in program.order]
        self.groups = [sorted({items[i].group for i in order if items[i].group > 1}) for order in program.order]

    def run(self) -> StepArrays:
        """Return the totals when every rank has run everything."""
        n, lanes = self.n, range(2)
        count = len(self.program.items)
        now, compute, communication = np.zeros(n), np.zeros(n), np.zeros(n)
        at = [np.zeros(n, dtype=int) for _ in lanes]
        item = [np.full(n, self.sequence[k][0]) for k in lanes]
        state = [np.zeros(n, dtype=int) for _ in lanes]
        left = [np.zeros(n) for _ in lanes]
        free = [np.zeros(n) for _ in lanes]
        own = [np.zeros(n) for _ in lanes]
        none = len(self.rates[0]) - 1
        while True:
            wait = [np.full(n, np.inf) for _ in lanes]
            for k in lanes:
                idle = (state[k] == IDLE) & (item[k] < count)
                if idle.any():
                    who = self.all[idle]
                    ready = np.maximum(free[k][who], self._ready(item[k][who], who))
                    start = ready <= now[who]
                    begun = who[start]
                    state[k][begun] = RUNNING
                    which = item[k][begun]
                    row = self.row[which]
                    left[k][begun] = np.where(row >= 0, self.rows[row, begun], self.scalar[which])
                    wait[k][who[~start]] = ready[~start] - now[who[~start]]
            running = [state[k] == RUNNING for k in lanes]
            kind = [np.where(running[k], self.kind[item[k]], none) for k in lanes]
            rate = [self.rates[k][kind[0], kind[1]] for k in lanes]
            for k in lanes:
                wait[k] = np.where(running[k], left[k] / rate[k], wait[k])
            step = np.minimum(wait[0], wait[1])
            can = np.isfinite(step)
            stalled = np.zeros(n, dtype=bool)
            for k in lanes:
                arrived = state[k] == ARRIVED
                if arrived.any():
                    who = self.all[arrived & can]
                    after = self.sequence[k][at[k][who] + 1]
                    stalled[who] |= (after < count) & np.isfinite(self._ready(after, who))
            go = can & ~stalled
            if stalled.any():
                # a barrier ends when its last rank comes, and that is not before where that rank is now: until then
                # a stalled rank may go on
                step = np.where(stalled, np.minimum(step, self._until(now, state, item, own) - now), step)
                go |= can & stalled & (step > 0)
            if not go.any():
                if not can.any():
                    break
                step = np.minimum(wait[0], wait[1])
                when = np.where(can, now + step, np.inf).reshape(self.shape)
                go = (when <= when.min(axis=1, keepdims=True)).reshape(-1) & can
            step = np.where(go, step, 0.0)
            now = now + step
            works = (running[0] & ~self.moves[item[0]]) | (running[1] & ~self.moves[item[1]])
            compute += np.where(works, step, 0.0)
            for k in lanes:
                communication += np.where(running[k] & self.moves[item[k]], step, 0.0)
                done = go & running[k] & (wait[k] <= step)
                left[k] = np.where(running[k] & ~done, left[k] - step * rate[k], left[k])
                if not done.any():
                    continue
                alone = done & (self.group[item[k]] == 1)
                self._release(k, self.all[alone], now[alone], item, state, at, free)
                meet = done & ~alone
                state[k][meet] = ARRIVED
                own[k][meet] = now[meet]
                if meet.any():
                    self._meet(k, item, state, at, free, own)
        assert all((item[k] == count).all() for k in lanes), "the step stopped: a barrier that nobody releases"
        end = np.maximum(free[0], free[1]).reshape(self.shape)
        return StepArrays(end, compute.reshape(self.shape), communication.reshape(self.shape))

    def _until(self, now: FloatArray, state: Any, item: Any, own: Any) -> FloatArray:
        """Return the time before which no barrier that a rank waits at can end [N]."""
        until = np.full(self.n, np.inf)
        for k in range(2):
            arrived = state[k] == ARRIVED
            for group in self.groups[k]:
                mine = arrived & (self.group[item[k]] == group)
                if mine.any():
                    there = np.where(mine, own[k], now).reshape(-1, group).max(axis=1)
                    until = np.where(mine, np.minimum(until, np.repeat(there, group)), until)
        return until

    def _ready(self, which: Any, who: Any) -> FloatArray:
        """Return when what items wait for has ended on ranks ``who``; inf while unknown."""
        ready = self.ends[self.waits[which, 0], who]
        for at in range(1, self.waits.shape[1]):
            ready = np.maximum(ready, self.ends[self.waits[which, at], who])
        return ready

    def _release(self, k: int, who: Any, when: FloatArray, item: Any, state: Any, at: Any, free: Any) -> None:
        """End the current item of lane ``k`` on ranks ``who``."""
        row = self.end_row[item[k][who]]
        kept = row > 0
        self.ends[row[kept], who[kept]] = when[kept]
        free[k][who] = when
        state[k][who] = IDLE
        at[k][who] += 1
        item[k][who] = self.sequence[k][at[k][who]]

    def _meet(self, k: int, item: Any, state: Any, at: Any, free: Any, own: Any) -> None:
        """Release the groups whose members have all arrived."""
        for group in self.groups[k]:
            here = ((state[k] == ARRIVED) & (self.group[item[k]] == group)).reshape(-1, group)
            full = here.all(axis=1)
            if not full.any():
                continue
            latest = np.where(full, own[k].reshape(-1, group).max(axis=1), 0.0)
            who = self.all.reshape(-1, group)[full].reshape(-1)
            self._release(k, who, np.repeat(latest[full], group), item, state, at, free)


def _rate_tables(
    classes: list[Running], law: ContentionLaw, program: Program, kinds: list[int]
) -> tuple[FloatArray, FloatArray]:  # fmt: skip
    """Return the rates of the op on lane 0 and on lane 1, by their classes [C+1, C+1]; the last class is none."""
    count = len(classes)
    if len(program.order) < 2:
        return np.ones((count + 1, count + 1)), np.ones((count + 1, count + 1))
    tables = np.ones((count + 1, count + 1)), np.ones((count + 1, count + 1))
    on = [sorted({kinds[i] for i in order}) for order in program.order]
    for a in on[0]:
        for b in on[1]:
            tables[0][a, b], tables[1][a, b] = law.rates([classes[a], classes[b]])
    return tables
