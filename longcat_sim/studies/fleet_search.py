"""``FleetSearch``: which screened fleets are simulated, and the best of them that keeps the level."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from longcat_sim.capacity.answer import Survivor
from longcat_sim.capacity.candidates import search_of
from longcat_sim.capacity.screen import objective_of
from longcat_sim.capacity.screen_serving import ScreenedFleets
from longcat_sim.capacity.sweep import Progress, sweep
from longcat_sim.specs.scenario import Scenario
from longcat_sim.studies.fleet_figures import assess_fleet, could_meet, doubt, is_met, lasting, simulate_fleet

MOST_ASSESSED = 8
"""Leading fleets whose probability is found before the search gives up."""
MORE, MOST_SIMULATED = 4, 60
"""Fleets simulated at once beyond the survivors, while a better one than the best may keep the level; and in all.
Assumed."""
Parts = tuple[str, tuple[int, ...]]
"""Deployments, and the replicas of each."""
PREFILL = "serve.prefill."
"""Where the changes of a prefill pool are."""


@dataclass
class FleetSearch:
    """A branch and bound over fleets. A short run tells which miss the level beyond doubt; the best of the others is
    judged in a long run, then over all draws, and only when nothing better is left to simulate.

    Ruled out without a run: what has the deployments of a fleet that missed, and no more replicas of any; and what has
    such a prefill pool, where first tokens were late: they leave it whatever decodes them.
    """

    scenario: Scenario
    screened: ScreenedFleets
    ranked: Sequence[int]
    """Fleets that passed the screen, the best first."""
    executor: Executor | None = None
    store: str | Path | None = None
    progress: Progress | None = None
    rows: list[Survivor] = field(default_factory=list)
    lasted: set[int] = field(default_factory=set)
    """Fleets that have had a long run."""

    def __post_init__(self) -> None:
        objective, sense = objective_of(self.scenario)
        self.values = self.screened.columns[objective] * sense
        assert self.scenario.serve is not None
        pools = ("", PREFILL) if self.scenario.serve.is_disaggregated else ("",)
        self._parts = {i: {pool: _parts(self.screened.changes[i], pool) for pool in pools} for i in self.ranked}

    def run(self, chosen: Sequence[int]) -> Survivor | None:
        """Return the best fleet that keeps the level with the probability asked for, None where none was found;
        ``chosen`` are simulated first."""
        while True:
            self.simulate(chosen)
            possible = set(self.possible(row.at for row in self.rows))
            leading = sorted((row for row in self.rows if row.at in possible), key=self._value)
            best = leading[0] if leading else None
            open_ = self.better_than(best)
            room = max(0, min(MORE, MOST_SIMULATED - len(self.rows)))
            # evenly over what is left: one that misses rules out cheaper ones, one that may keep the level all dearer
            chosen = [open_[len(open_) * (at + 1) // room - 1] for at in range(room)] if len(open_) > room else open_
            if chosen:
                continue
            if best is None:
                return None
            if best.at not in self.lasted:
                self._check_for_long(leading)
            elif "probability" in (best.figures or {}):
                return best
            elif sum("probability" in (row.figures or {}) for row in self.rows) == MOST_ASSESSED:
                return None
            else:
                fleet = self.scenario.what_if(best.screened["changes"])
                best.figures = assess_fleet(fleet, self.executor, known=best.figures)

    def simulate(self, chosen: Sequence[int]) -> None:
        """Give fleets a short run each."""
        cases = [self.scenario.what_if(self.screened.changes[i]) for i in chosen]
        points = sweep(cases, simulate_fleet, self.executor, store=self.store, progress=self.progress) if cases else []
        self.rows += [
            Survivor(i, self.screened.row(i), p.figures, p.faults) for i, p in zip(chosen, points, strict=True)
        ]

    def _value(self, row: Survivor) -> float:
        """Return what the best fleet has least of. The bill is the screen's: fleets are simulated over traffic of
        different length, whose tokens differ by a few per cent."""
        objective, sense = objective_of(self.scenario)
        return float(self.values[row.at]) if is_exact(objective) else row.figure(objective) * sense

    def _check_for_long(self, leading: Sequence[Survivor]) -> None:
        """Give two fleets the service of a long run: the best that kept the level in a short one, and the next better
        one, a near miss: most near misses miss, and then smaller ones do, too. Without an executor only the latter."""
        kept = (at for at, row in enumerate(leading) if is_met(row.figures or {}, self.scenario))
        first = next(kept, len(leading))
        rows = [row for row in leading[max(0, first - 1) : first + 1] if row.at not in self.lasted]
        self.run_long(rows[:1] if self.executor is None else rows)

    def run_long(self, rows: Sequence[Survivor]) -> None:
        """Give fleets the service of a long run."""
        fleets = [self.scenario.what_if(row.screened["changes"]) for row in rows]
        run = self.executor.map if self.executor is not None else map
        for row, figures in zip(rows, run(lasting, fleets, [row.figures or {} for row in rows]), strict=True):
            row.figures = figures
            self.lasted.add(row.at)

    def has_failed(self, row: Survivor) -> bool:
        """Whether a fleet missed the level beyond doubt, in a long run or over the draws; or cannot be simulated."""
        if row.figures is None:
            return True
        if row.at not in self.lasted:
            return not could_meet(row.figures, self.scenario)
        chance = row.figures.get("probability")
        is_unlikely = chance is not None and chance < search_of(self.scenario).probability
        return is_unlikely or not is_met(row.figures, self.scenario)

    def better_than(self, best: Survivor | None) -> list[int]:
        """Return the fleets that are screened as better than ``best`` and neither simulated nor ruled out."""
        done, least = {row.at for row in self.rows}, np.inf
        if best is not None:
            least = self.values[best.at] - 1e-9 * abs(self.values[best.at])
        return self.possible(i for i in takewhile(lambda i: self.values[i] < least, self.ranked) if i not in done)

    def possible(self, fleets: Iterable[int]) -> list[int]:
        """Return those that have not failed and are not ruled out."""
        failed = {row.at for row in self.rows if self.has_failed(row)}
        kept = self.lasted - failed
        missed = [(pool, self._parts[row.at][pool]) for row in self.rows for pool in self._missed_by(row)]
        return [
            i for i in fleets
            if i in kept
            or (i not in failed and not any(_is_no_larger(self._parts[i][pool], parts) for pool, parts in missed))
        ]  # fmt: skip

    def _missed_by(self, row: Survivor) -> list[str]:
        """Return the parts of a fleet that make it miss the level: all pools together, and the prefill pool alone."""
        figures = row.figures
        if figures is None or not self.has_failed(row):
            return []
        unsure = 0.0 if row.at in self.lasted else doubt(figures)
        is_late = figures["missed_ttft"] - unsure > 1 - search_of(self.scenario).attainment
        return [pool for pool in self._parts[row.at] if is_late or not pool]


def is_exact(objective: str) -> bool:
    """Whether the screen knows a fleet's objective as well as a simulation does: GPUs and their price."""
    return objective.startswith("usd") or objective == "num_gpus"


def _parts(changes: Mapping[str, Any], pool: str = "") -> Parts:
    """Return a fleet's deployments, or one pool's, and the replicas of each."""
    mine = {path: value for path, value in changes.items() if path.startswith(pool)}
    counts = {path: value for path, value in mine.items() if path.endswith("replicas")}
    rest = {path: value for path, value in mine.items() if path not in counts}
    return repr(sorted(rest.items(), key=lambda item: item[0])), tuple(counts[path] for path in sorted(counts))


def _is_no_larger(one: Parts, other: Parts) -> bool:
    """Whether a fleet is of the same deployments as another, with no more replicas of any."""
    return one[0] == other[0] and all(a <= b for a, b in zip(one[1], other[1], strict=True))
