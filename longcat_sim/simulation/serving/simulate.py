"""``simulate_serving``: a workload through an engine, to records and metrics."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from longcat_sim.errors import SpecError, WorkloadError
from longcat_sim.records.span import Span, chrome_trace
from longcat_sim.simulation import metrics
from longcat_sim.simulation.serving.cluster import Cluster, Engine, KvLink, request_seed
from longcat_sim.simulation.serving.lockstep import Lockstep
from longcat_sim.simulation.serving.published_loads import BalancerRules
from longcat_sim.simulation.serving.replica import Replica
from longcat_sim.simulation.serving.request import Columns, GapHistogram, Request
from longcat_sim.simulation.serving.synthetic import Synthetic
from longcat_sim.simulation.serving.workload import TraceReader
from longcat_sim.specs.serve import Serve


@dataclass(frozen=True)
class PoolUse:
    """What one pool of replicas did."""

    name: str
    num_replicas: int
    num_gpus: int
    gpu_hours: float
    busy_s: float
    """Replica seconds in a step."""
    idle_s: float
    prefilled_tokens: int
    """Prompt tokens computed, recomputation after preemption or loss included."""
    num_steps: int
    outside_steps: int
    """Steps whose time was extrapolated beyond the grid."""
    evicted_blocks: int
    prefill_fill: float = 1.0
    """Prompt tokens of all data-parallel ranks over those of as many ranks as full as the fullest, on average."""


@dataclass
class ServingResult:
    """Records (columns; a record is made when looked at), what the pools did, and the checks that were made."""

    serve: Serve
    records: Columns
    gaps: GapHistogram
    pools: dict[str, PoolUse]
    duration_s: float
    """From the start to the last event."""
    preemptions: int
    between_pools: int = 0
    """Requests that waited for the decode pool when the last one arrived."""
    skipped_rows: int = 0
    skipped: tuple[str, ...] = ()
    checks: dict[str, Any] = field(default_factory=dict)
    spans: list[Span] | None = None
    wall_s: float = 0.0
    interpolation_error: float = 0.0
    start_wall: float = 0.0

    @cached_property
    def counted(self) -> metrics.CountedWork:
        """What rates and prices are of."""
        return metrics.counted_work(self)

    def metrics(self) -> dict[str, Any]:
        """Return the figures of a serving run; units are in the keys."""
        figures = metrics.serving_metrics(self)
        if not self.wall_s:
            self.wall_s = time.perf_counter() - self.start_wall
        figures["wall_s"] = self.wall_s
        return figures

    def write_chrome_trace(self, path: Path) -> None:
        """Write the window that was asked for as a Chrome trace, one process per replica."""
        if self.spans is None:
            raise ValueError(
                "simulate_serving(trace_window_s=(start, end)) keeps the steps of a window; none was given"
            )
        path.write_text(json.dumps(chrome_trace(self.spans)), encoding="utf-8")


def _check_scheduler(serve: Serve, acceptance: tuple[float, ...]) -> None:
    scheduler = serve.scheduler
    per_step = 1 + len(acceptance)
    if scheduler.max_num_seqs * per_step > scheduler.max_num_batched_tokens:
        raise SpecError(
            f"serve.scheduler: max_num_batched_tokens must hold one decode step of max_num_seqs sequences: "
            f"{scheduler.max_num_seqs} x {per_step} = {scheduler.max_num_seqs * per_step} > "
            f"{scheduler.max_num_batched_tokens}; lower max_num_seqs or raise max_num_batched_tokens"
        )


def _check_lockstep(serve: Serve) -> None:
    scheduler = serve.scheduler
    cannot = {
        "serve.prefill": serve.is_disaggregated,
        "serve.faults": bool(serve.faults),
        "serve.autoscaler": serve.autoscaler is not None,
        "serve.max_queue": serve.max_queue is not None,
        "serve.scheduler.policy: priority": scheduler.policy == "priority",
        "serve.scheduler.multi_step": scheduler.multi_step > 1,
    }
    given = [name for name, is_given in cannot.items() if is_given]
    if given:
        raise SpecError(f"ranks in lockstep: expected none of {', '.join(cannot)}; got {', '.join(given)}; remove it")


def simulate_serving(
    serve: Serve,
    engines: Engine | Mapping[str, Engine],
    *,
    kv_link: KvLink | None = None,
    acceptance: tuple[float, ...] = (),
    seed: int = 0,
    step_by_step: bool = False,
    debug: bool = False,
    trace_window_s: tuple[float, float] | None = None,
    requests: Iterable[Request] | None = None,
    lockstep: BalancerRules | None = None,
) -> ServingResult:
    """Serve the workload of ``serve`` and return records, pool use and checks.

    ``engines`` is one ``Engine`` for shared replicas, or {"prefill": .., "decode": ..}. ``acceptance`` is the
    conditional probability of each draft token. ``step_by_step`` makes an event of every step (same records, bit for
    bit). ``debug`` checks every sum at every decision. ``requests`` replaces the workload (a recorded run).
    ``lockstep`` makes the shared replicas data-parallel ranks of one expert group: they step together, and the front
    end knows of them what these rules let it know.

    Raises:
        WorkloadError: the trace cannot be read, or holds too many faulty rows.
        SpecError: pools and engines do not match, a decode step does not fit in the token budget, or ranks in lockstep
            are given what they cannot do.
    """
    start_wall = time.perf_counter()
    by_name = {"shared": engines} if isinstance(engines, Engine) else dict(engines)
    wanted = {"prefill", "decode"} if serve.is_disaggregated else {"shared"}
    if set(by_name) != wanted:
        raise SpecError(f"engines: expected {', '.join(sorted(wanted))}; got {', '.join(sorted(by_name))}")
    if serve.is_disaggregated and kv_link is None:
        raise SpecError("kv_link: prefill and decode pools need a KvLink, such as KvLink(bytes_per_s=50e9); got none")
    if (serve.is_disaggregated or serve.kv_tiers) and not all(e.kv_bytes_per_token > 0 for e in by_name.values()):
        raise SpecError("Engine.kv_bytes_per_token: KV transfers and tiers need it, such as 70272.0; got 0")
    if requests is None and serve.workload.trace is None and serve.workload.arrivals is None:
        raise WorkloadError(
            "serve.workload: expected trace: PATH or arrivals: {process: poisson, rate: 3.5 /s}; got neither; set one, "
            "such as --set serve.workload.trace=conversation.jsonl"
        )
    _check_scheduler(serve, acceptance)
    if lockstep is not None:
        _check_lockstep(serve)
    source: Any = requests
    if source is None:
        source = TraceReader(serve) if serve.workload.trace is not None else Synthetic(serve, seed)
    has_sessions = isinstance(source, Synthetic) and source.has_sessions
    columns = Columns(tuple(level.name for level in serve.slo), has_sessions)
    window = None
    if trace_window_s is not None:
        window = (round(trace_window_s[0] * 1e9), round(trace_window_s[1] * 1e9))
    cluster = Cluster(
        serve, by_name, kv_link, acceptance, request_seed(seed), source, columns, step_by_step, debug, window
    )
    if lockstep is not None:
        cluster.loads = Lockstep(cluster, cluster.entry.replicas, lockstep).loads
    collects = gc.isenabled()
    gc.disable()  # a run makes millions of objects and no cycles to collect
    try:
        cluster.run()
    finally:
        if collects:
            gc.enable()
    result = ServingResult(
        serve=serve,
        records=columns,
        gaps=cluster.gaps,
        pools=_pool_use(cluster),
        duration_s=cluster.end * 1e-9,
        preemptions=cluster.num_preemptions,
        between_pools=cluster.between_pools,
        spans=cluster.spans,
        start_wall=start_wall,
        interpolation_error=max(getattr(e.step_times, "interpolation_error", 0.0) for e in by_name.values()),
    )
    if isinstance(source, TraceReader):
        result.skipped_rows, result.skipped = source.faults.count, tuple(source.faults.listed)
    result.checks = _conservation(cluster, result)
    return result


def _pool_use(cluster: Cluster) -> dict[str, PoolUse]:
    uses = {}
    for name, pool in cluster.pools.items():
        up = sum(r.up_ns for r in pool.replicas)
        busy = sum(r.busy_ns for r in pool.replicas)
        uses[name] = PoolUse(
            name,
            len(pool.replicas),
            pool.engine.num_gpus,
            up * 1e-9 / 3600 * pool.engine.num_gpus,
            busy * 1e-9,
            (up - busy) * 1e-9,
            sum(r.prefilled_tokens for r in pool.replicas),
            sum(r.num_steps for r in pool.replicas),
            sum(r.outside_steps for r in pool.replicas),
            sum(r.cache.evicted for r in pool.replicas),
            _prefill_fill(pool.replicas),
        )
    return uses


def _prefill_fill(replicas: Sequence[Replica]) -> float:
    fullest = sum(r.fullest_tokens * r.prefill_ranks for r in replicas)
    return sum(r.prefilled_tokens for r in replicas) / fullest if fullest else 1.0


def _conservation(cluster: Cluster, result: ServingResult) -> dict[str, Any]:
    """Check that nothing was lost or counted twice: requests, tokens, KV blocks.

    Raises:
        AssertionError: a fault of ours.
    """
    columns = result.records
    status = columns.numpy("status")
    assert not np.any(status == 0), "a request neither completed, was rejected nor failed"
    for replica in cluster.replicas:
        assert replica.batch == 0
        assert replica.total_context == 0
        assert not replica.running
        assert not replica.waiting
        assert replica.prefill_blocks == 0
        assert replica.loading_blocks == 0
        assert replica.cache.shared == 0
        assert replica.cache.pinned_blocks == 0
        assert replica.cache.lru_blocks <= replica.cache.capacity
        replica.cache.check(0)
    result.gaps.flush()
    done = status == 1
    outputs = int(columns.numpy("output")[done].sum(dtype=np.int64))
    gaps = result.gaps.count + result.gaps.zero
    checks = {
        "requests": len(columns),
        "completed": int(done.sum()),
        "rejected": int((status == 2).sum()),
        "failed": int((status == 3).sum()),
        "output_tokens": outputs,
        "token_gaps": gaps,
    }
    if checks["failed"] == 0 and not np.any(columns.numpy("retries")):
        assert gaps == outputs - checks["completed"], f"{gaps} gaps between {outputs} tokens: a fault of ours"
    first, last, arrival = columns.numpy("first"), columns.numpy("last"), columns.numpy("arrival")
    assert np.all(arrival[done] < first[done])
    assert np.all(first[done] <= last[done])
    return checks


def simulate_seeds(
    serve: Serve,
    engines: Engine | Mapping[str, Engine],
    seeds: Iterable[int],
    *,
    executor: Executor | None = None,
    **settings: Any,
) -> list[dict[str, Any]]:
    """Return the metrics of several runs that differ in the seed, in any ``concurrent.futures`` executor."""
    jobs = [(serve, engines, seed, settings) for seed in seeds]
    return list(executor.map(_one_seed, jobs) if executor else map(_one_seed, jobs))


def _one_seed(job: tuple[Serve, Any, int, dict[str, Any]]) -> dict[str, Any]:
    serve, engines, seed, settings = job
    return simulate_serving(serve, engines, seed=seed, **settings).metrics()
