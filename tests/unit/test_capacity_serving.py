"""Fleets for traffic: the fluid screen against the serving engine, and the search around both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longcat_sim.capacity.op_times import op_times_of
from longcat_sim.capacity.screen_serving import screen_fleets
from longcat_sim.capacity.traffic import Traffic
from longcat_sim.errors import CapacityError, SpecError, WorkloadError
from longcat_sim.specs.scenario import Scenario, scenario
from longcat_sim.studies.capacity_serving import serving_capacity
from longcat_sim.studies.engines import StepFunction
from longcat_sim.studies.fleet_figures import assess_fleet, highest_rate, is_met, lasting, simulate_fleet
from longcat_sim.studies.served import serve_once
from longcat_sim.studies.simulate import simulate

DOCUMENT = {
    "model": "llama-3.1-8b", "hardware": "h100-sxm",
    "deployment": {
        "num_gpus": 1, "precision": {"weights": "bf16", "attention": "bf16", "kv_cache": "bf16"},
    },
    "serve": {
        "workload": {
            "arrivals": {"process": "poisson", "rate": "40 /s"}, "input_tokens": 500, "output_tokens": 200,
            "num_requests": 4000,
        },
        "replicas": 2, "scheduler": {"max_num_seqs": 256, "max_num_batched_tokens": 2048},
        "slo": [{"name": "default", "ttft": "1 s", "tpot": "25 ms"}],
    },
    "search": {"num_gpus": [1, 2], "tp_size": [1, 2], "max_gpus": 8, "survivors": 6},
    "price": {"usd_per_gpu_hour": 2.0}, "draws": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def base() -> Scenario:
    return scenario(DOCUMENT)


def steps(of: Scenario) -> StepFunction:
    return StepFunction(of, op_times_of(of.hardware))


def test_the_means_of_a_constant_workload(base: Scenario) -> None:
    traffic = Traffic.of(base)
    assert traffic.requests_per_s == 40
    assert (traffic.input_tokens, traffic.output_tokens) == (500, 200)
    assert traffic.decode_context == 600
    assert traffic.prompt_keys == 250.5
    with pytest.raises(CapacityError, match="expected a process with a rate"):
        Traffic.of(base.what_if({"serve.workload.arrivals": {"process": "closed_loop", "concurrency": 8}}))


def test_sessions_compute_only_what_is_new(base: Scenario) -> None:
    of = base.what_if(
        {"serve.workload.sessions": {"turns": 3, "new_tokens": 100}, "serve.workload.arrivals.rate": "4 /s"}
    )
    traffic = Traffic.of(of)
    assert traffic.requests_per_s == pytest.approx(12, rel=0.01)
    # turns of 500, 800 and 1100 input tokens; the second and third compute 100 new ones
    assert traffic.input_tokens == pytest.approx(800, rel=0.01)
    assert traffic.computed_tokens == pytest.approx(700 / 3, rel=0.01)


def test_the_bill_of_a_fleet_is_its_gpus(base: Scenario) -> None:
    screened = screen_fleets(base, steps)
    row = screened.row(0)
    assert row["usd_per_million_output_tokens_all_in"] == pytest.approx(row["num_gpus"] * 2.0 / (40 * 200 * 3600) * 1e6)
    assert len(screened.labels) + sum(screened.rejected.counts.values()) == screened.looked_at
    single = [(c["serve.replicas"], i) for i, c in enumerate(screened.changes) if c["deployment.num_gpus"] == 1]
    one = dict(single)
    tpot = screened.columns["tpot_s"]
    assert tpot[one[8]] < tpot[one[4]] < tpot[one[2]]  # more replicas, smaller batches, faster tokens


@pytest.mark.slow
def test_the_fluid_screen_ranks_as_the_engine_does(base: Scenario) -> None:
    from scipy.stats import kendalltau

    screened = screen_fleets(base, steps)
    got = [simulate_fleet(base.what_if(changes), most_requests=1500) for changes in screened.changes]
    stable = [i for i, row in enumerate(got) if not row["unstable"]]
    tpot = np.array([got[i]["tpot_s"] for i in stable])
    assert len(stable) >= 6
    assert kendalltau(screened.columns["tpot_s"][stable], tpot).statistic >= 0.9
    assert np.median(np.abs(screened.columns["tpot_s"][stable] / tpot - 1)) < 0.15


@pytest.mark.slow
def test_the_winner_keeps_its_level_and_one_replica_less_does_not(base: Scenario) -> None:
    result = serving_capacity(base)
    best = base.what_if(result.winner.screened["changes"])
    assert is_met(simulate_fleet(best), base)
    assert assess_fleet(best)["attained"] >= 0.95
    rate = highest_rate(best, rtol=0.1)
    assert rate["requests_per_s"] >= 40 * 0.9
    assert rate["broken_at_requests_per_s"] > rate["requests_per_s"]
    cheaper = [i for i, row in enumerate(result.survivors) if row.figure("num_gpus") < result.winner.figure("num_gpus")]
    assert all(not is_met(result.survivors[i].figures or {}, base) for i in cheaper)
    with pytest.raises(CapacityError, match=r"serve\.slo: expected a fleet"):
        serving_capacity(
            base.what_if({"search.max_gpus": 2, "serve.slo": [{"name": "d", "tpot": "6 ms", "ttft": "1 s"}]})
        )


def test_nothing_that_was_simulated_and_kept_the_level_is_better_than_the_winner(base: Scenario) -> None:
    """Even where the first fleet that was simulated is larger than it need be; so does what says why it wins."""
    for survivors in (1, 6):
        case = base.what_if({"search.survivors": survivors, "search.num_gpus": [1], "search.tp_size": [1]})
        result = serving_capacity(case)
        replicas = {row.figure("num_gpus"): is_met(row.figures or {}, case) for row in result.survivors}
        assert min(size for size, is_kept in replicas.items() if is_kept) == result.winner.figure("num_gpus")
        assert all(row["ratio"] >= 1 for row in result.why)
        kept = {row.screened["deployment"] for row in result.survivors if is_met(row.figures or {}, case)}
        assert all(row["deployment"] in kept for row in result.why if row["is_simulated"])
        assert all(row["keeps_level"] == (row["deployment"] in kept) for row in result.pareto)


def test_what_the_answer_costs_is_its_month_over_the_tokens_of_its_traffic(base: Scenario) -> None:
    """However few requests the scenario has: 300 of them are mostly the filling of a fleet."""
    for changes in ({}, {"serve.workload.num_requests": 300, "serve.workload.warm_up": "1 s"}):
        case = base.what_if({"search.num_gpus": [1], "search.tp_size": [1], **changes})
        result = serving_capacity(case)
        fleet, winner = result.max_rate_at_slo, result.winner
        rent = case.usd_per_gpu_hour * winner.figure("num_gpus")
        assert fleet["usd_per_month"] == pytest.approx(rent * 8766 / 12, rel=1e-6)
        whole = rent / (fleet["output_tokens_per_s"] * 3600 / 1e6)
        assert fleet["usd_per_million_output_tokens"] == pytest.approx(whole, rel=1e-6)
        assert f"cost        {whole:.4g} " in str(result)
        assert winner.screened["deployment"] in {row["deployment"] for row in result.pareto}
        # a run of a few thousand requests serves about as many tokens as its traffic has on average
        assert winner.figure("usd_per_million_output_tokens_all_in") == pytest.approx(whole, rel=0.1)


def test_a_first_token_below_the_physical_limit_says_the_limit(base: Scenario) -> None:
    """500 tokens of 8 B parameters on 2 GPUs at 1,979 TFLOP/s of fp8: 2.02 ms; or 14 GB of weights on 2 x 3.35 TB/s."""
    slo = [{"name": "d", "ttft": "1 ms", "tpot": "25 ms"}]
    with pytest.raises(CapacityError, match=r"ttft: expected at least [\d.]+ ms, .*prompt of 500 tokens.*got 1 ms"):
        serving_capacity(base.what_if({"serve.slo": slo}))


def test_a_probability_that_the_draws_cannot_show_says_how_many_can(base: Scenario) -> None:
    with pytest.raises(CapacityError, match=r"at most 0\.900, which 4 draws .*got 0\.95; .*set draws: 9"):
        serving_capacity(base.what_if({"search.probability": 0.95, "draws": 4}))


def test_a_fleet_is_judged_when_it_holds_what_it_will_hold(base: Scenario) -> None:
    """Whatever length of traffic the scenario has: 300 requests of 20 /s end before a replica has filled."""
    stays = {"serve.workload.output_tokens": 600, "serve.workload.arrivals.rate": "20 /s"}
    short = base.what_if({**stays, "serve.workload.num_requests": 300, "serve.workload.warm_up": "1 s"})
    long = base.what_if({**stays, "serve.workload.num_requests": 3500, "serve.workload.warm_up": "60 s"})
    got, steady = simulate_fleet(short), simulate_fleet(long)
    assert got["requests"] > 450
    assert got["tpot_s"] == pytest.approx(steady["tpot_s"], rel=0.05)
    name = "usd_per_million_output_tokens_all_in"
    assert got[name] == pytest.approx(steady[name], rel=0.1)
    assert got[name] == pytest.approx(2 * 2.0 / 3600 / (20 * 600) * 1e6, rel=0.1)  # the fleet over what is asked of it


def test_settings_that_traffic_does_not_know_are_refused_or_named(base: Scenario) -> None:
    with pytest.raises(CapacityError, match=r"search\.tpot: expected none under traffic"):
        serving_capacity(base.what_if({"search.tpot": "10 ms"}))
    split = base.what_if({"serve.prefill": {"replicas": 1}, "serve.decode": {"replicas": 1}})
    assert any("serve.replicas = 2 has no effect beside pools" in note for note in simulate(split).notes)
    with pytest.raises(WorkloadError, match=r"warm_up: expected less than the traffic lasts"):
        serve_once(base.what_if({"serve.workload.warm_up": "1 h"}))
    with pytest.raises(SpecError, match="greater than or equal to 0"):
        base.what_if({"seed": -1})


@pytest.mark.slow
def test_headroom_is_what_is_left_without_the_spares(base: Scenario) -> None:
    plain, spare = serving_capacity(base), serving_capacity(base.what_if({"search.spare_replicas": 1}))
    assert spare.max_rate_at_slo["num_gpus"] > plain.max_rate_at_slo["num_gpus"]
    rates = [found.max_rate_at_slo["requests_per_s"] for found in (plain, spare)]
    assert rates[1] == pytest.approx(rates[0], rel=0.15)
    assert "without its spares" in str(spare)


@pytest.mark.slow
def test_headroom_lasts(base: Scenario) -> None:
    """Spread lengths near the level: at the rate that short runs call kept, queues fill for minutes."""
    spread = base.what_if(
        {
            "serve.workload.input_tokens": {"distribution": "lognormal", "mean": 1500, "cv": 1.2, "max": 20000},
            "serve.workload.output_tokens": {"distribution": "lognormal", "mean": 300, "cv": 1.0, "max": 4000},
            "serve.slo": [{"name": "default", "ttft": "2 s", "tpot": "30 ms"}],
            "serve.workload.arrivals.rate": "10 /s",
        }
    )
    rate = highest_rate(spread)["requests_per_s"]
    for seed, least in ((0, 0.95), (1, 0.9)):
        many = {"seed": seed, "serve.workload.arrivals.rate": f"{rate} /s", "serve.workload.num_requests": 20_000}
        assert simulate(spread.what_if(many)).figures["slo"]["default"]["attained_ratio"] >= least


@pytest.mark.slow
def test_a_search_goes_on_while_something_cheaper_may_keep_the_level(base: Scenario) -> None:
    """The fluid model only ranks: of three survivors two are the cheapest, which fail here, and one is of the front."""
    tight = {"serve.slo": [{"name": "default", "ttft": "1 s", "tpot": "11 ms"}], "search.max_gpus": 16}
    few = serving_capacity(base.what_if({**tight, "search.survivors": 3}))
    many = serving_capacity(base.what_if({**tight, "search.survivors": 40}))
    assert few.winner.screened["changes"] == many.winner.screened["changes"]
    assert len(few.survivors) < len(many.survivors)


@pytest.mark.slow
def test_a_level_on_the_whole_answer_is_found(base: Scenario) -> None:
    """The cheapest fleets miss it, of whatever deployments; one of another, with as much load, keeps it."""
    slo = {"serve.slo": [{"name": "default", "e2e": "1.6 s"}], "search.max_gpus": 16, "search.survivors": 4}
    assert serving_capacity(base.what_if(slo)).winner.figure("attained") >= 0.95


@pytest.mark.slow
def test_the_rate_of_a_trace_is_judged_over_the_trace(base: Scenario, tmp_path: Path) -> None:
    """A trace that is quiet at first: its own rate, which the fleet keeps, is a rate that the search finds."""
    lines, at = [], 0.0
    for number in range(6000):
        at += 1.0 if number < 1500 else 0.1
        lines.append(json.dumps({"arrival_s": at, "input_tokens": 500, "output_tokens": 200}))
    path = tmp_path / "ramp.jsonl"
    path.write_text("\n".join(lines))
    trace = {"serve.workload": {"trace": str(path), "format": "jsonl"}, "serve.replicas": 2}
    fleet = base.what_if(trace)
    assert is_met(simulate_fleet(fleet, times_long=1), fleet)
    rate = highest_rate(fleet, rtol=0.1)
    assert rate["attained"] >= 0.95
    assert rate["requests_per_s"] >= Traffic.of(fleet).requests_per_s


@pytest.mark.slow
def test_a_decode_pool_that_only_just_holds_its_sequences_keeps_no_level() -> None:
    """At 95 requests/s one pool of 32 GPUs decodes 2,041 of 2,048 sequences over 16,000 requests, most within their
    level; over 80,000 the queue behind it grows. Two pools of 16 cost the same."""
    case = scenario("longcat-flash-serve-capacity", {"draws": 1, "serve.workload.arrivals.rate": "95 /s"})

    def pool(replicas: int, gpus: int) -> dict[str, Any]:
        sizes = {"num_gpus": gpus, "ep_size": gpus, "tp_size": 1, "dense_tp_size": 4, "overlap": "sbo"}
        return {"replicas": replicas, "deployment": sizes}

    found = []
    for decode in (pool(1, 32), pool(2, 16)):
        fleet = case.what_if({"serve.prefill": pool(8, 16), "serve.decode": decode})
        short = simulate_fleet(fleet)
        assert is_met(short, fleet)
        found.append(lasting(fleet, short)["attained"])
    assert found[0] < 0.9
    assert found[1] > 0.94


@pytest.mark.slow
def test_the_packaged_fleet_has_an_answer() -> None:
    result = serving_capacity(scenario("longcat-flash-serve-capacity", {"draws": 1}))
    assert result.winner.figure("attained") >= 0.95
    assert all(reason["ratio"] >= 1 for reason in result.why)
