"""Steps of a prefill replica whose queue never ends: filled as the engine fills them, as long as their slowest rank."""

from __future__ import annotations

import numpy as np
import pytest

from longcat_sim.capacity.candidates import shapes
from longcat_sim.capacity.full_steps import full_steps, seconds_per_token
from longcat_sim.capacity.op_times import op_times_of
from longcat_sim.capacity.screen_serving import curve
from longcat_sim.capacity.traffic import Traffic
from longcat_sim.specs.scenario import scenario
from longcat_sim.specs.serve import Scheduler
from longcat_sim.studies.engines import StepFunction
from longcat_sim.studies.served import serve_once


def traffic(*prompts: int) -> Traffic:
    inputs = np.array(prompts, dtype=float)
    return Traffic(1.0, inputs.mean(), inputs.mean(), 1.0, 1.0, 1.0, inputs, inputs)


def test_prompts_of_a_rank_each_fill_every_rank_alike() -> None:
    rows = full_steps(traffic(2048), Scheduler(max_num_batched_tokens=32768), 16)
    assert (rows[:, 1:] == (32768, 2048, 2048 * 2049 / 2)).all()
    assert seconds_per_token(rows, np.full(len(rows), 0.3)) == pytest.approx(0.3 / 32768)


def test_the_others_wait_for_the_rank_with_the_longest_prompt() -> None:
    """One prompt of 20,480 tokens among short ones: its tenth chunk attends to ten times as many keys."""
    rows = full_steps(traffic(20480, *[2048] * 150), Scheduler(max_num_batched_tokens=32768), 16)
    _, first = np.unique(rows[:, 0], return_index=True)
    pairs = np.maximum.reduceat(rows[:, 3], first)
    assert pairs.max() == 2048 * 9 * 2048 + 2048 * 2049 / 2
    assert 0.9 < (pairs > 2048 * 2049 / 2).mean() < 1  # 10 of each 10.6 steps hold a chunk of it
    seconds = rows[:, 3] * 1e-9
    assert seconds_per_token(rows, seconds) == pytest.approx(pairs.mean() * 1e-9 / 32768, rel=0.01)


def test_prompts_that_are_not_chunked_stay_whole() -> None:
    rows = full_steps(traffic(1500), Scheduler(max_num_batched_tokens=4000, chunked_prefill=False), 1)
    assert (rows[:, 1:] == (3000, 3000, 2 * 1500 * 1501 / 2)).all()


@pytest.mark.slow
def test_the_capacity_of_a_prefill_pool_is_the_engines() -> None:
    """An overloaded prefill replica, between its 500th and its 2,500th first token."""
    base = scenario("longcat-flash-serve-capacity", {"draws": 1, "search.ep_size": [16]})
    shape = shapes(base)[0][0]
    found = curve(shape, StepFunction(shape.scenario, op_times_of(shape.scenario.hardware)), Traffic.of(base))
    over = {
        "serve.workload.arrivals.rate": "60 /s", "serve.workload.num_requests": 3000, "serve.workload.warm_up": "1 s",
        "serve.prefill.replicas": 1, "serve.decode.replicas": 4,
    }  # fmt: skip
    run, _ = serve_once(base.what_if(over), is_priced=False)
    first_s = np.sort(run.records.numpy("first")) * 1e-9
    assert 1 / found.prompt_share_s == pytest.approx(2000 / (first_s[2500] - first_s[500]), rel=0.1)
