"""Fast-forward and step-by-step give the same records, bit for bit, and lose nothing, in random scenarios."""

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longcat_sim.simulation.serving.cluster import Engine, KvLink
from longcat_sim.simulation.serving.simulate import ServingResult, simulate_serving
from longcat_sim.simulation.serving.step_times import StepTimeGrid
from longcat_sim.specs.serve import Serve

FIELDS = (
    "arrival", "scheduled", "first", "last", "input", "output", "cached", "preemptions", "retries", "replica",
    "decode_replica", "status", "session", "turn", "tool",
)  # fmt: skip


def step_seconds(batch: Any, context: Any, tokens: Any, keys: Any) -> Any:
    """Give a step a fixed part and terms that are not round in nanoseconds."""
    return 1.0007e-3 + batch * 13.1e-6 + batch * context * 7.77e-8 + tokens * 11.3e-6 + tokens * keys * 3.1e-9


GRIDS = [
    StepTimeGrid.from_function(step_seconds, max_batch=64, max_context=longest, max_prefill_tokens=tokens)
    for longest, tokens in ((4096, 512), (130, 150))
]
"""One that holds every step, and one that runs leave on their way."""


@st.composite
def scenarios(draw: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    sessions = draw(st.booleans())
    closed = draw(st.integers(0, 3)) == 0
    block = pick(4, 16)
    workload: dict[str, Any] = {
        "arrivals": {"process": "closed_loop", "concurrency": draw(st.integers(1, 20))}
        if closed
        else {"process": pick("poisson", "gamma", "constant", "diurnal"), "rate": f"{pick(5, 40, 200)} /s", "cv": 2.0,
              "period": "3 s"},
        "input_tokens": {"distribution": "exponential", "mean": pick(10, 120), "max": 600},
        "output_tokens": {"distribution": "exponential", "mean": pick(3, 40), "max": 200},
        "num_requests": draw(st.integers(1, 40)),
    }  # fmt: skip
    if sessions:
        workload["sessions"] = {
            "turns": {"distribution": "uniform", "min": 1, "max": 4}, "new_tokens": 30, "system_prompt_tokens": 64,
            "think_time": {"mean": "50 ms"}, "tool_call_ratio": 0.5, "tool_time": {"mean": "10 ms"},
        }  # fmt: skip
    replicas = draw(st.integers(1, 3))
    disaggregated = draw(st.integers(0, 3)) == 0
    acceptance = pick((), (), (0.8,), (0.7, 0.5))
    serve: dict[str, Any] = {
        "workload": workload,
        "replicas": replicas,
        "router": pick("round_robin", "least_loaded", "prefix_aware"),
        "scheduler": {
            "policy": pick("fcfs", "priority"),
            "max_num_seqs": pick(1, 3, 16, 64),
            "max_num_batched_tokens": pick(192, 512),
            "block_tokens": block,
            "num_kv_blocks": pick(1600, 3000, 20000) // block,
            "watermark": pick(0.0, 0.02),
            "multi_step": pick(1, 1, 1, 4),
            "prefix_cache": draw(st.booleans()),
            "async_scheduling": draw(st.booleans()),
        },
        "slo": [{"name": "a", "ttft": "1 s", "priority": 1}, {"name": "b", "priority": 0}],
        "kv_tiers": [{"name": "host", "capacity": "8 MB", "bandwidth": "1 GB/s"}] if draw(st.booleans()) else [],
    }
    pools = ["shared"]
    if disaggregated:
        serve["prefill"] = {"replicas": replicas}
        serve["decode"] = {"replicas": draw(st.integers(1, 2))}
        pools = ["prefill", "decode"]
    faults, lost = [], []
    for _ in range(draw(st.integers(0, 2))):
        pool = pick(*pools)
        size = serve[pool]["replicas"] if disaggregated else replicas
        kind = pick("replica_loss", "slow_rank", *(["link_degradation"] if disaggregated else []))
        place = {} if kind == "link_degradation" else {"pool": pool, "replica": draw(st.integers(0, size - 1))}
        at, duration = draw(st.integers(1, 900)), draw(st.integers(1, 300))
        if kind == "replica_loss":
            if any(one == place and at < end and start < at + duration for one, start, end in lost):
                continue  # what is down cannot be lost
            lost.append((dict(place), at, at + duration))
            place["in_flight"] = pick("retry", "fail")
        faults.append({"kind": kind, "at": f"{at} ms", "duration": f"{duration} ms", **place})
    serve["faults"] = faults
    if not disaggregated and draw(st.integers(0, 4)) == 0:
        serve["autoscaler"] = {"max_replicas": replicas + 1, "interval": "100 ms"}
    seed, grid = draw(st.integers(0, 5)), draw(st.integers(0, 1))
    return serve, {"acceptance": acceptance, "seed": seed, "disaggregated": disaggregated, "grid": grid}


def serve_once(spec: dict[str, Any], extra: dict[str, Any], **settings_: Any) -> ServingResult:
    engine = Engine(GRIDS[extra.get("grid", 0)], 100, 1, weight_load_s=0.05, kv_bytes_per_token=1000.0, num_layers=8)
    engines: Any = {"prefill": engine, "decode": engine} if extra["disaggregated"] else engine
    return simulate_serving(
        Serve.model_validate(spec), engines, kv_link=KvLink(2e7, 1e-4), acceptance=extra["acceptance"],
        seed=extra["seed"], **settings_,
    )  # fmt: skip


def same(one: ServingResult, other: ServingResult) -> None:
    for name in FIELDS:
        np.testing.assert_array_equal(one.records.numpy(name), other.records.numpy(name), err_msg=name)
    assert one.records.reasons == other.records.reasons
    first, second = one.metrics(), other.metrics()
    first.pop("wall_s"), second.pop("wall_s")
    assert first == second
    assert np.array_equal(one.gaps.bins, other.gaps.bins)
    assert one.checks == other.checks


def compare(scenario: tuple[dict[str, Any], dict[str, Any]]) -> ServingResult:
    spec, extra = scenario
    fast = serve_once(spec, extra, debug=True)
    same(fast, serve_once(spec, extra, step_by_step=True, debug=True))
    same(fast, serve_once(spec, extra))
    return fast


def test_lost_replica_that_was_blocked_serves_again_after_its_return() -> None:
    """A scenario that once got stuck: the queue was blocked for KV blocks when the replica was lost."""
    sessions = {
        "turns": {"distribution": "uniform", "min": 1, "max": 4}, "new_tokens": 30, "system_prompt_tokens": 64,
        "think_time": {"mean": "50 ms"}, "tool_call_ratio": 0.5, "tool_time": {"mean": "10 ms"},
    }  # fmt: skip
    workload = {
        "arrivals": {"process": "diurnal", "rate": "200 /s", "cv": 2.0, "period": "3 s"},
        "input_tokens": {"distribution": "exponential", "mean": 120, "max": 600},
        "output_tokens": {"distribution": "exponential", "mean": 40, "max": 200},
        "num_requests": 30, "sessions": sessions,
    }  # fmt: skip
    for policy in ("fcfs", "priority"):
        spec = {
            "workload": workload, "replicas": 2, "router": "least_loaded",
            "scheduler": {"policy": policy, "max_num_seqs": 64, "max_num_batched_tokens": 512, "num_kv_blocks": 100},
            "kv_tiers": [{"name": "host", "capacity": "8 MB", "bandwidth": "1 GB/s"}],
            "faults": [{"kind": "replica_loss", "at": "129 ms", "duration": "94 ms"}],
        }  # fmt: skip
        checks = compare((spec, {"acceptance": (0.7, 0.5), "seed": 3, "disaggregated": False})).checks
        assert checks["requests"] > 0
        assert checks["completed"] == checks["requests"] - checks["rejected"] - checks["failed"]


@pytest.mark.parametrize("acceptance", [(), (0.8,)])
def test_a_run_that_leaves_the_grid_on_its_way_counts_the_steps_outside(acceptance: tuple[float, ...]) -> None:
    workload = {
        "arrivals": {"rate": "20 /s"}, "input_tokens": 100, "num_requests": 30,
        "output_tokens": {"distribution": "exponential", "mean": 60, "max": 200},
    }  # fmt: skip
    spec = {"workload": workload, "scheduler": {"max_num_seqs": 8, "max_num_batched_tokens": 192}}
    found = compare((spec, {"acceptance": acceptance, "seed": 1, "disaggregated": False, "grid": 1})).metrics()
    assert 0.1 < found["extrapolated_step_ratio"] < 0.9


def test_the_last_step_within_the_grid_is_not_outside() -> None:
    """Contexts of 121 to 130 in ten decode steps; the eleventh attends to 131 tokens."""
    for output, outside in ((11, 0), (12, 1)):
        workload = {
            "arrivals": {"rate": "1 /s"}, "input_tokens": 120, "output_tokens": output, "num_requests": 1,
        }  # fmt: skip
        spec = {"workload": workload, "scheduler": {"max_num_seqs": 8, "max_num_batched_tokens": 192}}
        found = compare((spec, {"acceptance": (), "seed": 0, "disaggregated": False, "grid": 1}))
        assert found.pools["shared"].outside_steps == outside


CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large]


@settings(max_examples=40, deadline=None, suppress_health_check=CHECKS)
@given(scenarios())
def test_step_by_step_gives_the_same_bits(scenario: tuple[dict[str, Any], dict[str, Any]]) -> None:
    compare(scenario)


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=CHECKS)
@given(scenarios())
def test_step_by_step_gives_the_same_bits_at_length(scenario: tuple[dict[str, Any], dict[str, Any]]) -> None:
    compare(scenario)
