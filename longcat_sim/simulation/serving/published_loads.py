"""How vLLM's front end sees its data-parallel ranks: by counts that a coordinator publishes a few times a second.

Ranks tell a coordinator of their waiting and running requests after a step that changed them; it publishes all of them
together, at most every 100 ms. In between, the front end counts what it sent itself as waiting. So it chooses by counts
that are a few steps old.

Source: vLLM ``v1/engine/coordinator.py`` (intervals; counts of the last whole step), ``core_client.py`` (score),
``core.py`` (when ranks report); pull requests 41626 (ranks report before a step too, merged 2026-05-14), 47420 (ties
take turns, 2026-07-06) and 49204 (what the front end has in flight bounds the load from below, and waiting requests
weigh more only where the KV cache is over half full, 2026-07-22).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

MS = 1_000_000
INTERVAL, IDLE_INTERVAL, COLLECTION = 100 * MS, 5000 * MS, 50 * MS
"""Nanoseconds between publications of counts that changed, that did not, and for the reports of one step to arrive."""
WAITING_WEIGHT = 4
"""Running requests that a waiting one counts as, before vLLM 0.26."""
FULL_CACHE_WEIGHT, FULL_CACHE = 6.0, 0.5
"""Since then: what a waiting request adds per share of the cache that is used beyond this one."""


@dataclass(frozen=True)
class BalancerRules:
    """What differs between vLLM's versions; the defaults are those before 0.22."""

    counts_arrivals: bool = False
    """Whether ranks also report before a step, with what arrived during the last one."""
    ties_take_turns: bool = False
    counts_in_flight: bool = False
    """Whether the front end counts what it sent and has not got back."""

    @classmethod
    def of(cls, version: Sequence[int]) -> BalancerRules:
        """Return the rules of a version (two numbers), by the dates of releases and of the pull requests above."""
        version = tuple(version)
        return cls(version >= (0, 22), version >= (0, 25), version >= (0, 26))


class Load(NamedTuple):
    """What a rank reports."""

    waiting: int = 0
    running: int = 0
    cache_use: float = 0.0


class PublishedLoads:
    """Loads on their way from the ranks to the front end. Times are nanoseconds and do not fall."""

    def __init__(self, ranks: int, rules: BalancerRules) -> None:
        self.rules = rules
        self.reported = [Load()] * ranks
        """As the coordinator knows them."""
        self.seen = list(self.reported)
        """As the front end does."""
        self.in_flight = [0] * ranks
        self.last_step: list[Load] | None = None
        """Loads of the last whole step, where reports of a newer one came before they were published."""
        self.is_changed = False
        self.newest_step = -1
        self.last_report = 0
        self.last_publication = -IDLE_INTERVAL
        self.turn = 0

    def report(self, now: int, step: int, rank: int, load: Load) -> None:
        """Take the load of a rank at the end of a step, or before it; unchanged counts are not sent."""
        if self.reported[rank][:2] == load[:2]:
            return
        self._publish(now - 1)
        if step > self.newest_step:
            if self.is_changed:
                self.last_step = list(self.reported)
            self.newest_step = step
        self.reported[rank] = load
        self.is_changed = True
        self.last_report = now

    def choose(self, now: int) -> int:
        """Return the rank that a request which arrives ``now`` goes to."""
        self._publish(now)
        ranks = len(self.seen)
        rank = min(((place + self.turn) % ranks for place in range(ranks)), key=self._score)
        load = self.seen[rank]
        self.seen[rank] = load._replace(waiting=load.waiting + 1)
        self.in_flight[rank] += 1
        if self.rules.ties_take_turns:
            self.turn = (self.turn + 1) % ranks
        return rank

    def finish(self, rank: int) -> None:
        """Take note that the front end has got all of a request's answer."""
        self.in_flight[rank] -= 1

    def _score(self, rank: int) -> float:
        load = self.seen[rank]
        if not self.rules.counts_in_flight:
            return WAITING_WEIGHT * load.waiting + load.running
        pressure = FULL_CACHE_WEIGHT * max(0.0, load.cache_use - FULL_CACHE)
        return max(self.in_flight[rank], load.waiting + load.running) + load.waiting * pressure

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
