"""The speed table of the serving simulator: absolute times are printed, ratios within one run are asserted.

Run ``pytest tests/bench/test_serving_speed.py -s -m ""``; LONGCAT_SIM_BENCH_FULL=1 serves the million requests.
"""

import functools
import json
import os
import resource
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longcat_sim.calibration.op_times import OpTimes
from longcat_sim.simulation.serving.cluster import Engine
from longcat_sim.simulation.serving.simulate import ServingResult, simulate_serving
from longcat_sim.specs.scenario import scenario
from longcat_sim.specs.serve import Serve
from longcat_sim.studies.engines import engine as scenario_engine

FULL = os.environ.get("LONGCAT_SIM_BENCH_FULL") == "1"
SCENARIO = "qwen3-32b-h200-serve"


@functools.cache
def engine() -> Engine:
    """Return a replica of the packaged scenario: a dense 32B model on 2 H200, step times from the fitted profile."""
    case = scenario(SCENARIO)
    assert case.serve is not None
    return scenario_engine(case, OpTimes.from_hardware(case.hardware), case.serve)


def serve(workload: dict[str, Any], router: str = "least_loaded", replicas: int = 8) -> Serve:
    case = scenario(SCENARIO).serve
    assert case is not None
    return Serve.model_validate(
        {"workload": workload, "replicas": replicas, "router": router, "scheduler": case.scheduler}
    )


def timed(spec: Serve, one: Engine, **settings: Any) -> tuple[float, ServingResult, dict[str, Any]]:
    start = time.perf_counter()
    result = simulate_serving(spec, one, **settings)
    figures = result.metrics()
    return time.perf_counter() - start, result, figures


@pytest.fixture(scope="module")
def trace(shared: Path) -> str:
    path = shared / "data" / "traces" / "mooncake_conversation.jsonl"
    if not path.is_file():
        pytest.skip("no Mooncake trace")
    return str(path)


def test_mooncake_conversation_on_eight_replicas(trace: str) -> None:
    one = engine()
    print()
    for router in ("least_loaded", "prefix_aware"):
        best = min(
            (timed(serve({"trace": trace}, router), one) for _ in range(3 if FULL else 1)), key=lambda row: row[0]
        )
        wall, result, figures = best
        print(
            f"mooncake 12,031 requests, {router}: {wall:.2f} s (limit 1.5 s, goal 0.8 s); "
            f"prefix hit ratio {figures['prefix_hit_ratio']:.3f}, {result.pools['shared'].num_steps} steps"
        )
        assert figures["completed"] == 12_031
        if router == "prefix_aware":
            assert figures["prefix_hit_ratio"] > 0.1


@pytest.mark.slow
def test_fast_forward_is_five_times_as_fast_as_step_by_step(trace: str) -> None:
    one = engine()
    spec = serve({"trace": trace, "num_requests": 1500})
    fast, a, _ = timed(spec, one)
    slow, b, _ = timed(spec, one, step_by_step=True)
    print(f"\nmooncake, first 1,500 requests: {fast:.2f} s, step by step {slow:.2f} s: {slow / fast:.1f}x")
    np.testing.assert_array_equal(a.records.numpy("last"), b.records.numpy("last"))
    assert slow / fast > 5


CHILD = """
import json, sys
from tests.bench.test_serving_speed import engine, exponential, serve, timed
wall, result, figures = timed(serve(exponential(float(sys.argv[1]), int(sys.argv[2]))), engine())
# the peak of this program's own memory: ru_maxrss would remember the test process that it was forked from
peak = next(int(row.split()[1]) for row in open("/proc/self/status") if row.startswith("VmHWM")) / 1024
print(json.dumps({"wall_s": wall, "peak_mib": peak, "completed": figures["completed"],
                  "unstable": figures["unstable"], "batch": result.gaps.sum_ns * 1e-9 / result.pools["shared"].busy_s}))
"""


def exponential(rate: float, num_requests: int) -> dict[str, Any]:
    return {
        "arrivals": {"rate": f"{rate} /s"},
        "input_tokens": {"distribution": "exponential", "mean": 1020},
        "output_tokens": {"distribution": "exponential", "mean": 211},
        "num_requests": num_requests,
    }


def highest_rate(one: Engine) -> float:
    """Return the rate at which one replica saturates, from an overloaded run."""
    _, _, figures = timed(serve(exponential(1000.0, 4000), replicas=1), one)
    return figures["sustainable_requests_per_s"]


@pytest.mark.slow
@pytest.mark.parametrize("load", [0.3, 0.8])
def test_a_million_exponential_requests(load: float) -> None:
    number = 1_000_000 if FULL else 50_000
    rate = 8 * load * highest_rate(engine())
    root = Path(__file__).parents[2]
    out = subprocess.run(
        [sys.executable, "-c", CHILD, str(rate), str(number)], capture_output=True, text=True, check=True, cwd=root
    )
    row = json.loads(out.stdout)
    print(
        f"\n{number:,} requests at rho {load}: {row['wall_s']:.1f} s = {row['wall_s'] / number * 1e6:.0f} us each "
        f"(limit 90), peak {row['peak_mib']:.0f} MiB (limit 238), mean batch {row['batch']:.1f}"
    )
    assert row["completed"] == number
    assert row["unstable"] is False
    # memory is a property of the program, not of the machine: 250 MB in all at a million
    assert row["peak_mib"] < 250e6 / 2**20


def one_rate(job: tuple[float, Engine]) -> float:
    rate, one = job
    spec = Serve.model_validate({"workload": {**exponential(rate, 10**9), "num_requests": None, "duration": "10 min"}})
    return simulate_serving(spec, one).metrics()["ttft_s"]["p99"]


@pytest.mark.slow
def test_a_hundred_rates_on_two_processes() -> None:
    one = engine()
    top = highest_rate(one)
    rates = np.linspace(0.1, 0.95, 100 if FULL else 20) * top
    start = time.perf_counter()
    with ProcessPoolExecutor(2) as pool:
        tails = list(pool.map(one_rate, [(float(rate), one) for rate in rates], chunksize=2))
    wall = time.perf_counter() - start
    print(f"\n{len(rates)} rates, rho 0.1 to 0.95, 10 min each, 2 processes: {wall:.1f} s (limit 30 s for 100)")
    assert tails[-1] > 2 * tails[0]


def test_memory_does_not_grow_with_the_trace(tmp_path: Path) -> None:
    """The reader is a stream: its peak is that of the columns, about 60 bytes a request."""
    from longcat_sim.simulation.serving.workload import TraceReader

    path = tmp_path / "long.jsonl"
    with path.open("w") as file:
        for at in range(60_000):
            file.write('{"timestamp": %d, "input_length": 1020, "output_length": 211}\n' % (at * 10))  # noqa: UP031
    reader = TraceReader(serve({"trace": str(path)}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert sum(1 for _ in reader) == 60_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096  # KiB
