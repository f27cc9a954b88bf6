"""The search among screened fleets: the cheapest that keeps the level, whatever short runs of it say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from longcat_sim.capacity.candidates import Rejected
from longcat_sim.capacity.screen_serving import ScreenedFleets
from longcat_sim.specs.scenario import Scenario, scenario
from longcat_sim.studies import fleet_search
from longcat_sim.studies.capacity_serving import _choices, _reasons, serving_capacity
from longcat_sim.studies.fleet_figures import _error_of
from longcat_sim.studies.fleet_search import FleetSearch
from longcat_sim.studies.served import serve_once

OBJECTIVE = "usd_per_million_output_tokens_all_in"


@pytest.fixture(scope="module")
def base() -> Scenario:
    return scenario("longcat-flash-serve-capacity", {"draws": 1})


def fleets(sizes: tuple[int, ...], most: int = 256) -> ScreenedFleets:
    """Return every pair of pools of replicas of ``sizes`` GPUs, priced by their GPUs."""
    rows = []
    for prefill, decode in ((p, d) for p in sizes for d in sizes):
        for p in range(1, most // prefill):
            for d in range(1, (most - p * prefill) // decode + 1):
                pools = {"prefill": (p, prefill), "decode": (d, decode)}
                changes: dict[str, Any] = {}
                for name, (count, gpus) in pools.items():
                    changes[f"serve.{name}.replicas"] = count
                    changes[f"serve.{name}.deployment"] = {"num_gpus": gpus, "ep_size": gpus}
                rows.append((float(p * prefill + d * decode), changes))
    gpus = np.array([row[0] for row in rows])
    return ScreenedFleets(
        {OBJECTIVE: gpus, "num_gpus": gpus}, [row[1] for row in rows], [str(row[1]) for row in rows], len(rows),
        Rejected(), 0.0,
    )  # fmt: skip


class Service:
    """A level that fleets keep by the power of their pools, and short runs that are off by ``noise``."""

    def __init__(self, needed: Mapping[str, float], noise: float) -> None:
        self.needed, self.noise = needed, noise
        self.long_runs = self.short_runs = 0

    def shares(self, of: Scenario) -> dict[str, float]:
        serve, found = of.serve, {}
        assert serve is not None
        for name, pool in (("prefill", serve.prefill), ("decode", serve.decode)):
            assert pool is not None
            assert pool.deployment is not None
            gpus = pool.deployment["num_gpus"]
            found[name] = pool.replicas * gpus ** (0.9 if name == "prefill" else 1.1) / self.needed[name]
        return found

    def figures(self, of: Scenario, noise: float) -> dict[str, Any]:
        late = {name: 0.05 / share for name, share in self.shares(of).items()}
        late = {name: min(1.0, max(0.0, value + noise)) for name, value in late.items()}
        return {
            "attained": 1 - max(late.values()), "attained_error": self.noise, "unstable": False, "stay_s": 10.0,
            "missed_ttft": late["prefill"], "missed_tpot": late["decode"], "missed_e2e": 0.0,
        }  # fmt: skip

    def simulate(self, of: Scenario) -> dict[str, Any]:
        self.short_runs += 1
        rng = np.random.default_rng(sum(of.digest().encode()))
        return self.figures(of, self.noise * float(rng.uniform(-2, 2)))

    def lasting(self, of: Scenario, short: Mapping[str, Any]) -> dict[str, Any]:
        self.long_runs += 1
        return {**short, **self.figures(of, 0.0), "attained_error": 0.0}


def searched(
    of: Scenario, sizes: tuple[int, ...], service: Service, patch: pytest.MonkeyPatch
) -> tuple[float, FleetSearch]:
    patch.setattr(fleet_search, "simulate_fleet", service.simulate)
    patch.setattr(fleet_search, "lasting", service.lasting)
    screened = fleets(sizes)
    ranked = [int(i) for i in np.argsort(screened.columns["num_gpus"], kind="stable")]
    search = FleetSearch(of, screened, ranked)
    winner = search.run(ranked[:6])
    assert winner is not None
    return float(winner.screened["num_gpus"]), search


@pytest.mark.parametrize("noise", [0.0, 0.004, 0.01])
@pytest.mark.parametrize("needed", [40.0, 90.0])
def test_the_cheapest_fleet_wins_and_more_choices_give_none_that_is_dearer(
    base: Scenario, noise: float, needed: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short runs are off to either side; a miss within their error is no verdict."""
    found = []
    for sizes in ((16,), (16, 32)):
        service = Service({"prefill": needed, "decode": 30.0}, noise)
        size, search = searched(base, sizes, service, monkeypatch)
        screened = search.screened
        keeps = [min(service.shares(base.what_if(changes)).values()) >= 1 for changes in screened.changes]
        assert size == screened.columns["num_gpus"][keeps].min()
        assert service.short_runs <= 40
        assert service.long_runs <= 12
        found.append(size)
    assert found[1] <= found[0]


