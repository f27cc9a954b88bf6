"""How vLLM's front end sees its data-parallel ranks: by counts that a coordinator publishes a few times a second.

Ranks tell a coordinator of their waiting and running requests after a step that changed them; it publishes all of them
together, at most every 100 ms. In between, the front end counts what it sent itself as waiting. So it chooses by counts
that are a few steps old.

Source: vLLM ``v1/engine/coordinator.py`` (intervals; counts of the last whole step), ``core_client.py`` (score),
``core.py`` (when ranks report); pull requests 41626 (reports before a step too, merged 2026-05-14), 47420 (ties take
turns, 2026-07-06) and 49204 (waiting requests weigh as much as running ones, more in a full cache, 2026-07-22).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MS = 1_000_000
INTERVAL, IDLE_INTERVAL, COLLECTION = 100 * MS, 5000 * MS, 50 * MS
"""Nanoseconds between publications of counts that changed, that did not, and for the reports of one step to arrive."""


@dataclass(frozen=True)
class BalancerRules:
    """What differs between vLLM's versions; the defaults are those before 0.22."""

    waiting_weight: int = 4
    counts_arrivals: bool = False
    """Whether ranks report what arrived during their step."""
    ties_take_turns: bool = False

    @classmethod
    def of(cls, version: Sequence[int]) -> BalancerRules:
        """Return the rules of a version (two numbers), by the dates of releases and of the pull requests above.

        Of vLLM 0.26 and later the weight of waiting requests in a KV cache that is over half full is left out.
        """
        version = tuple(version)
        return cls(1 if version >= (0, 26) else 4, version >= (0, 22), version >= (0, 25))


class PublishedLoads:
    """Counts on their way from the ranks to the front end. Times are nanoseconds and do not fall."""

    def __init__(self, ranks: int, rules: BalancerRules) -> None:
        self.rules = rules
        self.reported = [(0, 0)] * ranks
        """(waiting, running) of each rank, as the coordinator knows them."""
        self.seen = list(self.reported)
        """The same, as the front end does."""
        self.last_step: list[tuple[int, int]] | None = None
        """Counts of the last whole step, where reports of a newer one came before they were published."""
        self.is_changed = False
        self.newest_step = -1
        self.last_report = 0
        self.last_publication = -IDLE_INTERVAL
        self.turn = 0

    def report(self, now: int, rank: int, waiting: int, running: int) -> None:
        """Take the counts of a rank at the end of the step that ends ``now``; unchanged ones are not sent."""
        if self.reported[rank] == (waiting, running):
            return
        self._publish(now - 1)
        if now > self.newest_step:
            if self.is_changed:
                self.last_step = list(self.reported)
            self.newest_step = now
        self.reported[rank] = (waiting, running)
        self.is_changed = True
        self.last_report = now

    def choose(self, now: int, ranks: Sequence[int]) -> int:
        """Return which of ``ranks`` (in order) a request goes to that arrives ``now``, as a place in ``ranks``."""
        self._publish(now)
        weight = self.rules.waiting_weight
        order = [(place + self.turn) % len(ranks) for place in range(len(ranks))]
        place = min(order, key=lambda at: weight * self.seen[ranks[at]][0] + self.seen[ranks[at]][1])
        waiting, running = self.seen[ranks[place]]
        self.seen[ranks[place]] = (waiting + 1, running)
        if self.rules.ties_take_turns:
            self.turn = (self.turn + 1) % len(ranks)
        return place

    def _publish(self, now: int) -> None:
        """Let the front end see what the coordinator published up to ``now``."""
        while True:
            wait = INTERVAL if self.is_changed else IDLE_INTERVAL
            collects = COLLECTION if self.last_step is None else 0
            due = max(self.last_report + collects, self.last_publication + wait)
            if due > now:
                return
            if self.last_step is None:
                self.seen, self.is_changed = list(self.reported), False
            else:
                self.seen, self.last_step = self.last_step, None
            self.last_publication = self.last_report = due
