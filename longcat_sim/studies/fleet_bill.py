"""The bill of a serving run: its busy GPU-seconds split between computed input, cached input and output tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from longcat_sim.capacity.price import Bill, Work, bill
from longcat_sim.capacity.screen_serving import prompt_turns
from longcat_sim.simulation.metrics import CountedWork
from longcat_sim.simulation.serving.request import COMPLETED
from longcat_sim.simulation.serving.simulate import PoolUse, ServingResult
from longcat_sim.studies.engines import StepFunction


@dataclass(frozen=True)
class FleetBill:
    """A bill, and of each pool the GPU-hours that it holds and the share of them that was busy."""

    bill: Bill
    gpu_hours_by_pool: dict[str, float]
    busy_ratio_by_pool: dict[str, float]
    window_s: tuple[float, float]

    def figures(self) -> dict[str, Any]:
        """Return what every command prints of a fleet's bill; all over the same window."""
        return {**self.bill.figures(), "gpu_hours_by_pool": self.gpu_hours_by_pool}


def fleet_bill(
    run: ServingResult, steps: Mapping[str, StepFunction], usd_per_gpu_hour: float, *, is_on_demand: bool = False
) -> FleetBill:
    """Return the bill of a run. ``steps`` has the step function of each pool; each pool pays its own device's price.

    Every replica that a pool may have is paid for all the time, or with ``is_on_demand`` for its share of uptime.

    GPU-hours and tokens are those of ``counted_work``: requests of the warm-up are in neither. The rule for
    replicas that mix prefill and decode: busy GPU-seconds are split in the ratio of what the prompt tokens and the
    output tokens would cost in steps of their own, at the run's mean sizes. Of the prompts' part, cached tokens carry
    what attending to them adds to a prefill.
    """
    work = run.counted
    window = work.window_s
    length = window[1] - window[0]
    pools = {}
    for name, pool in run.pools.items():
        whole = float(pool.num_replicas * pool.num_gpus)
        up = min(whole, pool.gpu_hours * 3600.0 / max(run.duration_s, 1e-9)) if is_on_demand else whole
        pools[name] = _work(pool, run, steps[name], work, up * length)
    return FleetBill(
        bill(list(pools.values()), usd_per_gpu_hour),
        {name: work.paid_gpu_s / 3600.0 for name, work in pools.items()},
        {
            name: (work.input_gpu_s + work.cached_gpu_s + work.output_gpu_s) / work.paid_gpu_s if work.paid_gpu_s else 0
            for name, work in pools.items()
        },
        window,
    )


def _work(pool: PoolUse, run: ServingResult, step: StepFunction, counted: CountedWork, paid: float) -> Work:
    columns, done, window = run.records, counted.done, counted.window_s
    inputs, outputs = columns.numpy("input")[done].astype(float), columns.numpy("output")[done].astype(float)
    cached = columns.numpy("cached")[done].astype(float)
    computed_sum, output_sum = float((inputs - cached) @ counted.prompt_ratio), float(outputs @ counted.answer_ratio)
    length = window[1] - window[0]
    busy = min(pool.busy_s * pool.num_gpus * _share_within(pool, run, window), paid)
    does_prefill, does_decode = pool.name != "decode", pool.name != "prefill"
    output_alone = prefill_alone = cached_share = 0.0
    if len(inputs):
        computed = max(float((inputs - cached).mean()), 1.0)
        before = float(cached.mean())
        keys = (computed + 1) / 2
        ranks, fill = step.scenario.deployment.dp_size, pool.prefill_fill
        at = computed / prompt_turns(run.serve.scheduler, ranks, computed) * ranks
        many = np.array([at, at])
        own, whole = step(np.zeros(2), np.zeros(2), many, np.array([keys, keys + before]), fill)
        cached_share = max(0.0, 1 - float(own / whole)) if before else 0.0
        prefill_alone = float(whole) / (at * fill) * computed_sum if does_prefill else 0.0
        if does_decode and outputs.sum() > len(outputs):
            gaps = (columns.numpy("last")[done] - columns.numpy("first")[done]) * counted.answer_ratio
            batch = max(1.0, float(gaps.sum()) * 1e-9 / (max(length, 1e-9) * pool.num_replicas))
            context = float((inputs + outputs / 2).mean())
            seconds = float(step(np.array([batch]), np.array([context]), np.zeros(1), np.zeros(1))[0])
            per_step = batch * step.scenario.speculative.tokens_per_step
            output_alone = seconds / per_step * output_sum
    total = prefill_alone + output_alone
    input_s = busy * (prefill_alone / total) if total else 0.0
    return Work(
        paid_gpu_s=paid,
        input_gpu_s=input_s * (1 - cached_share),
        cached_gpu_s=input_s * cached_share,
        output_gpu_s=busy * (output_alone / total) if total else 0.0,
        input_tokens=computed_sum if does_prefill else 0.0,
        cached_tokens=float(cached @ counted.prompt_ratio) if does_prefill else 0.0,
        output_tokens=output_sum if does_decode else 0.0,
        usd_per_gpu_hour=step.scenario.usd_per_gpu_hour,
    )


def _share_within(pool: PoolUse, run: ServingResult, window: tuple[float, float]) -> float:
    """Return the share of a pool's busy seconds that lies in the window: a replica is busy while it has requests."""
    columns = run.records
    done = columns.numpy("status") == COMPLETED
    names = {"prefill": ("replica", "scheduled", "first"), "decode": ("decode_replica", "first", "last")}
    of, begin, end = (columns.numpy(name)[done] for name in names.get(pool.name, ("replica", "scheduled", "last")))
    low, high = (round(edge * 1e9) for edge in window)
    whole = inside = 0.0
    for replica in np.unique(of):
        mine = of == replica
        order = np.argsort(begin[mine], kind="stable")
        starts, ends = begin[mine][order], np.maximum.accumulate(end[mine][order])
        # a stretch without requests ends where one begins after all before it have ended
        cuts = np.flatnonzero(starts[1:] > ends[:-1]) + 1
        first, last = starts[np.concatenate([[0], cuts])], ends[np.concatenate([cuts - 1, [len(ends) - 1]])]
        whole += float((last - first).sum())
        inside += float(np.maximum(np.minimum(last, high) - np.maximum(first, low), 0).sum())
    return inside / whole if whole else 0.0
