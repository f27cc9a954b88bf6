"""KV blocks of one replica: what running requests hold, and the prefix cache (runs of blocks, LRU, slower tiers).

A prompt is a chain of runs ``(key, blocks)``; equal keys hold equal tokens after equal chains. A cached run may have
lost blocks at its end: a look-up stops there. Runs that a running request uses are pinned; the others wait in LRU
order for eviction, the end of a chain first (vLLM v1 frees the blocks of a request in reverse).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

Chain = Sequence[tuple[int, int]]


class Run:
    """Consecutive cached blocks under one key."""

    __slots__ = ("blocks", "key", "refs")

    def __init__(self, key: int, blocks: int) -> None:
        self.key = key
        self.blocks = blocks
        self.refs = 0


@dataclass
class Tier:
    """A slower store of evicted runs; transfers take turns."""

    name: str
    capacity_blocks: int
    ns_per_block: float
    latency_ns: int
    runs: OrderedDict[int, int] = field(default_factory=OrderedDict)
    used_blocks: int = 0
    free_at: int = 0
    loaded_blocks: int = 0

    def put(self, key: int, blocks: int) -> list[tuple[int, int]]:
        """Store a run, or lengthen it; return the runs that fell out."""
        if blocks > self.capacity_blocks:
            return [(key, blocks)]
        old = self.runs.pop(key, 0)
        self.used_blocks += max(old, blocks) - old
        self.runs[key] = max(old, blocks)
        fallen = []
        while self.used_blocks > self.capacity_blocks:
            key, blocks = self.runs.popitem(last=False)
            self.used_blocks -= blocks
            fallen.append((key, blocks))
        return fallen


class KvCache:
    """Accounts for ``capacity`` blocks: held = blocks of running requests, each shared run once.

    ``shared`` is the sum over requests of their blocks that lie in pinned runs, so that private blocks are total
    minus ``shared``.
    """

    __slots__ = ("capacity", "evicted", "lru", "lru_blocks", "pinned_blocks", "runs", "shared", "tiers")

    def __init__(self, capacity: int, tiers: Sequence[Tier] = ()) -> None:
        self.capacity = capacity
        self.runs: dict[int, Run] = {}
        self.lru: OrderedDict[int, Run] = OrderedDict()
        self.lru_blocks = 0
        self.pinned_blocks = 0
        self.shared = 0
        self.evicted = 0
        self.tiers = list(tiers)

    def hit_blocks(self, chain: Chain) -> int:
        """Return how many leading blocks of a chain are cached."""
        runs = self.runs
        hit = 0
        for key, blocks in chain:
            run = runs.get(key)
            if run is None:
                break
            have = run.blocks
            if have < blocks:
                hit += have
                break
            hit += blocks
        return hit

    def match(self, chain: Chain, limit: int) -> tuple[int, list[tuple[Run, int]], int]:
        """Return (hit blocks, the runs used with their blocks, blocks of them that would leave the LRU list)."""
        runs = self.runs
        hit = 0
        from_lru = 0
        used: list[tuple[Run, int]] = []
        for key, blocks in chain:
            run = runs.get(key)
            if run is None:
                break
            take = run.blocks
            if take > blocks:
                take = blocks
            if hit + take > limit:
                take = limit - hit
            if take <= 0:
                break
            hit += take
            used.append((run, take))
            if not run.refs:
                from_lru += run.blocks
            if take < blocks:
                break
        return hit, used, from_lru

    def tier_blocks(self, chain: Chain, start: int, limit: int) -> tuple[int, list[tuple[Tier, int]]]:
        """Return (blocks after ``start`` found in slower tiers, where)."""
        found: list[tuple[Tier, int]] = []
        position = 0
        at = start
        for key, blocks in chain:
            end = position + blocks
            if end <= at:
                position = end
                continue
            best = max(self.tiers, key=lambda tier: tier.runs.get(key, 0))
            reach = min(position + best.runs.get(key, 0), end, limit)
            if reach <= at:
                break
            found.append((best, reach - at))
            at = reach
            if reach < end:
                break
            position = end
        return at - start, found

    def pin(self, used: list[tuple[Run, int]]) -> None:
        """Take the runs of a match into use."""
        for run, take in used:
            if not run.refs:
                del self.lru[run.key]
                self.lru_blocks -= run.blocks
                self.pinned_blocks += run.blocks
            run.refs += 1
            self.shared += take

    def insert(self, key: int, blocks: int, pins: list[tuple[Run, int]]) -> None:
        """Cache ``blocks`` freshly computed private blocks of a request under ``key``, pinned by that request.

        A run that another request has already cached stays private to this one (a duplicate), unless it is the
        request's own last run, which grows.
        """
        run = self.runs.get(key)
        if run is None:
            run = self.runs[key] = Run(key, blocks)
            run.refs = 1
            self.pinned_blocks += blocks
            self.shared += blocks
            pins.append((run, blocks))
        elif run.blocks < blocks and pins and pins[-1][0] is run:
            self.pinned_blocks += blocks - run.blocks
            self.shared += blocks - pins[-1][1]
            run.blocks = blocks
            pins[-1] = (run, blocks)

    def unpin(self, pins: list[tuple[Run, int]]) -> None:
        """Give the runs of a request back, the end of the chain first in LRU order."""
        for run, take in reversed(pins):
            self.shared -= take
            run.refs -= 1
            if not run.refs:
                self.pinned_blocks -= run.blocks
                if run.blocks:
                    self.lru[run.key] = run
                    self.lru_blocks += run.blocks
                else:
                    del self.runs[run.key]

    def evict(self, count: int) -> None:
        """Drop ``count`` blocks of the least recently used runs, each from its end."""
        assert count <= self.lru_blocks
        self.evicted += count
        lru = self.lru
        self.lru_blocks -= count
        while count:
            key = next(iter(lru))
            run = lru[key]
            if self.tiers:
                fallen = [(key, run.blocks)]
                for tier in self.tiers:
                    fallen = [late for k, n in fallen for late in tier.put(k, n)]
            if run.blocks > count:
                run.blocks -= count
                return
            count -= run.blocks
            del lru[key]
            del self.runs[key]

    def clear(self) -> None:
        """Forget everything on the device (the replica was lost); tiers stay."""
        self.runs.clear()
        self.lru.clear()
        self.lru_blocks = self.pinned_blocks = self.shared = 0

    def check(self, held_total: int) -> None:
        """Assert the accounts: a fault here is ours."""
        assert self.lru_blocks == sum(run.blocks for run in self.lru.values())
        assert self.pinned_blocks == sum(run.blocks for run in self.runs.values() if run.refs)
        assert held_total - self.shared + self.pinned_blocks + self.lru_blocks <= self.capacity
