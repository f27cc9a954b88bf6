"""One price: ``simulate`` and ``capacity`` print the same USD for the same fleet and load, and its lines add up."""

from __future__ import annotations

import json

import numpy as np
import pytest

from longcat_sim.cli import main
from longcat_sim.simulation.metrics import counted_window_s
from longcat_sim.specs.scenario import Scenario, scenario
from longcat_sim.studies.fleet_figures import assess_fleet, simulate_fleet
from longcat_sim.studies.served import serve_once
from longcat_sim.studies.simulate import simulate

SHARED = {
    "model": "llama-3.1-8b", "hardware": "h100-sxm",
    "deployment": {"num_gpus": 1, "precision": {"weights": "bf16", "attention": "bf16", "kv_cache": "bf16"}},
    "serve": {
        "workload": {
            "arrivals": {"process": "poisson", "rate": "30 /s"}, "num_requests": 1200, "warm_up": "12 s",
            "input_tokens": {"distribution": "exponential", "mean": 500},
            "output_tokens": {"distribution": "exponential", "mean": 200},
        },
        "replicas": 2, "scheduler": {"max_num_seqs": 256, "max_num_batched_tokens": 2048},
        "slo": [{"name": "default", "ttft": "1 s", "tpot": "25 ms"}],
    },
    "search": {"num_gpus": [1], "max_gpus": 2, "survivors": 2},
    "price": {"usd_per_gpu_hour": 2.5}, "draws": 3,
}  # fmt: skip
PRICES = (
    "usd_per_million_input_tokens", "usd_per_million_output_tokens", "usd_per_million_output_tokens_all_in",
)  # fmt: skip


@pytest.fixture(scope="module", params=["shared", "split"])
def fleet(request: pytest.FixtureRequest) -> Scenario:
    base = scenario(SHARED)
    if request.param == "shared":
        return base
    return base.what_if(
        {
            "serve.replicas": 1, "serve.prefill": {"replicas": 1},
            "serve.decode": {"replicas": 2, "hardware": "h200-sxm"},
            "price": {"hardware_usd_per_gpu_hour": {"h100-sxm": 2.5, "h200-sxm": 4.0}},
        }
    )  # fmt: skip


def test_both_commands_print_one_price(fleet: Scenario) -> None:
    simulated, searched = simulate(fleet), assess_fleet(fleet)
    for name in PRICES:
        assert searched[name] == pytest.approx(simulated[name], rel=1e-12)
        assert simulated.intervals is not None  # type: ignore[union-attr]
        low = min(simulated.intervals[name]["p5"], simulated[name])  # type: ignore[union-attr]
        assert searched[f"{name}_p5"] == pytest.approx(low, rel=1e-9)


def test_lines_and_tokens_add_up_to_gpu_hours_times_price(fleet: Scenario) -> None:
    _, got = serve_once(fleet)
    prices = {"shared": 2.5, "prefill": 2.5, "decode": 4.0}
    paid = sum(hours * prices[pool] for pool, hours in got["gpu_hours_by_pool"].items())
    lines = got["bill_usd"]
    assert sum(usd for name, usd in lines.items() if name != "total") == pytest.approx(paid, rel=1e-9)
    assert min(lines.values()) >= 0
    # the printed prices of the printed tokens are the whole bill: warm-up tokens are in neither
    by_tokens = got["usd_per_million_output_tokens"] * got["output_tokens"]
    by_tokens += got["usd_per_million_input_tokens"] * got["uncached_input_tokens"]
    if got["cached_input_tokens"]:
        by_tokens += got["usd_per_million_cached_input_tokens"] * got["cached_input_tokens"]
    assert by_tokens / 1e6 == pytest.approx(paid, rel=1e-9)
    assert got["usd_per_million_output_tokens_all_in"] * got["output_tokens"] / 1e6 == pytest.approx(paid, rel=1e-9)


def test_gpu_hours_cover_the_window_of_the_tokens(fleet: Scenario) -> None:
    """A fixed fleet is paid from the warm-up's end to the last arrival: near 1200 / 30 - 12 s."""
    _, got = serve_once(fleet)
    start, end = got["window_s"]
    assert start == 12.0
    assert end == pytest.approx(40, abs=5)
    gpus = {"shared": 2, "prefill": 1, "decode": 2}
    for pool, hours in got["gpu_hours_by_pool"].items():
        assert hours == pytest.approx(gpus[pool] * (end - start) / 3600, rel=1e-9)
        assert got["busy_s_by_pool"][pool] + got["idle_s_by_pool"][pool] == pytest.approx(hours * 3600, rel=1e-9)


def test_the_price_is_that_of_the_load_whatever_the_length_of_the_run(fleet: Scenario) -> None:
    """Fleet USD per second over output tokens per second asked for, within the noise of 200 x exponential lengths."""
    usd_per_s = sum(
        gpus * price for gpus, price in (((2, 2.5),) if fleet.serve.prefill is None else ((1, 2.5), (2, 4.0)))  # type: ignore[union-attr]
    ) / 3600  # fmt: skip
    expected = usd_per_s / (30 * 200) * 1e6
    for requests in (600, 1200, 2400):
        got = simulate_fleet(fleet.what_if({"serve.workload.num_requests": requests}))
        assert got["usd_per_million_output_tokens_all_in"] == pytest.approx(expected, rel=0.15), requests


