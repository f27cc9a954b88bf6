"""The serving engine against queueing theory: degenerate scenarios of the engine itself, not a toy beside it.

One output token is one step of 1 ms or so; a request of n tokens is a job of n steps. Intervals are Student's t over
independent seeds at 99.9 %, so that a right engine fails one run in a thousand per figure; seeds are fixed.
"""

from math import factorial, log1p
from typing import Any

import numpy as np
import pytest
from scipy import stats

from longcat_sim.simulation.serving.cluster import Engine
from longcat_sim.simulation.serving.simulate import ServingResult, simulate_serving
from longcat_sim.simulation.serving.step_times import LinearStepTimes
from longcat_sim.specs.serve import Serve

STEP = 1_000_000  # ns
SECONDS = STEP * 1e-9


def run(seed: int, rate: float, output: Any, servers: int, times: LinearStepTimes, **workload: Any) -> ServingResult:
    serve = Serve.model_validate(
        {
            "workload": {
                "arrivals": {"process": "poisson", "rate": f"{rate!r} /s"}, "input_tokens": 1, "output_tokens": output,
                "num_requests": 4000, **workload,
            },
            "scheduler": {"max_num_seqs": servers, "max_num_batched_tokens": 8192, "prefix_cache": False},
        }
    )  # fmt: skip
    return simulate_serving(serve, Engine(times, 1 << 24), seed=seed)


