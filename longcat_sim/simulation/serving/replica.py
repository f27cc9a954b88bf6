"""One replica: continuous batching as vLLM v1 does it, advanced from one change of batch composition to the next.

A *boundary* is the end of a step. What can change the batch is decided only there: ``compose`` picks the next step
(a mixed one when something is to be prefilled) or a run of decode steps up to the next known change. A run is cut
short at the first boundary at or after whatever comes from outside (``poke``). With ``step_by_step`` every step is an
event of its own and every sequence is counted on its own: the oracle of the fast path.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from heapq import heappop, heappush
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np

from longcat_sim.simulation.serving.batch import Batch
from longcat_sim.simulation.serving.clock import Call
from longcat_sim.simulation.serving.request import NEVER, Request
from longcat_sim.simulation.serving.step_times import steps_outside

if TYPE_CHECKING:
    from longcat_sim.simulation.serving.cluster import Cluster
    from longcat_sim.simulation.serving.pools import PoolRun

IDLE, DECODE, MIXED = 0, 1, 2


class Replica(Batch):
    """A batch on the clock: steps start, end, and may be cut short."""

    def __init__(self, cluster: Cluster, pool: PoolRun, index: int, order: int) -> None:
        super().__init__(cluster, pool)
        self.index = index
        self.order = order
        self.times: Any = pool.step_times
        self.is_step_by_step = cluster.is_step_by_step
        self.is_detailed = pool.step_times.is_detailed
        self.group: Any = None
        """The lockstep group, if any."""
        # the step or run of steps that is under way
        self.phase = IDLE
        self.ends_at = -1
        self.callbacks = [self.on_call]
        self.call = Call(self.on_call)
        self.is_composing = False
        self.is_blocked = False
        self.started = 0
        self.planned = 0
        self.offsets: Any = ()
        self.steps: Any = ()
        self.chunks: list[tuple[Request, int]] = []
        # life
        self.version = 0
        """Counts losses and stops: what was planned for an earlier life is void."""
        self.is_up = True
        self.is_draining = False
        self.up_since = 0
        self.up_ns = 0
        self.busy_ns = 0
        self.slowdown = 1.0
        self.prefilled_tokens = 0
        self.fullest_tokens = 0
        """Prompt tokens of the fullest of several data-parallel ranks, over all steps."""
        self.num_steps = 0
        self.outside_steps = 0

    # -- what routers ask -----------------------------------------------------------------------------------------
    def hit_tokens(self, request: Request, now: int) -> int:
        """Return how much of a prompt is cached as of the last boundary."""
        if not self.has_prefix_cache:
            return 0
        cache = self.cache
        match = cache.match(request.chain, 1 << 40)
        if match[3] and self.phase == DECODE:
            # only unpinned runs can be evicted: where all that matches is pinned, settling changes nothing
            self.settle(now)
            match = cache.match(request.chain, 1 << 40)
        return match[0] * self.block_tokens

    # -- arrivals -------------------------------------------------------------------------------------------------
    def enqueue(self, request: Request, now: int, at_head: bool = False) -> None:
        """Put a request into the queue; it joins at the first boundary at or after ``now`` (or the one after that)."""
        request.queued = now
        if self.is_priority:
            heappush(self.waiting, (request.priority, request.arrival, request.id, request))
        elif at_head:
            self.waiting.appendleft(request)
        else:
            self.waiting.append(request)
        self.queued_tokens += request.prompt
        if at_head or self.is_priority or (not self.is_blocked and self.num_running < self.max_num_seqs):
            self.poke(now)

    def poke(self, now: int) -> None:
        """Let the scheduler run at the first boundary at or after ``now``."""
        if self.phase == DECODE:
            offsets = self.offsets
            since = now - self.started
            if type(offsets) is list:
                at = bisect_left(offsets, since)
            else:
                at = int(offsets.searchsorted(since))
            at += 1
            if self.multi_step > 1:
                at += -at % self.multi_step
            if at < self.planned:
                self.planned = at
                self.cluster.end_of_step(self, self.started + int(offsets[at - 1]))
        elif self.phase == IDLE and self.is_up and not self.is_composing:
            self.cluster.compose_soon(self)

    # -- boundaries -----------------------------------------------------------------------------------------------
    def on_call(self, call: Any) -> None:
        """Take the end of a step, unless it was replanned or lost in the meantime."""
        call.callbacks = self.callbacks  # one event object for all steps: SimPy takes its callbacks away
        now: int = self.cluster.env._now  # type: ignore[assignment]
        if self.ends_at == now:
            self.ends_at = -1
            self.on_step_end(now)

    def on_step_end(self, now: int) -> None:
        """Account for what has just been computed, then compose (after whatever else happens at this instant)."""
        if self.is_async:
            last = self.planned - self.multi_step
            self.cutoff = self.started + (int(self.offsets[last - 1]) if last > 0 else 0)
            self.ghosts = self.ghost_blocks = 0
        if self.phase == MIXED:
            self._end_mixed(now)
        else:
            self._advance(self.planned)
        self.phase = IDLE
        self.cluster.compose_soon(self)

    def compose(self, now: int) -> None:
        """Decide what the next step or run of steps computes, and start it."""
        self.is_blocked = self.has_preempted = self.is_late = False
        if self.batch:
            self._make_room(now)
        if not self.num_running:  # nothing is left to run: the decision is taken now, for all that wait
            self.has_preempted = False
            if self.is_async and self.group is None:
                self.cutoff = now
                self.ghosts = self.ghost_blocks = 0
        chunks: list[tuple[Request, int]] = []
        if self.prefilling or self.waiting:
            self._fill(now, chunks)
            if self.is_blocked and not chunks and not self.num_running and self._drop_loaded():
                self._fill(now, chunks)
        if chunks:
            self._start_mixed(now, chunks)
        elif self.batch:
            self._start_decode(now)
        elif self.is_draining and not self.waiting and not self.loading:
            self.cluster.on_drained(self, now)

    def settle(self, now: int) -> None:
        """Evict what the decode steps up to the last boundary at or before ``now`` have displaced."""
        if self.phase == DECODE and self.cache.lru_blocks:
            window = self.multi_step
            self._evict(0, min((self.steps_done(now) // window + 1) * window, self.planned))

    def steps_done(self, now: int) -> int:
        """Return the steps of the current run that have ended by ``now``."""
        if self.phase != DECODE:
            return 0
        since = now - self.started
        if type(self.offsets) is list:
            return min(bisect_right(self.offsets, since), self.planned)
        return min(int(self.offsets.searchsorted(since, side="right")), self.planned)

    def on_loaded(self, request: Request, now: int) -> None:
        """Queue a request again whose blocks have come back from a slower tier; they stay held."""
        if self.loading.pop(request, 0):
            self.enqueue(request, now, at_head=True)

    def on_sent(self, request: Request, now: int) -> None:
        """Give back the blocks of a request whose KV has reached its decode replica."""
        self.loading_blocks -= self.loading.pop(request, 0)
        self._release(request)
        self.poke(now)

    # -- mixed steps ----------------------------------------------------------------------------------------------
    def _start_mixed(self, now: int, chunks: list[tuple[Request, int]]) -> None:
        tokens = pairs = 0
        for request, count in chunks:
            pairs += count * request.computed + (count * (count + 1) >> 1)
            tokens += count
        widest = tokens
        if not self.is_detailed and self.prefill_ranks == 1:
            duration = self.times.mixed_ns(self.batch, self.total_context, tokens, pairs)
        else:
            shapes = [(count, request.computed) for request, count in chunks]
            if self.group:
                duration = self.group.offer(self, shapes)
            elif self.is_detailed:
                duration = self.times.step_ns(self.contexts(), shapes)
            else:
                duration, widest = self.times.dealt_ns(self.batch, self.total_context, shapes, self.rank_share)
                self.fullest_tokens += widest
        if not self.is_detailed and self.times.is_outside(self.batch, self.total_context, widest):
            self.outside_steps += 1
        for request, count in chunks:
            request.computed += count
            if self.has_prefix_cache and request.chain:
                self._insert(request)
        self.prefilled_tokens += tokens
        self.chunks = chunks
        self.phase = MIXED
        self.started = now
        self.planned = 1
        if self.group is None:
            self.set_duration(duration, now)

    def set_duration(self, duration: int, now: int) -> None:
        """Give the one step that was just decided its time (in a lockstep group: the group's)."""
        if self.slowdown != 1.0:
            duration = round(duration * self.slowdown)
        self.steps = [duration]
        self.offsets = [duration]
        self._count_stalls(now)
        self.cluster.end_of_step(self, now + duration)

    def _count_stalls(self, now: int) -> None:
        """Lengthen the next gap of sequences that come from elsewhere by the time they stood still."""
        for last in self.resumed:
            first = int(self.steps[0])
            self.cluster.gaps.add(first, -1)
            self.cluster.gaps.add(first + now - last)
        self.resumed.clear()

    def _end_mixed(self, now: int) -> None:
        duration = self.steps[0]
        self.busy_ns += duration
        self.num_steps += 1
        cluster = self.cluster
        batch = self.batch
        if batch:
            cluster.gaps.add(duration, batch)
            self._grow(1, self._total_after(1))
        if cluster.spans is not None:
            cluster.log_span(self, "mixed", self.started, now, batch, sum(count for _, count in self.chunks))
        joining = []
        for request, _ in self.chunks:
            if request.computed < request.prompt:
                continue
            joining.append(request)
            self.prefilling.remove(request)
            self.prefill_blocks -= self._prompt_blocks(request)
        if batch:
            self._finish(now)
        for request in joining:
            request.generated += 1
            if request.first == NEVER:
                request.first = now
            else:
                cluster.gaps.add(now - request.last)
            request.last = now
            if request.generated >= request.output:
                self._close(request, now, request.prompt)
            elif self.pool.is_prefill:
                del self.running[request]
                self.active_tokens -= request.prompt
                self.loading[request] = blocks = self._prompt_blocks(request)
                self.loading_blocks += blocks
                cluster.on_prefilled(self, request, now)
            else:
                self._join(request)
        self.chunks = []

    # -- decode runs ----------------------------------------------------------------------------------------------
    def _start_decode(self, now: int) -> None:
        """Run decode steps until a sequence ends, or KV blocks do, or someone pokes."""
        finishing = self.finishing
        while finishing[0][2].done_at != finishing[0][0] or finishing[0][2] not in self.running:
            heappop(finishing)
        steps = finishing[0][0] - self.step
        window = self.multi_step
        if window > 1:
            steps += -steps % window
        if (
            self.is_step_by_step
            or self.is_detailed
            or (self.waiting and (self.ghosts or self.is_late or self.has_preempted))
        ):
            steps = window
        elif self._decode_blocks_bound(steps) > self._room():
            steps = self._steps_that_fit(steps)
        batch = self.batch
        if self.is_detailed:
            times = [self.group.offer(self, ()) if self.group else self.times.step_ns(self.contexts(), ())]
        elif self.is_step_by_step:
            times = self._times_one_by_one(steps)
        elif self.drafts is not None:
            times = self.times.decode_many_ns(batch, self.drafts.contexts(self.step, self.total_context, steps))
        else:
            times = self.times.decode_run_ns(batch, self.total_context, steps)
        if self.slowdown != 1.0:
            times = [round(int(t) * self.slowdown) for t in times]
        if type(times) is list:
            self.offsets = list(accumulate(times))
            end = self.offsets[-1]
        else:
            self.offsets = np.add.accumulate(times)
            end = int(self.offsets[-1])
        self.steps = times
        self.phase = DECODE
        self.started = now
        self.planned = steps
        if self.group is None:
            if self.resumed:
                self._count_stalls(now)
            self.cluster.end_of_step(self, now + end)

    def _times_one_by_one(self, steps: int) -> list[int]:
        """Return step times from the sequences themselves, not from the running sums (the oracle)."""
        times = []
        for ahead in range(steps):
            total = sum(self._context_at(r, self.step + ahead) for r in self.running if r.done_at != NEVER)
            times.append(self.times.decode_ns(self.batch, total))
        return times

    def _advance(self, steps: int) -> None:
        """Account for ``steps`` finished decode steps."""
        if self.cache.lru_blocks:
            self._evict(0, steps)
        times = self.steps
        if steps < len(times):
            times = times[:steps]
        cluster = self.cluster
        batch = self.batch
        duration = int(self.offsets[steps - 1])
        self.busy_ns += duration
        self.num_steps += steps
        window = self.multi_step
        if window == 1:
            cluster.gaps.add_run(times, batch)
        else:  # the host hears of the tokens of one decision together
            cluster.gaps.add_run([int(sum(times[at : at + window])) for at in range(0, steps, window)], batch)
            cluster.gaps.zero += batch * (steps - steps // window)
        after = self._total_after(steps)
        if not self.is_detailed and self.times.is_outside(batch, after, 0):
            self.outside_steps += steps_outside(self.times, batch, self._total_after, steps)
        if cluster.spans is not None:
            cluster.log_span(self, "decode", self.started, self.started + duration, batch, 0)
        self._grow(steps, after)
        if self.finishing[0][0] <= self.step:
            self._finish(self.started + duration)

    def _finish(self, now: int) -> None:
        """Close the sequences whose last token has come."""
        finishing = self.finishing
        step = self.step
        while finishing and finishing[0][0] <= step:
            done_at, _, request = heappop(finishing)
            if request.done_at != done_at or request not in self.running:
                continue
            self.total_context -= self._context_at(request, step)
            self.batch -= 1
            emitted = request.output - request.generated
            steps = done_at - request.start_step
            if self.drafts:
                self.cluster.num_drafted_steps += steps
            # drafts bring tokens at no gap; steps of a decision past the last token bring none
            self.cluster.gaps.zero += emitted - steps - (step - done_at)
            request.generated = request.output
            request.last = now
            request.done_at = NEVER
            self._close(request, now, request.prompt + emitted)

    def _close(self, request: Request, time: int, in_kv: int) -> None:
        """Let a finished request go: cache its session's run, give its blocks back, write its record."""
        del self.running[request]
        self.active_tokens -= request.prompt
        if self.is_async:
            self.ghosts += 1
            self.ghost_blocks += (in_kv + self.reserve + self.block_tokens - 1) // self.block_tokens
        if request.chain and self.has_prefix_cache and type(request.chain[-1][0]) is range:
            self._extend(request, in_kv)
        self._release(request)
        self.cluster.on_finished(self, request, time)

    # -- loss -----------------------------------------------------------------------------------------------------
    def lose(self, now: int) -> list[Request]:
        """Stop at once: return everything that was here, with the tokens of completed steps counted."""
        done = self.steps_done(now)
        done -= done % self.multi_step  # tokens of a decision that is under way have not been delivered
        boundary = now
        if self.phase != IDLE:
            boundary = self.started + (int(self.offsets[done - 1]) if done else 0)
            self.busy_ns += now - boundary
        if self.phase == DECODE and done:
            self._advance(done)
        self.version += 1
        self.ends_at = -1
        self.phase = IDLE
        self.is_blocked = False
        self.ghosts = self.ghost_blocks = 0
        self.chunks = []
        self.resumed.clear()
        waiting = [item[3] for item in self.waiting] if self.is_priority else list(self.waiting)
        for request in list(self.running):
            if request.done_at != NEVER and self.step > request.start_step:
                request.last = boundary
        lost = [*self.running, *self.loading, *waiting]
        for request in list(self.running):
            self._leave(request)
        for request in lost:
            request.node = None
            request.shared = 0
        self.waiting.clear()
        self.loading.clear()
        self.finishing.clear()
        self.queued_tokens = self.active_tokens = self.loading_blocks = 0
        self.cache.clear()
        return lost