def test_a_fleet_that_cannot_keep_up_delivers_the_same_at_any_load() -> None:
    """Rates and prices hold what it does while requests come, not what it does for those of the warm-up alone."""
    rows = []
    for rate in (100, 200, 400):
        crowded = scenario(
            SHARED, {"serve.workload.arrivals.rate": f"{rate} /s", "serve.workload.num_requests": rate * 60,
                     "serve.workload.warm_up": "20 s"},
        )  # fmt: skip
        run, got = serve_once(crowded)
        assert got["unstable"]
        assert got["window_s"] == pytest.approx((20.0, float(run.records.numpy("arrival").max()) * 1e-9))
        assert got["bill_usd"]["idle"] >= 0
        first, last, output = (run.records.numpy(name) for name in ("first", "last", "output"))
        full = (output > 1) & (first > 20e9) & (last < got["window_s"][1] * 1e9)
        tpot_s = float((last - first)[full].sum()) * 1e-9 / float((output - 1)[full].sum())
        # Little's law, over batches that are full
        assert got["decode_sequences_per_replica"] / tpot_s == pytest.approx(
            got["output_tokens_per_s"] / run.pools["shared"].num_replicas, rel=0.05
        )
        rows.append([got["output_tokens_per_s"], 1 / got["usd_per_million_output_tokens_all_in"]])
    assert (np.ptp(rows, axis=0) < 0.03 * np.mean(rows, axis=0)).all()


def test_a_window_ends_with_the_last_arrival_only_in_a_steady_state() -> None:
    arrival = np.arange(0.0, 100.0) * 1e9
    last = arrival + 10e9
    stay = last - arrival
    assert counted_window_s(arrival, last, stay) == pytest.approx((0.0, 99.0))
    assert counted_window_s(arrival, last, stay, warm_up_s=20.0) == pytest.approx((20.0, 99.0))
    batch = np.zeros(5), np.full(5, 3e9), np.full(5, 3e9)  # there is no rate to price
    assert counted_window_s(*batch) == pytest.approx((0.0, 3.0))
    assert counted_window_s(np.empty(0), np.empty(0), np.empty(0), warm_up_s=2.0) == (2.0, 2.0)


def test_what_is_drained_costs_nothing_on_demand_alone() -> None:
    """A fleet that an autoscaler halves is paid whole where it is rented; one that never changes costs the same."""
    for scaled in (False, True):
        of = scenario(SHARED, {"serve.workload.arrivals.rate": "5 /s", "serve.workload.num_requests": 300})
        if scaled:
            of = of.what_if({"serve.replicas": 1, "serve.autoscaler": {"max_replicas": 2, "interval": "1 s"}})
        rented, on_demand = (
            serve_once(of.what_if({"price": {"usd_per_gpu_hour": 2.5, "basis": basis}}))[1]
            for basis in ("rental", "on_demand")
        )
        start, end = rented["window_s"]
        assert rented["bill_usd"]["total"] == pytest.approx(2 * 2.5 * (end - start) / 3600)
        share = on_demand["bill_usd"]["total"] / rented["bill_usd"]["total"]
        assert share == pytest.approx(0.5, abs=0.1) if scaled else share == pytest.approx(1.0)


def test_rates_times_prices_are_what_an_hour_costs(fleet: Scenario) -> None:
    """However long the last request takes: rates and bill are over one window."""
    _, got = serve_once(fleet.what_if({"serve.workload.output_tokens": {"distribution": "exponential", "mean": 400}}))
    start, end = got["window_s"]
    assert got["duration_s"] > end - start
    per_hour = got["bill_usd"]["total"] / (end - start) * 3600
    priced = got["output_tokens_per_s"] * got["usd_per_million_output_tokens_all_in"] * 3600 / 1e6
    assert priced == pytest.approx(per_hour, rel=1e-9)


def test_the_search_prints_the_price_that_simulate_prints(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    import yaml

    path = tmp_path / "fleet.yaml"
    path.write_text(yaml.safe_dump({**SHARED, "draws": 1}))
    found = []
    for verb in (["capacity", str(path), "--processes", "1"], ["simulate", str(path)]):
        with pytest.raises(SystemExit) as done:
            main([*verb, "--json"])
        assert not done.value.code
        found.append(json.loads(capsys.readouterr().out))
    capacity, simulated = found
    assert capacity["winner"]["changes"]["serve.replicas"] in (1, 2)
    if capacity["winner"]["changes"]["serve.replicas"] != 2:
        with pytest.raises(SystemExit):
            main(["simulate", str(path), "--json", "--set", "serve.replicas=1"])
        simulated = json.loads(capsys.readouterr().out)
    for name in PRICES:
        assert capacity["winner"]["simulated"][name] == pytest.approx(simulated[name], rel=1e-12)


def test_a_devices_price_without_effect_is_said() -> None:
    prices = {"usd_per_gpu_hour": 2.5, "hardware_usd_per_gpu_hour": {"h100-sxm": 4.0}}
    case = scenario({**SHARED, "price": prices, "draws": 1})
    assert case.usd_per_gpu_hour == 2.5
    assert any("has no effect beside it" in note for note in simulate(case).notes)
    own = case.what_if({"price.usd_per_gpu_hour": None})
    assert own.usd_per_gpu_hour == 4.0
    assert not any("no effect" in note for note in simulate(own).notes)
