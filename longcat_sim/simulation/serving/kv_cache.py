"""KV blocks of one replica: what running requests hold, and the prefix cache (a radix tree of runs, LRU, tiers).

A prompt's chain is a list of segments, each a sequence of keys (a list of hashes, or a ``range``) and the blocks that
one key stands for. Equal keys mean equal tokens after equal keys. A run is a node of the tree: consecutive keys with
one parent, so that look-up, pinning and eviction cost time per run, not per block. Runs on the path of a running
request are pinned; the others wait in LRU order, the end of a chain before its beginning (vLLM v1 frees the blocks of
a request in reverse).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

Keys = Sequence[int]
Chain = Sequence[tuple[Keys, int]]
"""(keys, blocks per key)"""


class Run:
    """Consecutive cached keys of one chain; ``refs`` requests need it or something after it."""

    __slots__ = ("keys", "parent", "refs", "unit")

    def __init__(self, keys: Keys, unit: int, parent: Run | None, refs: int) -> None:
        self.keys = keys
        self.unit = unit
        self.parent = parent
        self.refs = refs


def common(mine: Keys, start: int, theirs: Keys) -> int:
    """Return how many keys of ``theirs`` follow one another in ``mine`` from ``start`` on."""
    n = len(theirs)
    part = mine[start : start + n]
    if part == theirs:
        return n
    most = len(part)
    if type(part) is range and type(theirs) is range:
        return min(most, n) if part.start == theirs.start else 0
    at = 0
    while at < most and part[at] == theirs[at]:
        at += 1
    return at


@dataclass
class Tier:
    """A slower store of evicted keys, one by one, so that it does not matter how many leave at once; LRU."""

    name: str
    capacity_blocks: int
    ns_per_block: float
    latency_ns: int
    keys: OrderedDict[int, int] = field(default_factory=OrderedDict)
    """key -> blocks"""
    used_blocks: int = 0
    free_at: int = 0
    loaded_blocks: int = 0

    def put(self, key: int, blocks: int) -> list[tuple[int, int]]:
        """Store a key; return what fell out."""
        if blocks > self.capacity_blocks:
            return [(key, blocks)]
        self.used_blocks += blocks - self.keys.pop(key, 0)
        self.keys[key] = blocks
        fallen = []
        while self.used_blocks > self.capacity_blocks:
            oldest = self.keys.popitem(last=False)
            self.used_blocks -= oldest[1]
            fallen.append(oldest)
        return fallen


Match = tuple[int, Run | None, int, int]
"""(hit blocks, deepest run, keys of it that match, blocks that would leave the LRU list)"""
MISS: Match = (0, None, 0, 0)


class KvCache:
    """Accounts for ``capacity`` blocks. ``shared`` sums, over requests, their blocks that lie in pinned runs, so that
    blocks in use = what requests hold - ``shared`` + ``pinned_blocks``.
    """

    __slots__ = ("capacity", "evicted", "lru", "lru_blocks", "pinned_blocks", "runs", "shared", "tiers")

    def __init__(self, capacity: int, tiers: Sequence[Tier] = ()) -> None:
        self.capacity = capacity
        self.runs: dict[int, Run] = {}
        """By first key."""
        self.lru: OrderedDict[Run, None] = OrderedDict()
        self.lru_blocks = 0
        self.pinned_blocks = 0
        self.shared = 0
        self.evicted = 0
        self.tiers = list(tiers)

    def match(self, chain: Chain, limit: int) -> Match:
        """Return what is cached of a chain, ``limit`` blocks at most; changes nothing."""
        runs = self.runs
        hit = from_lru = 0
        deepest: Run | None = None
        matched = 0
        for keys, unit in chain:
            at = 0
            end = len(keys)
            while at < end:
                run = runs.get(keys[at])
                if run is None:
                    return hit, deepest, matched, from_lru
                theirs = run.keys
                n = common(keys, at, theirs)
                if hit + n * unit > limit:
                    n = (limit - hit) // unit
                    if n <= 0:
                        return hit, deepest, matched, from_lru
                hit += n * unit
                deepest, matched = run, n
                if not run.refs:
                    from_lru += n * unit
                if n < len(theirs):
                    return hit, deepest, matched, from_lru
                at += n
        return hit, deepest, matched, from_lru

    def tier_blocks(self, chain: Chain, start: int, limit: int) -> tuple[int, list[tuple[Tier, int]]]:
        """Return (blocks after the first ``start`` that slower tiers hold, where)."""
        found: list[tuple[Tier, int]] = []
        position = 0
        at = start
        for keys, unit in chain:
            end = position + len(keys) * unit
            while at < end:
                key = keys[(at - position) // unit]
                best = next((tier for tier in self.tiers if key in tier.keys), None)
                if best is None or at + unit > limit:
                    return at - start, found
                if found and found[-1][0] is best:
                    found[-1] = (best, found[-1][1] + unit)
                else:
                    found.append((best, unit))
                at += unit
            position = end
        return at - start, found

    def _split(self, run: Run, count: int) -> Run:
        """Make the first ``count`` keys of a run a run of their own, its parent; return that."""
        head = Run(run.keys[:count], run.unit, run.parent, run.refs)
        run.keys = run.keys[count:]
        run.parent = head
        self.runs[head.keys[0]] = head
        self.runs[run.keys[0]] = run
        if not run.refs:
            self.lru[head] = None
        return head

    def pin(self, match: Match) -> Run | None:
        """Take the path of a match into use; return its last run."""
        _, run, matched, _ = match
        if run is None:
            return None
        if matched < len(run.keys):
            run = self._split(run, matched)
        node: Run | None = run
        while node is not None:
            if not node.refs:
                del self.lru[node]
                blocks = len(node.keys) * node.unit
                self.lru_blocks -= blocks
                self.pinned_blocks += blocks
            node.refs += 1
            node = node.parent
        return run

    def insert(self, keys: Keys, unit: int, node: Run | None) -> tuple[Run | None, int]:
        """Cache freshly computed keys after the pinned ``node``: (the new last run, blocks that became shared).

        Keys that another request has cached in the meantime are pinned there and stay held twice (duplicates).
        """
        at = shared = 0
        while at < len(keys):
            run = self.runs.get(keys[at])
            if run is None:
                rest = keys[at:] if at else keys
                end = len(rest)
                node = Run(rest, unit, node, 1)
                self.runs[rest[0]] = node
                self.pinned_blocks += end * unit
                return node, shared + end * unit
            n = common(keys, at, run.keys)
            if n < len(run.keys):
                run = self._split(run, n)
            if not run.refs:
                del self.lru[run]
                self.lru_blocks -= n * unit
                self.pinned_blocks += n * unit
            run.refs += 1
            node = run
            at += n
        return node, shared

    def unpin(self, node: Run | None) -> None:
        """Let go of a path: the end of the chain first in LRU order."""
        while node is not None:
            node.refs -= 1
            if not node.refs:
                blocks = len(node.keys) * node.unit
                self.pinned_blocks -= blocks
                self.lru_blocks += blocks
                self.lru[node] = None
            node = node.parent

    def evict(self, count: int) -> None:
        """Drop at least ``count`` blocks of the least recently used runs, whole keys, each run from its end."""
        assert count <= self.lru_blocks
        lru = self.lru
        while count > 0:
            run = next(iter(lru))
            keys, unit = run.keys, run.unit
            drop = -(-count // unit)
            if drop < len(keys):
                run.keys = keys[:-drop]
            else:
                drop = len(keys)
                del lru[run]
                del self.runs[keys[0]]
            blocks = drop * unit
            count -= blocks
            self.lru_blocks -= blocks
            self.evicted += blocks
            if self.tiers:
                for key in reversed(keys[-drop:]):
                    fallen = [(key, unit)]
                    for tier in self.tiers:
                        fallen = [late for k, n in fallen for late in tier.put(k, n)]

    def clear(self) -> None:
        """Forget everything on the device (the replica was lost); tiers stay."""
        self.runs.clear()
        self.lru.clear()
        self.lru_blocks = self.pinned_blocks = self.shared = 0

    def check(self, held: int) -> None:
        """Assert the accounts: a fault here is ours."""
        assert self.lru_blocks == sum(len(run.keys) * run.unit for run in self.lru)
        assert self.pinned_blocks == sum(len(run.keys) * run.unit for run in self.runs.values() if run.refs)
        assert all(run.refs == 0 for run in self.lru)
        assert all(r.refs or r in self.lru for r in self.runs.values())
        assert held - self.shared + self.pinned_blocks + self.lru_blocks <= self.capacity
