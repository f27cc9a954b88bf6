"""The bill of a serving run: its busy GPU-seconds split between computed input, cached input and output tokens."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from longcat_sim.capacity.price import Bill, Work, bill
from longcat_sim.simulation.serving.simulate import PoolUse, ServingResult
from longcat_sim.studies.engines import StepFunction


def fleet_bill(
    run: ServingResult, steps: Mapping[str, StepFunction], usd_per_gpu_hour: float
) -> Bill:  # fmt: skip
    """Return the bill of a run. ``steps`` has the step function of each pool; each pool pays its own device's price.

    The rule for replicas that mix prefill and decode: busy GPU-seconds are split in the ratio of what the run's prompt
    tokens and its output tokens would cost in steps of their own, at the run's mean sizes. Of the prompts' part, cached
    tokens carry what attending to them adds to a prefill.
    """
    pools = [_work(pool, run, steps[name]) for name, pool in run.pools.items()]
    return bill(pools, usd_per_gpu_hour)


def _work(pool: PoolUse, run: ServingResult, step: StepFunction) -> Work:
    columns = run.records
    done = columns.numpy("status") == 1
    inputs, outputs = columns.numpy("input")[done].astype(float), columns.numpy("output")[done].astype(float)
    cached = columns.numpy("cached")[done].astype(float)
    paid, busy = pool.gpu_hours * 3600.0, pool.busy_s * pool.num_gpus
    does_prefill, does_decode = pool.name != "decode", pool.name != "prefill"
    output_alone = prefill_alone = cached_share = 0.0
    if len(inputs):
        computed = max(float((inputs - cached).mean()), 1.0)
        before = float(cached.mean())
        keys = (computed + 1) / 2
        at = np.array([computed])
        own = float(step(np.zeros(1), np.zeros(1), at, np.array([keys]))[0])
        whole = float(step(np.zeros(1), np.zeros(1), at, np.array([keys + before]))[0])
        cached_share = max(0.0, 1 - own / whole) if before else 0.0
        prefill_alone = whole / computed * float((inputs - cached).sum()) if does_prefill else 0.0
        if does_decode and outputs.sum() > len(outputs):
            gaps = columns.numpy("last")[done] - columns.numpy("first")[done]
            duration = max(run.duration_s, 1e-9) * pool.num_replicas
            batch = max(1.0, float(gaps.sum()) * 1e-9 / duration)
            context = float((inputs + outputs / 2).mean())
            seconds = float(step(np.array([batch]), np.array([context]), np.zeros(1), np.zeros(1))[0])
            per_step = batch * step.scenario.speculative.tokens_per_step
            output_alone = seconds / per_step * float(outputs.sum())
    total = prefill_alone + output_alone
    input_s = busy * (prefill_alone / total) if total else 0.0
    return Work(
        paid_gpu_s=paid,
        input_gpu_s=input_s * (1 - cached_share),
        cached_gpu_s=input_s * cached_share,
        output_gpu_s=busy * (output_alone / total) if total else 0.0,
        input_tokens=float((inputs - cached).sum()) if does_prefill else 0.0,
        cached_tokens=float(cached.sum()) if does_prefill else 0.0,
        output_tokens=float(outputs.sum()) if does_decode else 0.0,
        usd_per_gpu_hour=step.scenario.usd_per_gpu_hour,
    )
