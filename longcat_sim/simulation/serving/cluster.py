"""Replicas, router, KV links, faults and autoscaler on one SimPy clock of integer nanoseconds.

What happens at one instant happens in this order: step ends by replica, faults, KV transfers by request, arrivals by
number, the autoscaler, and last of all the decisions (``compose``) of the replicas. So an arrival at the very time of
a boundary joins that boundary, whatever was put into the event queue first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from heapq import heappush
from typing import Any

import simpy

from longcat_sim.records.span import Span
from longcat_sim.simulation.serving import draws
from longcat_sim.simulation.serving.clock import ARRIVAL, COMPOSE, FAULT, SCALE, TRANSFER, Call
from longcat_sim.simulation.serving.kv_cache import Tier
from longcat_sim.simulation.serving.pools import NS, Engine, KvLink, PoolRun
from longcat_sim.simulation.serving.published_loads import WAITING_WEIGHT, PublishedLoads
from longcat_sim.simulation.serving.replica import IDLE, Replica
from longcat_sim.simulation.serving.request import COMPLETED, FAILED, REJECTED, Columns, GapHistogram, Request
from longcat_sim.simulation.serving.slowdowns import Slowdowns
from longcat_sim.specs.serve import Autoscaler, Fault, Serve


class Cluster:
    """Everything on one clock. ``run`` serves the requests of a source to the end."""

    def __init__(
        self, serve: Serve, engines: dict[str, Engine], link: KvLink | None, acceptance: tuple[float, ...], seed: int,
        source: Any, columns: Columns, step_by_step: bool, debug: bool, window_ns: tuple[int, int] | None,
    ) -> None:  # fmt: skip
        self.env = simpy.Environment(initial_time=0)
        # SimPy's own event list: ``Environment.schedule`` without the detour by a delay
        self.queue: list[tuple[int, int, int, Any]] = self.env._queue  # type: ignore[assignment]
        self.numbers = self.env._eid
        self.serve = serve
        self.link = link
        self.source = source
        self.columns = columns
        self.is_step_by_step = step_by_step
        self.debug = debug
        self.gaps = GapHistogram()
        self.spans: list[Span] | None = None if window_ns is None else []
        self.window_ns = window_ns or (0, 0)
        self.num_preemptions = 0
        self.num_drafted_steps = 0
        self.in_flight = 0
        self.expected = 1
        """Requests in flight or yet to arrive, and 1 while the stream may hold more."""
        self.slowdowns = Slowdowns(self)
        self.transfers = 0
        self.between_pools = 0
        """Requests that waited for the decode pool when the last one arrived."""
        self.router = serve.router
        self.loads: PublishedLoads | None = None
        """What the front end of data-parallel ranks knows of them; without it, routers know all at once."""
        self.max_queue = serve.max_queue
        self.max_model_len = serve.scheduler.max_model_len or 1 << 62
        self.pools: dict[str, PoolRun] = {}
        self.link_free: dict[Replica, int] = {}
        sizes = {"shared": serve.num_shared_replicas}
        if serve.prefill and serve.decode:
            sizes = {"prefill": serve.prefill.replicas, "decode": serve.decode.replicas}
        for name, size in sizes.items():
            tiers = serve.kv_tiers if name != "decode" else ()
            pool = PoolRun(name, engines[name], serve.scheduler, tiers, acceptance, seed)
            for index in range(size):
                order = sum(len(p.replicas) for p in self.pools.values()) + index
                pool.replicas.append(Replica(self, pool, index, order))
            self.pools[name] = pool
        self.replicas = [replica for pool in self.pools.values() for replica in pool.replicas]
        self.entry = self.pools.get("shared") or self.pools["prefill"]
        self.held: list[Request] = []
        """Requests that wait for any replica to come up."""
        self.remote_held: list[Request] = []
        self.requests: Iterator[Request] = iter(())

    # -- the clock ------------------------------------------------------------------------------------------------
    def at(self, time: int, priority: int, callback: Callable[[Any], None]) -> None:
        """Call back at ``time``; ``priority`` orders what happens at one instant."""
        heappush(self.queue, (time, priority, next(self.numbers), Call(callback)))

    def end_of_step(self, replica: Replica, time: int) -> None:
        """Call the replica back when the step (or run of steps) it has just started ends, unless it is replanned."""
        replica.ends_at = time
        heappush(self.queue, (time, replica.order, next(self.numbers), replica.call))

    def compose_soon(self, replica: Replica) -> None:
        """Let the replica decide after everything else of this instant: at once, if nothing else is due."""
        if replica.group is not None:
            replica.group.compose_soon()
            return
        now: int = self.env._now  # type: ignore[assignment]
        queue = self.queue
        if not queue or queue[0][0] > now:
            replica.compose(now)
            if self.debug:
                replica.check()
            return
        replica.is_composing = True

        def compose(_: Any) -> None:
            replica.is_composing = False
            if replica.phase == IDLE and replica.is_up:
                replica.compose(now)
                if self.debug:
                    replica.check()

        self.at(now, COMPOSE + replica.order, compose)

    def run(self) -> None:
        """Serve all requests."""
        serve = self.serve
        scaler = serve.autoscaler
        first = serve.replicas if not serve.is_disaggregated else 1 << 30
        if scaler:
            first = min(max(first, scaler.min_replicas), scaler.max_replicas)
        for replica in self.replicas:
            replica.is_up = False
            if replica.index < first:
                self._start(replica, serve.cold_start)
        for fault in serve.faults:
            self.at(round(fault.at * NS), FAULT, partial(self._on_fault, fault))
        self.requests = iter(self.source)
        self._next_arrival()
        if scaler:
            self._schedule_scaling(scaler)
        step, queue = self.env.step, self.env._queue
        while queue and self.expected:
            step()
        now: int = self.env._now  # type: ignore[assignment]
        for request in [*self.held, *self.remote_held]:
            self._close(request, FAILED, "no replica came up again")
        self.held, self.remote_held = [], []
        self.end = now
        for replica in self.replicas:
            if replica.is_up:
                replica.up_ns += now - replica.up_since
        assert self.in_flight == 0, f"{self.in_flight} requests are lost: a fault of ours"

    # -- arrivals -------------------------------------------------------------------------------------------------
    def _next_arrival(self) -> None:
        request = next(self.requests, None)
        if request is None:
            self.expected -= 1
            if self.serve.is_disaggregated:
                waiting = sum(len(replica.waiting) for replica in self.pools["decode"].replicas)
                self.between_pools = len(self.remote_held) + waiting
        else:
            self.expected += 1
            self.at(request.arrival, ARRIVAL + max(request.session, 0), lambda _: self._on_arrival(request, True))

    def _on_arrival(self, request: Request, is_from_stream: bool) -> None:
        if is_from_stream:
            self._next_arrival()
        columns = self.columns
        request.id = len(columns)
        columns.open(request)
        self.in_flight += 1
        reason = self._never_fits(request)
        if reason:
            self._close(request, REJECTED, reason)
            return
        self._dispatch(request)

    def _never_fits(self, request: Request) -> str:
        """Return why a request can never be served (``kind: its figures``), or nothing."""
        total = request.input + request.output
        if total > self.max_model_len:
            return f"longer than max_model_len: {request.input} + {request.output} tokens > {self.max_model_len}"
        for pool in self.pools.values():
            replica = pool.replicas[0]
            size = replica.block_tokens
            slots = total - 1 + replica.reserve if not pool.is_prefill else request.input
            slots += (replica.tokens_per_sequence - 1) + (replica.multi_step - 1) if not pool.is_prefill else 0
            need = -(-slots // size)
            if need > pool.kv_blocks - replica.watermark:
                have = pool.kv_blocks - replica.watermark
                said = f"needs {need} KV blocks of {size} tokens; it has {have}"
                return f"longer than the KV cache of a {pool.name} replica: {said}"
            # what is preempted is computed again, with the tokens that it had generated
            longest = min(request.input if pool.is_prefill else total - 1, replica.chunk_limit)
            if not replica.is_chunked and longest > replica.budget:
                again = "" if longest <= request.prompt else f" ({longest} if it is preempted)"
                return f"prompt exceeds max_num_batched_tokens without chunked prefill: {request.prompt} tokens{again}"
        return ""

    def _dispatch(self, request: Request) -> None:
        live = self.entry.live
        if not live:
            self.held.append(request)
            return
        replica = live[0] if len(live) == 1 else self._route(self.entry, request)
        if self.max_queue is not None and len(replica.waiting) >= self.max_queue:
            said = f"{self.max_queue} waited at replica {replica.index}"
            self._close(request, REJECTED, f"the queue was full (max_queue): {said}")
            return
        self.columns.replica[request.id] = replica.index
        replica.enqueue(request, self.env._now)  # type: ignore[arg-type]

    def _route(self, pool: PoolRun, request: Request) -> Replica:
        """Choose a live replica; ties go to the lowest index.

        ``least_loaded``: fewest 4 x waiting + running, as vLLM's data-parallel coordinator counts; of ranks in
        lockstep, by the counts that it published last.
        ``prefix_aware``: fewest tokens to prefill there (its queue and what the cache does not hold of this prompt)
        plus tokens of the active prompts, the cost of NVIDIA Dynamo's KV router with weight 1.
        """
        live = pool.live
        now: int = self.env._now  # type: ignore[assignment]
        if self.loads is not None and self.router == "least_loaded":
            return pool.replicas[self.loads.choose(now)]
        if self.router == "round_robin":
            pool.turn += 1
            return live[(pool.turn - 1) % len(live)]
        if self.router == "prefix_aware" and pool is self.entry and request.chain:
            costs = [r.queued_tokens + r.active_tokens - r.hit_tokens(request, now) for r in live]
        else:
            costs = [WAITING_WEIGHT * len(r.waiting) + r.num_running for r in live]
        return live[costs.index(min(costs))]

    # -- what replicas report -------------------------------------------------------------------------------------
    def on_finished(self, replica: Replica, request: Request, now: int) -> None:
        """Record a completed request and send what its answer causes."""
        if replica.pool.name == "decode":
            self.columns.decode_replica[request.id] = replica.index
        if self.loads is not None:
            self.loads.finish(replica.index)
        self._close(request, COMPLETED)

    def _close(self, request: Request, status: int, reason: str = "") -> None:
        self.columns.close(request, status, reason)
        self.in_flight -= 1
        self.expected -= 1
        if self.columns.has_sessions:
            now: int = self.env._now  # type: ignore[assignment]
            follow = self.source.follow_up(request, now, status == COMPLETED)
            if follow is not None:
                self.expected += 1
                self.at(follow.arrival, ARRIVAL + follow.session, lambda _: self._on_arrival(follow, False))

    def on_prefilled(self, replica: Replica, request: Request, now: int) -> None:
        """Send the KV of a prefilled request to the decode pool.

        Transfers of one prefill replica take turns at all of its links together. Layer by layer they start with the
        prefill's last step and end one layer's share after it at the earliest; otherwise they start when it ends.
        """
        assert self.link is not None
        size = request.prompt * replica.pool.engine.kv_bytes_per_token
        factor = self.slowdowns.of(None) / self.link.bytes_per_s * 1e9
        own = round(size * factor * self.link.ranks)  # over the part of the rank that holds it
        begin = replica.started if self.link.layer_wise else now
        free = self.link_free[replica] = max(self.link_free.get(replica, 0), begin) + round(size * factor)
        end = max(free, begin + own)
        if self.link.layer_wise:
            end = max(end, now + round(own / replica.pool.engine.num_layers))
        self.transfers += 1
        retries = request.retries

        def arrived(_: Any) -> None:
            if request.retries == retries and request in replica.loading:
                time: int = self.env._now  # type: ignore[assignment]
                replica.on_sent(request, time)
                request.reset()
                request.prompt = request.input + request.generated - 1
                request.is_remote = True
                self._dispatch_remote(request, time)

        self.at(end + round(self.link.latency_s * NS), TRANSFER + request.id, arrived)

    def _dispatch_remote(self, request: Request, now: int) -> None:
        pool = self.pools["decode"]
        if not pool.live:
            self.remote_held.append(request)
            return
        replica = pool.live[0] if len(pool.live) == 1 else self._route(pool, request)
        self.columns.decode_replica[request.id] = replica.index
        replica.enqueue(request, now)

    def load(self, replica: Replica, request: Request, where: list[tuple[Tier, int]], now: int) -> None:
        """Bring blocks back from slower tiers; the transfers of a tier take turns."""
        end = now
        for tier, blocks in where:
            tier.free_at = max(tier.free_at, now) + round(blocks * tier.ns_per_block)
            tier.loaded_blocks += blocks
            end = max(end, tier.free_at + tier.latency_ns)
        retries = request.retries

        def loaded(_: Any) -> None:
            if request.retries == retries:
                replica.on_loaded(request, self.env._now)  # type: ignore[arg-type]

        self.at(end, TRANSFER + request.id, loaded)

    def log_span(self, replica: Replica, name: str, start: int, end: int, batch: int, tokens: int) -> None:
        """Keep a run of steps for the Chrome trace."""
        if end > self.window_ns[0] and start < self.window_ns[1]:
            assert self.spans is not None
            label = f"{name} batch {batch}" + (f" prefill {tokens}" if tokens else "")
            self.spans.append(Span(label, replica.pool.name, start * 1e-9, end * 1e-9, rank=replica.order, tag=name))

    # -- up and down ----------------------------------------------------------------------------------------------
    def _start(self, replica: Replica, is_cold: bool) -> None:
        now: int = self.env._now  # type: ignore[assignment]
        replica.is_up = True
        replica.is_draining = False
        replica.up_since = now
        delay = round(replica.pool.engine.weight_load_s * NS) if is_cold else 0
        version = replica.version

        def ready(_: Any) -> None:
            if replica.is_up and not replica.is_draining and replica.version == version:
                live = replica.pool.live
                live.append(replica)
                live.sort(key=lambda r: r.index)
                self._release_held(replica.pool)

        if delay:
            self.at(now + delay, FAULT + 1 + replica.order, ready)
        else:
            ready(None)

    def _release_held(self, pool: PoolRun) -> None:
        now: int = self.env._now  # type: ignore[assignment]
        if pool is self.entry:
            held, self.held = self.held, []
            for request in held:
                self._dispatch(request)
        if pool.name == "decode":
            held, self.remote_held = self.remote_held, []
            for request in held:
                self._dispatch_remote(request, now)

    def _stop(self, replica: Replica) -> None:
        now: int = self.env._now  # type: ignore[assignment]
        replica.up_ns += now - replica.up_since
        replica.is_up = False
        if replica in replica.pool.live:
            replica.pool.live.remove(replica)

    def on_drained(self, replica: Replica, now: int) -> None:
        """Stop a drained replica."""
        if replica.is_up:
            self._stop(replica)
            replica.cache.clear()
            replica.version += 1

    def _on_fault(self, fault: Fault, _: Any = None) -> None:
        now: int = self.env._now  # type: ignore[assignment]
        end = None if fault.duration is None else now + round(fault.duration * NS)
        if fault.kind == "link_degradation":
            self.slowdowns.add(None, fault.slowdown, end)
            return
        replica = self.pools[fault.pool].replicas[fault.replica]
        if fault.kind == "slow_rank":
            self.slowdowns.add(replica, fault.slowdown, end)
            return
        if not replica.is_up:
            return
        lost = replica.lose(now)
        self._stop(replica)
        self.link_free.pop(replica, None)
        for request in lost:
            if fault.in_flight == "fail":
                self._close(request, FAILED, f"on a replica that was lost: {fault.pool} {fault.replica}")
            else:
                request.restart()
                self._dispatch(request)
        if end is not None:
            # before faults of the same instant: the next one may strike it again
            self.at(end, FAULT - 1, lambda _: None if replica.is_up else self._start(replica, True))

    def _schedule_scaling(self, scaler: Autoscaler) -> None:
        def tick(_: Any) -> None:
            if not self.in_flight and not self.env._queue:
                return
            pool = self.entry
            up = [r for r in pool.replicas if r.is_up and not r.is_draining]
            waiting = sum(len(r.waiting) for r in pool.live) + len(self.held)
            running = sum(r.num_running for r in pool.live)
            is_wanted = waiting > scaler.scale_up_queue * max(1, len(up)) and len(up) < scaler.max_replicas
            if is_wanted or len(up) < scaler.min_replicas:
                idle = next((r for r in pool.replicas if not r.is_up), None)
                if idle is not None:
                    self._start(idle, True)
            elif (
                len(pool.live) == len(up) > scaler.min_replicas
                and waiting == 0
                and running < scaler.scale_down_load * len(up) * self.serve.scheduler.max_num_seqs
            ):
                last = up[-1]
                last.is_draining = True
                pool.live.remove(last)
                if last.phase == IDLE and not last.is_composing and not last.waiting and not last.loading:
                    self.on_drained(last, self.env._now)  # type: ignore[arg-type]
            self._schedule_scaling(scaler)

        now: int = self.env._now  # type: ignore[assignment]
        self.at(now + round(scaler.interval * NS), SCALE, tick)


def request_seed(seed: int) -> int:
    """Return the seed of the engine's own draws (draft acceptance), apart from the traffic's."""
    return draws.key(seed, draws.ACCEPT) >> 1
