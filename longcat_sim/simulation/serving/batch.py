"""The batch of one replica: its queue, its sequences, their KV blocks, and who is admitted or thrown out.

Source of the rules: vLLM v1 ``Scheduler.schedule``: running requests first, then waiting ones in order while token
budget, ``max_num_seqs`` and KV blocks last; the head of the queue blocks the others. A prompt is admitted when all of
its blocks fit (vLLM's ``scheduler_reserve_full_isl``) and they are taken at once.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

from longcat_sim.simulation.serving.drafts import Drafts
from longcat_sim.simulation.serving.kv_cache import MISS, KvCache, Match
from longcat_sim.simulation.serving.ranked import rank_share
from longcat_sim.simulation.serving.request import NEVER, Request

if TYPE_CHECKING:
    from longcat_sim.simulation.serving.cluster import Cluster
    from longcat_sim.simulation.serving.pools import PoolRun

BLOCKED = -1


class Batch:
    """``batch`` sequences decode and their contexts sum to ``total_context``; ``prefilling`` ones are under way."""

    def __init__(self, cluster: Cluster, pool: PoolRun) -> None:
        scheduler = pool.scheduler
        self.cluster = cluster
        self.pool = pool
        self.cache = KvCache(pool.kv_blocks, pool.make_tiers())
        self.is_priority = scheduler.policy == "priority"
        self.has_prefix_cache = scheduler.prefix_cache
        self.block_tokens = scheduler.block_tokens
        self.max_num_seqs = scheduler.max_num_seqs
        self.budget = scheduler.max_num_batched_tokens
        self.is_chunked = scheduler.chunked_prefill
        self.chunk_limit = scheduler.long_prefill_token_threshold or 1 << 62
        self.prefill_ranks = getattr(pool.step_times, "ranks", 1)
        self.rank_share = rank_share(self.budget, self.prefill_ranks) if self.is_chunked else self.budget
        if self.is_chunked:
            self.chunk_limit = min(self.chunk_limit, self.rank_share)  # a prompt is on one rank
        self.multi_step = scheduler.multi_step
        self.drafts: Drafts | None = pool.make_drafts()
        per_step = 1 + (self.drafts.num_tokens if self.drafts else 0)
        self.tokens_per_sequence = per_step
        # slots reserved beyond what n steps can emit, (d + 1) n: together up to (2 d + 1) n with d drafts.
        # Source: LongCat-Flash report, section 6.2.1: R_i = 4n - sum of accepted, in [2n, 3n] for d = 1
        self.reserve = (per_step - 1) * self.multi_step
        self.watermark = int(scheduler.watermark * pool.kv_blocks)
        # queue and batch
        self.waiting: Any = [] if self.is_priority else deque()
        self.queued_tokens = 0
        self.active_tokens = 0
        self.prefilling: list[Request] = []
        self.running: dict[Request, None] = {}
        self.finishing: list[tuple[int, int, Request]] = []
        self.loading: dict[Request, int] = {}
        """Requests whose blocks come from a slower tier, or are on their way to a decode replica; blocks held."""
        self.loading_blocks = 0
        self.resumed: list[int] = []
        # asynchronous scheduling: what the decision for the coming step could know
        self.is_async = scheduler.async_scheduling
        self.cutoff = 1 << 62
        """Requests queued later than this join one boundary later."""
        self.ghosts = 0
        """Sequences that ended in the last step, whose slots and blocks were not yet free at the decision."""
        self.ghost_blocks = 0
        self.has_preempted = False
        self.is_late = False
        self.batch = 0
        self.total_context = 0
        self.step = 0
        self.prefill_blocks = 0

    @property
    def num_running(self) -> int:
        """Sequences in the batch at the last boundary."""
        return self.batch + len(self.prefilling)

    @property
    def cache_use(self) -> float:
        """Share of the KV blocks that running requests hold; what is only cached could be had."""
        return 1 - (self._room() - self._decode_blocks(0)) / self.cache.capacity

    def _decode_blocks_bound(self, steps: int) -> int:
        """Return at least the blocks that the decoding sequences hold ``steps`` steps from now, in O(1)."""
        batch = self.batch
        slots = self.reserve + steps * self.tokens_per_sequence + self.block_tokens - 1
        return (self.total_context - batch + batch * slots) // self.block_tokens

    def _decode_blocks(self, steps: int) -> int:
        """Return the blocks that the decoding sequences hold ``steps`` steps from now, sequence by sequence."""
        size = self.block_tokens
        add = self.reserve + size - 1
        at = self.step + steps
        total = 0
        for request in self.running:
            if request.done_at != NEVER:
                total += (self._context_at(request, at) - 1 + add) // size
        return total

    def _context_at(self, request: Request, step: int) -> int:
        """Return the tokens in KV after ``step`` steps of this replica, the next one included."""
        cumulative = request.cumulative
        if cumulative is None:
            return request.context + step - request.start_step
        return request.context + int(cumulative[min(step - request.start_step, len(cumulative) - 1)])

    def contexts(self) -> list[int]:
        """Return the context of every decoding sequence."""
        return [self._context_at(r, self.step) for r in self.running if r.done_at != NEVER]

    def _room(self) -> int:
        """Return blocks left for decoding sequences by others (prefill, loads; shared runs counted once)."""
        cache = self.cache
        return cache.capacity - self.prefill_blocks - self.loading_blocks + cache.shared - cache.pinned_blocks

    def _fits(self, need: int, steps: int, keep: int = 0) -> bool:
        """Whether ``need`` blocks more than the running ones after ``steps`` steps are free or could be evicted."""
        room = self._room() - keep - need - self.ghost_blocks
        return self._decode_blocks_bound(steps) <= room or self._decode_blocks(steps) <= room

    def _evict(self, need: int, steps: int) -> None:
        """Evict what stands in the way of ``need`` blocks more than the running ones after ``steps`` steps."""
        cached = self.cache.lru_blocks
        if cached:
            room = self._room() - need - cached
            if self._decode_blocks_bound(steps) > room:
                over = self._decode_blocks(steps) - room
                if over > 0:
                    self.cache.evict(over)

    def _steps_that_fit(self, most: int) -> int:
        """Return the largest number of steps, ``multi_step`` at least, for which blocks last."""
        room = self._room()
        window = self.multi_step
        low, high = 1, most // window
        while low < high:
            middle = (low + high + 1) // 2
            if self._decode_blocks(middle * window) <= room:
                low = middle
            else:
                high = middle - 1
        return low * window

    def _make_room(self, now: int) -> None:
        """Give every decoding sequence the blocks of the next step; preempt the last ones where there are none."""
        steps = self.multi_step
        while self.batch and not self._fits(0, steps):
            self._preempt(self._victim(), now)
        if self.cache.lru_blocks:
            self._evict(0, steps)

    def _victim(self) -> Request:
        if self.is_priority:
            return max(self.running, key=lambda r: (r.priority, r.arrival, r.id))
        return next(reversed(self.running))

    def _preempt(self, request: Request, now: int) -> None:
        """Throw a running request back to the head of the queue; its tokens will be computed again."""
        self.has_preempted = True
        request.queued = now
        self._cache_own(request)
        if request.done_at != NEVER:
            request.last = now
        self._leave(request)
        request.preemptions += 1
        self.cluster.num_preemptions += 1
        request.reset()
        self.queued_tokens += request.prompt
        if self.is_priority:
            heappush(self.waiting, (request.priority, request.arrival, request.id, request))
        else:
            self.waiting.appendleft(request)

    def _leave(self, request: Request) -> None:
        """Take a running request out of the batch and give its blocks back."""
        del self.running[request]
        if request.done_at != NEVER:
            context = self._context_at(request, self.step)
            if request.cumulative is not None and self.drafts:
                self.drafts.remove(self.step, request.cumulative, self.step - request.start_step)
                steps = self.step - request.start_step
                self.cluster.num_drafted_steps += steps
                self.cluster.gaps.zero += context - request.context - steps
            self.total_context -= context
            self.batch -= 1
            request.generated += context - request.context
            request.done_at = NEVER
        else:
            self.prefilling.remove(request)
            self.prefill_blocks -= self._prompt_blocks(request)
        self.active_tokens -= request.prompt
        self._release(request)

    def _release(self, request: Request) -> None:
        """Give the blocks of a request back; what is cached of them stays until it is evicted."""
        self.cache.shared -= request.shared
        self.cache.unpin(request.node)
        request.node = None
        request.shared = 0

    def _prompt_blocks(self, request: Request) -> int:
        return (request.prompt + self.reserve + self.block_tokens - 1) // self.block_tokens

    def _fill(self, now: int, chunks: list[tuple[Request, int]]) -> None:
        """Pick prefill chunks: requests under way first, then waiting ones while budget, slots and blocks last."""
        budget = self.budget - self.batch * self.tokens_per_sequence
        limit = self.chunk_limit
        for request in self.prefilling:
            tokens = min(request.prompt - request.computed, budget, limit)
            if tokens <= 0:
                return
            budget -= tokens
            chunks.append((request, tokens))
        waiting = self.waiting
        if self.has_preempted:
            return  # as vLLM: what was just thrown out does not make room for others in the same step
        while waiting and budget > 0 and self.batch + len(self.prefilling) + self.ghosts < self.max_num_seqs:
            request = waiting[0][3] if self.is_priority else waiting[0]
            if self.is_async and request.queued > self.cutoff:
                self.is_late = True
                return
            tokens = self._admit(request, now, budget)
            if tokens == BLOCKED:
                self.is_blocked = True
                return
            if tokens:
                budget -= tokens
                chunks.append((request, tokens))

    def _admit(self, request: Request, now: int, budget: int) -> int:
        """Try to admit the head of the queue: tokens of its first chunk; 0: nothing to compute now; or ``BLOCKED``."""
        total = self._prompt_blocks(request)
        cache = self.cache
        if request.is_remote:  # it decodes at once: the slots of its next steps count too
            slots = request.prompt + 1 + self.reserve + self.multi_step * self.tokens_per_sequence
            total = (slots + self.block_tokens - 1) // self.block_tokens
            if not self._fits(total, self.multi_step, self.watermark):
                return BLOCKED
            self._evict(total, self.multi_step)
            self._pop(request, now)
            self.active_tokens += request.prompt
            self.running[request] = None
            self._join(request)
            self.resumed.append(request.last)
            return 0
        size = self.block_tokens
        loaded = request.load_done - request.hit_done
        match = MISS
        if loaded > 0:
            hit = request.load_done
        elif self.has_prefix_cache and request.chain:
            limit = (request.prompt - 1) // size
            match = cache.match(request.chain, limit)
            hit = match[0]
            if cache.tiers and hit < limit:
                more, where = cache.tier_blocks(request.chain, hit, limit)
                if more and self._fits(more + match[3], self.multi_step, self.watermark):
                    self._hold(request, match)
                    self._pop(request, now)
                    request.load_done = hit + more
                    self.loading[request] = hit + more
                    self.loading_blocks += hit + more
                    self._evict(0, self.multi_step)
                    self.cluster.load(self, request, where, now)  # type: ignore[arg-type]
                    return 0
        else:
            hit = 0
        tokens = min(request.prompt - hit * size, self.chunk_limit)  # as vLLM: the threshold cuts before the budget
        if tokens > budget:
            if not self.is_chunked:
                return BLOCKED
            tokens = budget
        if not self._fits(total - hit + match[3], self.multi_step, self.watermark):
            return BLOCKED
        if loaded > 0:
            self.loading_blocks -= hit
        else:
            self._hold(request, match)
        self._pop(request, now)
        self.active_tokens += request.prompt
        request.computed = hit * size
        if request.cached == NEVER:
            request.cached = request.computed
        self.prefill_blocks += total
        self.prefilling.append(request)
        self.running[request] = None
        self._evict(0, self.multi_step)
        return tokens

    def _drop_loaded(self) -> bool:
        """Give up blocks that waiting requests had brought back from a slower tier: they stand in the head's way."""
        waiting = [item[3] for item in self.waiting] if self.is_priority else list(self.waiting)
        holders = [request for request in waiting[1:] if request.load_done]
        for request in holders:
            self.loading_blocks -= request.load_done
            self._release(request)
            request.reset()
        self.is_blocked = False
        return bool(holders)

    def _hold(self, request: Request, match: Match) -> None:
        """Pin what is cached of a prompt, and begin its chain there."""
        request.node = self.cache.pin(match)
        request.shared = request.hit_done = match[0]
        self.cache.shared += match[0]
        left = match[0]
        for keys, unit in request.chain:
            if left < len(keys) * unit:
                request.inserted = left // unit
                return
            left -= len(keys) * unit
            request.segment += 1

    def _pop(self, request: Request, now: int) -> None:
        """Take the head out of the queue."""
        if self.is_priority:
            heappop(self.waiting)
        else:
            self.waiting.popleft()
        self.queued_tokens -= request.prompt
        if request.scheduled == NEVER:
            request.scheduled = now

    def _join(self, request: Request) -> None:
        """Let a prefilled request decode from the next step on."""
        context = request.prompt + 1
        request.context = context
        request.start_step = self.step
        left = request.output - request.generated
        if self.drafts is None:
            request.done_at = self.step + left
        else:
            request.cumulative = self.drafts.cumulative(request.id, request.generated, left)
            request.done_at = self.step + len(request.cumulative) - 1
            self.drafts.add(self.step, request.cumulative)
        self.batch += 1
        self.total_context += context
        heappush(self.finishing, (request.done_at, request.id, request))

    def _insert(self, request: Request) -> None:
        """Cache the runs of the chain that the scheduled chunks have completed."""
        done = request.computed // self.block_tokens
        chain = request.chain
        while request.segment < len(chain):
            keys, unit = chain[request.segment]
            base = sum(len(k) * n for k, n in chain[: request.segment]) if request.segment else 0
            start = request.inserted
            stop = min((done - base) // unit, len(keys))
            if stop > start:
                fresh = keys[start:stop]
                request.node, shared = self.cache.insert(fresh, unit, request.node)
                request.shared += shared
                self.cache.shared += shared
                request.inserted = stop
            if stop < len(keys):
                return
            request.segment += 1
            request.inserted = 0

    def _extend(self, request: Request, in_kv: int) -> None:
        """Lengthen the last run of a chain by the full blocks of the answer: what a next turn will find."""
        base = sum(len(keys) * unit for keys, unit in request.chain[:-1])
        keys, _ = request.chain[-1]
        end = in_kv // self.block_tokens - base
        if end > len(keys) and request.segment == len(request.chain):
            assert isinstance(keys, range)
            longer = range(keys.start, keys.start + end)
            request.node, shared = self.cache.insert(longer[len(keys) :], 1, request.node)
            request.shared += shared
            self.cache.shared += shared
            request.chain = [*request.chain[:-1], (longer, 1)]

    def _cache_own(self, request: Request) -> None:
        """Leave the blocks of a preempted request in the prefix cache, where it may find them again."""
        if not self.has_prefix_cache or request.segment < len(request.chain):
            return
        in_kv = request.computed
        if request.done_at != NEVER:
            in_kv = self._context_at(request, self.step) - 1
        if not request.chain or type(request.chain[-1][0]) is not range:
            first = -(request.id + 1) << 32
            request.chain = [*request.chain, (range(first, first), 1)]
            request.segment += 1
        self._extend(request, in_kv)

    def _grow(self, steps: int, total_context: int) -> None:
        """Move the sums on by ``steps`` decode steps, to ``_total_after`` of them."""
        self.total_context = total_context
        self.step += steps

    def _total_after(self, steps: int) -> int:
        """Return the summed contexts after ``steps`` more decode steps of this batch."""
        grown = self.batch * steps if self.drafts is None else self.drafts.grown(self.step, steps)
        return self.total_context + grown

    def check(self) -> None:
        """Assert what must hold at a boundary: every sum equals what the sequences say."""
        decoding = [r for r in self.running if r.done_at != NEVER]
        assert len(decoding) == self.batch
        assert len(self.running) == self.num_running
        assert sum(self._context_at(r, self.step) for r in decoding) == self.total_context
        assert sum(self._prompt_blocks(r) for r in self.prefilling) == self.prefill_blocks
        waiting = [item[3] for item in self.waiting] if self.is_priority else self.waiting
        assert sum(r.shared for r in [*self.running, *self.loading, *waiting]) == self.cache.shared
        self.cache.check(self._decode_blocks(0) + self.prefill_blocks + self.loading_blocks)