def residence_s(result: ServingResult) -> np.ndarray:
    """Time in the system, the first tenth of the jobs left out."""
    columns = result.records
    times = (columns.numpy("last") - columns.numpy("arrival")) * 1e-9
    return times[len(times) // 10 :]


def assert_within(samples: list[float], theory: float, bias: float = 0.0) -> None:
    """Assert that theory lies in the 99.9 % interval of the mean, widened by a known discretisation ``bias``."""
    mean, error = np.mean(samples), stats.sem(samples)
    half = stats.t.ppf(0.9995, len(samples) - 1) * error + bias
    assert half < 0.2 * theory, "too wide to say anything"
    assert abs(mean - theory) < half, f"{mean} is not {theory} +- {half}"


def geometric(mean: float) -> dict[str, Any]:
    return {"distribution": "exponential", "mean": mean}


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_m_m_1(load: float) -> None:
    steps = 200.0
    service = steps * SECONDS
    rate = load / service
    one = LinearStepTimes(fixed_ns=STEP)
    results = [run(seed, rate, geometric(steps), 1, one) for seed in range(12)]
    times = [residence_s(r) for r in results]
    # T = 1 / (mu - lambda); a geometric job in place of an exponential one differs by half a step at most
    assert_within([float(t.mean()) for t in times], service / (1 - load), SECONDS / (1 - load))
    if load == 0.5:  # P(T > t) = exp(-(mu - lambda) t)
        tail = -log1p(-0.9) * service / (1 - load)
        assert_within([float(np.quantile(t, 0.9)) for t in times], tail, 2 * SECONDS)
    busy = [r.pools["shared"].busy_s / r.duration_s for r in results]
    assert_within(busy, load)


@pytest.mark.parametrize("load", [0.3, 0.8])
def test_m_d_1(load: float) -> None:
    one = LinearStepTimes(fixed_ns=50 * STEP)
    service = 50 * SECONDS
    times = [residence_s(run(seed, load / service, 1, 1, one)).mean() for seed in range(12)]
    assert_within([float(t) for t in times], service * (1 + load / (2 * (1 - load))))


def test_m_d_1_of_many_steps_is_the_same_queue() -> None:
    load, steps = 0.6, 50
    service = steps * SECONDS
    one = LinearStepTimes(fixed_ns=STEP)
    many = residence_s(run(3, load / service, steps, 1, one))
    single = residence_s(run(3, load / service, 1, 1, LinearStepTimes(fixed_ns=steps * STEP)))
    np.testing.assert_array_equal(np.round(many * 1e9), np.round(single * 1e9))


@pytest.mark.parametrize(("servers", "load"), [(4, 0.7), (8, 0.85)])
def test_m_m_c_is_a_batch_of_c_slots(servers: int, load: float) -> None:
    steps = 400.0
    service = steps * SECONDS
    offered = load * servers
    rate = offered / service
    slots = LinearStepTimes(fixed_ns=STEP)
    times = [residence_s(run(seed, rate, geometric(steps), servers, slots)).mean() for seed in range(8)]
    top = offered**servers / factorial(servers) / (1 - load)
    wait = top / (sum(offered**k / factorial(k) for k in range(servers)) + top)  # Erlang C
    # a job waits for the next boundary: half a step on average
    assert_within([float(t) for t in times], service + wait * service / (servers * (1 - load)), SECONDS)


@pytest.mark.parametrize("law", ["exponential", "constant"])
def test_processor_sharing_is_insensitive_to_the_law_of_service(law: str) -> None:
    steps, load = 100.0, 0.7
    unit = 100_000
    shared = LinearStepTimes(per_sequence_ns=unit, per_prefill_token_ns=unit)
    service = steps * unit * 1e-9
    output = geometric(steps) if law == "exponential" else int(steps)
    times = [residence_s(run(seed, load / service, output, 4096, shared)).mean() for seed in range(8)]
    # E[T] = E[S] / (1 - rho), whatever the law; joining at the next boundary of a batch of n costs n / 2 quanta
    assert_within([float(t) for t in times], service / (1 - load), 3 * unit * 1e-9 * load / (1 - load))


def test_processor_sharing_slows_every_job_by_the_same_factor() -> None:
    steps, load, unit = 100.0, 0.6, 100_000
    shared = LinearStepTimes(per_sequence_ns=unit, per_prefill_token_ns=unit)
    rate = load / (steps * unit * 1e-9)
    slowdowns = []
    for seed in range(8):
        columns = run(seed, rate, geometric(steps), 4096, shared).records
        times = (columns.numpy("last") - columns.numpy("arrival"))[400:]
        jobs = columns.numpy("output")[400:]
        long, short = jobs > 150, (jobs > 20) & (jobs <= 60)
        slowdowns.append(
            [float((times[kind] / (jobs[kind] * unit)).mean()) for kind in (long, short)]
        )  # fmt: skip
    for kind in zip(*slowdowns, strict=True):
        assert_within(list(kind), 1 / (1 - load), 0.06)


def test_little_law_holds_to_the_nanosecond() -> None:
    """Sequence-time counted by steps (batch x duration) equals sequence-time counted by requests (last - first)."""
    times = LinearStepTimes(fixed_ns=777_777, per_sequence_ns=1_313, per_prefill_token_ns=17)
    result = run(5, 300.0, geometric(60), 32, times)
    columns = result.records
    assert result.preemptions == 0
    assert result.gaps.sum_ns == int((columns.numpy("last") - columns.numpy("first")).sum())
    # and L = lambda W, over the run, with L from the counts of arrivals and departures at each instant
    arrival, last = columns.numpy("arrival"), columns.numpy("last")
    at = np.sort(np.concatenate([arrival, last]))
    number = np.searchsorted(np.sort(arrival), at, "right") - np.searchsorted(np.sort(last), at, "right")
    area = int((number[:-1] * np.diff(at)).sum())
    assert area == int((last - arrival).sum())


def test_closed_loop_never_has_more_than_its_users() -> None:
    times = LinearStepTimes(fixed_ns=STEP)
    serve = Serve.model_validate(
        {
            "workload": {
                "arrivals": {"process": "closed_loop", "concurrency": 7}, "input_tokens": 1, "output_tokens": 20,
                "num_requests": 700,
            },
            "scheduler": {"max_num_seqs": 7, "max_num_batched_tokens": 64},
        }
    )  # fmt: skip
    result = simulate_serving(serve, Engine(times, 1 << 20))
    # without think time every user is always in service: 7 users, 20 steps each, 100 rounds
    assert result.duration_s == pytest.approx(100 * 20 * SECONDS, abs=1e-12)
    assert result.metrics()["unstable"] is False