def test_only_what_may_still_win_gets_a_long_run(base: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise one long run tells: the cheapest that kept the level in a short one."""
    service = Service({"prefill": 60.0, "decode": 20.0}, 0.0)
    searched(base, (16, 32), service, monkeypatch)
    assert service.long_runs == 1


def test_a_search_that_ends_too_early_says_what_may_be_better(base: Scenario, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_search, "MOST_SIMULATED", 8)
    service = Service({"prefill": 90.0, "decode": 30.0}, 0.0)
    screened = fleets((16, 32))
    monkeypatch.setattr(fleet_search, "simulate_fleet", service.simulate)
    monkeypatch.setattr(fleet_search, "lasting", service.lasting)
    ranked = [int(i) for i in np.argsort(screened.columns["num_gpus"], kind="stable")]
    search = FleetSearch(base, screened, ranked)
    winner = search.run([*ranked[:5], ranked[-1]])
    assert winner is not None
    assert search.better_than(winner)
    assert len(search.rows) == 8


@pytest.mark.parametrize("noise", [0.0, 0.01])
@pytest.mark.parametrize("needed", [40.0, 90.0])
def test_what_a_winner_is_compared_with_keeps_the_level(
    base: Scenario, needed: float, noise: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of each other choice it is the cheapest, unless it is marked as without a long run."""
    service = Service({"prefill": needed, "decode": 30.0}, noise)
    size, search = searched(base, (16, 32), service, monkeypatch)
    best = search.run(())
    assert best is not None
    winner, why = _reasons(search.screened, best, search)
    assert winner is best  # nothing that was run for the comparison is better
    assert any(row["is_simulated"] for row in why)
    for row in why:
        at = search.screened.labels.index(row["deployment"])
        assert row["ratio"] == search.screened.columns["num_gpus"][at] / size >= 1
        if not row["is_simulated"]:
            continue
        flat = [_choices(changes) for changes in search.screened.changes]
        others = [
            search.screened.columns["num_gpus"][number]
            for number, changes in enumerate(search.screened.changes)
            if flat[number][row["choice"]] != row["instead_of"]
            and min(service.shares(base.what_if(changes)).values()) >= 1
        ]
        assert search.screened.columns["num_gpus"][at] == min(others)
        assert min(service.shares(base.what_if(search.screened.changes[at])).values()) >= 1


def test_the_error_of_a_share_grows_with_what_queues_together() -> None:
    rng = np.random.default_rng(0)
    alone = [_error_of(rng.uniform(size=4000) < 0.95) for _ in range(50)]
    together = [_error_of(np.repeat(rng.uniform(size=40) < 0.95, 100)) for _ in range(50)]
    assert np.mean(alone) == pytest.approx(np.sqrt(0.05 * 0.95 / 4000), rel=0.2)  # the larger of two estimates
    assert np.mean(together) == pytest.approx(np.sqrt(0.05 * 0.95 / 40), rel=0.2)
    assert _error_of(np.ones(1, dtype=bool)) == 1


def test_first_tokens_leave_the_prefill_pool_whatever_decodes_them() -> None:
    """What rules out a prefill pool, and why the screened TTFT of split pools knows no decode pool."""
    split = scenario(
        {
            "model": "llama-3.1-8b", "hardware": "h100-sxm",
            "deployment": {"num_gpus": 1, "precision": dict.fromkeys(("weights", "attention", "kv_cache"), "bf16")},
            "serve": {
                "workload": {
                    "arrivals": {"process": "poisson", "rate": "30 /s"}, "input_tokens": 1000, "output_tokens": 200,
                    "num_requests": 600,
                },
                "scheduler": {"max_num_seqs": 64}, "slo": [{"name": "default", "ttft": "100 ms", "tpot": "25 ms"}],
                "prefill": {"replicas": 2}, "decode": {"replicas": 1},
            },
            "draws": 1,
        }
    )  # fmt: skip
    runs = [serve_once(split.what_if({"serve.decode.replicas": count}), is_priced=False) for count in (1, 3)]
    first = [run.records.numpy("first") for run, _ in runs]
    assert np.array_equal(first[0], first[1])
    assert runs[0][1]["tpot_s"]["mean"] > 1.3 * runs[1][1]["tpot_s"]["mean"]


@pytest.mark.slow
def test_a_decode_pool_of_more_choices_costs_no_more(base: Scenario) -> None:
    """At 40 requests/s two deployments made a dearer fleet than one: 96 GPUs, where 80 keep the level."""
    at = base.what_if({"serve.workload.arrivals.rate": "40 /s", "search.max_gpus": 128})
    one, two = (serving_capacity(at.what_if({"search.ep_size": sizes})) for sizes in ([16], [16, 32]))
    assert two.winner.figure("num_gpus") <= one.winner.figure("num_gpus")
