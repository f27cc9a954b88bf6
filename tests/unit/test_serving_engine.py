"""The serving engine: scheduling rules, KV cache, pools, faults, sessions, metrics, by figures worked out by hand."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longcat_sim.errors import SpecError, WorkloadError
from longcat_sim.records.request import read_requests, write_requests
from longcat_sim.simulation import metrics
from longcat_sim.simulation.serving.cluster import Engine, KvLink
from longcat_sim.simulation.serving.drafts import Drafts
from longcat_sim.simulation.serving.kv_cache import KvCache, Tier
from longcat_sim.simulation.serving.request import GapHistogram, Request
from longcat_sim.simulation.serving.simulate import ServingResult, simulate_seeds, simulate_serving
from longcat_sim.simulation.serving.step_times import LinearStepTimes, StepTimeGrid
from longcat_sim.specs.serve import Serve

MS = 1_000_000
PLAIN = LinearStepTimes(fixed_ns=10 * MS, per_prefill_token_ns=MS)
"""10 ms a step and 1 ms per prompt token."""


def requests(*rows: tuple[float, int, int]) -> list[Request]:
    return [Request(0, round(at * 1e9), tokens, output) for at, tokens, output in rows]


def serve_spec(**changes: Any) -> Serve:
    workload = {"arrivals": {"rate": "1 /s"}, "input_tokens": 1, "output_tokens": 1, "num_requests": 1}
    return Serve.model_validate({"workload": workload, **changes})


def play(rows: list[tuple[float, int, int]], blocks: int = 10_000, times: Any = PLAIN, **changes: Any) -> ServingResult:
    return simulate_serving(serve_spec(**changes), Engine(times, blocks), requests=requests(*rows), debug=True)


def test_arrival_joins_the_first_boundary_at_or_after_it() -> None:
    # steps: prefill of 10 tokens 0..20 ms, then decode each 10 ms. The second comes at 30 ms, exactly a boundary.
    records = play([(0.0, 10, 5), (0.030, 10, 1), (0.041, 10, 1)]).records
    assert records[1].scheduled_s == pytest.approx(0.030)
    assert records[1].first_token_s == pytest.approx(0.050)
    assert records[2].scheduled_s == pytest.approx(0.050)
    assert records[0].last_token_s == pytest.approx(0.080)  # 20, 30, 50, 70, 80: the two prefills delay it


def test_asynchronous_scheduling_joins_one_step_later() -> None:
    rows = [(0.0, 10, 8), (0.035, 10, 1)]
    plain = play(rows).records
    late = play(rows, scheduler={"async_scheduling": True}).records
    assert plain[1].scheduled_s == pytest.approx(0.040)
    assert late[1].scheduled_s == pytest.approx(0.050)


def test_chunked_prefill_shares_the_token_budget_with_decode() -> None:
    scheduler = {"max_num_seqs": 8, "max_num_batched_tokens": 16}
    records = play([(0.0, 4, 10), (0.001, 40, 1)], scheduler=scheduler).records
    # prefill of 4: 14 ms; then 15 + 15 + 10 prompt tokens beside one decode: 25 + 25 + 20 ms
    assert records[1].first_token_s == pytest.approx(0.014 + 0.025 + 0.025 + 0.020)


def test_without_chunked_prefill_a_prompt_waits_for_a_whole_budget() -> None:
    scheduler = {"max_num_seqs": 8, "max_num_batched_tokens": 16, "chunked_prefill": False}
    result = play([(0.0, 10, 1), (0.0, 10, 1), (0.0, 40, 1)], scheduler=scheduler)
    assert [r.scheduled_s for r in result.records][:2] == [0.0, pytest.approx(0.020)]
    assert result.records[2].status == "rejected"
    assert "exceeds max_num_batched_tokens" in result.records[2].reason


def test_max_num_seqs_queues_and_fcfs_keeps_order() -> None:
    records = play([(0.0, 1, 3), (0.0, 1, 3), (0.0, 1, 3)], scheduler={"max_num_seqs": 1}).records
    starts = [r.scheduled_s for r in records]
    assert starts == [0.0, pytest.approx(0.031), pytest.approx(0.062)]


def test_priority_goes_first() -> None:
    rows = requests((0.0, 1, 5), (0.001, 1, 1), (0.002, 1, 1))
    rows[1].priority, rows[2].priority = 1, 0
    spec = serve_spec(scheduler={"max_num_seqs": 1, "policy": "priority"})
    records = simulate_serving(spec, Engine(PLAIN, 1000), requests=rows).records
    assert records[2].scheduled_s < records[1].scheduled_s  # type: ignore[operator]


def test_preemption_throws_out_the_last_and_recomputes_it() -> None:
    # 8 blocks of 4 tokens; each holds 2 blocks at first and 5 at its end (8 + 11 tokens): together 10
    scheduler = {"block_tokens": 4, "max_num_seqs": 4, "prefix_cache": False}
    result = play([(0.0, 8, 12), (0.0, 8, 12)], blocks=8, scheduler=scheduler)
    first, second = result.records
    assert (first.preemptions, second.preemptions) == (0, 1)
    assert first.output_tokens == second.output_tokens == 12
    # both have 8 + 8 tokens in KV when blocks run out, at the ninth token; the second waits for the first's end
    assert first.last_token_s == pytest.approx(0.026 + 11 * 0.010)
    # 8 + 9 tokens are computed again, 17 ms + 10 ms, and 2 more steps follow
    assert second.last_token_s == pytest.approx(first.last_token_s + 0.027 + 2 * 0.010)
    assert result.pools["shared"].prefilled_tokens == 8 + 8 + 17


def test_preempted_request_finds_its_blocks_in_the_prefix_cache() -> None:
    scheduler = {"block_tokens": 4, "max_num_seqs": 4}
    result = play([(0.0, 8, 12), (0.0, 8, 12)], blocks=8, scheduler=scheduler)
    assert result.preemptions == 1
    assert result.pools["shared"].prefilled_tokens < 8 + 8 + 17


def test_request_that_can_never_fit_is_rejected_and_reported() -> None:
    result = play([(0.0, 100, 10), (0.0, 5, 5)], blocks=4)
    assert [r.status for r in result.records] == ["rejected", "completed"]
    assert "needs 7 KV blocks of 16 tokens" in result.records[0].reason
    assert result.metrics()["rejected"] == 1


def test_watermark_keeps_blocks_free_at_admission() -> None:
    rows = [(0.0, 60, 2), (0.0, 60, 2)]
    assert play(rows, blocks=10).records[1].scheduled_s == 0.0
    held = play(rows, blocks=10, scheduler={"watermark": 0.3}).records
    assert held[1].scheduled_s == pytest.approx(held[0].last_token_s)


def test_prefix_cache_hits_whole_blocks_but_never_the_last_token() -> None:
    rows = requests((0.0, 64, 1), (1.0, 64, 1), (2.0, 80, 1))
    keys = list(range(100, 105))
    for row in rows:
        row.chain = [(keys[: row.input // 16], 1)]
    result = simulate_serving(serve_spec(), Engine(PLAIN, 1000), requests=rows, debug=True)
    assert [r.cached_tokens for r in result.records] == [0, 48, 64]
    assert result.metrics()["prefix_hit_ratio"] == pytest.approx(112 / 208)
    assert result.records[1].ttft_s == pytest.approx(0.010 + 0.016)


def test_cache_evicts_the_least_recent_chain_from_its_end() -> None:
    cache = KvCache(8)
    for keys in ([1, 2, 3], [4, 5]):
        node, shared = cache.insert(keys, 1, None)
        cache.shared += shared
        cache.shared -= shared
        cache.unpin(node)
    cache.evict(2)
    assert cache.match([([1, 2, 3], 1)], 99)[0] == 1
    assert cache.match([([4, 5], 1)], 99)[0] == 2
    cache.pin(cache.match([([1, 9], 1)], 99))
    cache.evict(2)
    assert cache.match([([4, 5], 1)], 99)[0] == 0
    assert cache.match([([1, 2, 3], 1)], 99)[0] == 1


def test_evicted_blocks_come_back_from_the_host_tier() -> None:
    rows = requests((0.0, 64, 1), (1.0, 64, 1), (2.0, 64, 1))
    for row, first in zip(rows, (0, 50, 0), strict=True):
        row.chain = [(list(range(first, first + 4)), 1)]
    tiers = [{"name": "host", "capacity": "1 MB", "bandwidth": "1 MB/s", "latency": "2 ms"}]
    engine = Engine(PLAIN, 6, kv_bytes_per_token=100.0)
    result = simulate_serving(serve_spec(kv_tiers=tiers), engine, requests=rows, debug=True)
    assert result.records[2].cached_tokens == 48
    # two of its three blocks were evicted, 3,200 B at 1 MB/s after 2 ms, then 16 tokens are computed
    loads = (result.records[2].ttft_s or 0) - 0.026 - 0.002
    assert loads in (pytest.approx(0.0016), pytest.approx(0.0032), pytest.approx(0.0048))


def test_tier_forgets_the_oldest() -> None:
    tier = Tier("disk", 4, 1.0, 0)
    assert [tier.put(key, 2) for key in (1, 2)] == [[], []]
    assert tier.put(3, 2) == [(1, 2)]
    assert tier.put(2, 2) == []
    assert tier.put(4, 2) == [(3, 2)]
    assert tier.put(5, 5) == [(5, 5)]


def test_drafts_emit_what_acceptance_says_and_do_not_depend_on_call_order() -> None:
    drafts = Drafts((0.8, 0.5), seed=1)
    lengths = [len(drafts.cumulative(request, 0, 1000)) - 1 for request in range(200)]
    # 1 + 0.8 + 0.8 x 0.5 tokens per step
    assert 1000 / np.mean(lengths) == pytest.approx(2.2, rel=0.01)
    again = Drafts((0.8, 0.5), seed=1).cumulative(7, 0, 1000)
    np.testing.assert_array_equal(again, drafts.cumulative(7, 0, 1000))
    assert again[-1] == 1000


def test_multi_step_scheduling_lets_arrivals_wait_for_the_decision() -> None:
    rows = [(0.0, 1, 20), (0.012, 1, 1)]
    assert play(rows).records[1].scheduled_s == pytest.approx(0.021)
    slow = play(rows, scheduler={"multi_step": 4}).records
    assert slow[1].scheduled_s == pytest.approx(0.051)  # 11 ms, then four steps
    assert slow[0].output_tokens == 20


def disaggregated(rows: list[Request], layer_wise: bool, **changes: Any) -> ServingResult:
    spec = serve_spec(prefill={"replicas": 1}, decode={"replicas": 1}, **changes)
    engine = Engine(PLAIN, 1000, 4, kv_bytes_per_token=1e6, num_layers=10)
    return simulate_serving(
        spec, {"prefill": engine, "decode": engine}, kv_link=KvLink(1e9, 1e-3, layer_wise), requests=rows, debug=True
    )


def test_kv_transfer_overlaps_with_prefill_layer_by_layer() -> None:
    rows = lambda: requests((0.0, 40, 3))  # noqa: E731
    whole = disaggregated(rows(), layer_wise=False).records[0]
    layers = disaggregated(rows(), layer_wise=True).records[0]
    assert whole.first_token_s == layers.first_token_s == pytest.approx(0.050)
    # 40 MB over 1 GB/s is 40 ms after the prefill's 50; by layers 40 ms from its start, but a tenth of it at the end
    assert whole.last_token_s == pytest.approx(0.050 + 0.040 + 0.001 + 0.020)
    assert layers.last_token_s == pytest.approx(0.050 + 0.004 + 0.001 + 0.020)
    assert (layers.replica, layers.decode_replica) == (0, 0)


def test_the_kv_of_a_prompt_leaves_over_the_link_of_its_rank() -> None:
    """Two prompts of 40 MB at once, 1 GB/s over 4 ranks: 160 ms each over a quarter, beside each other."""
    spec = serve_spec(prefill={"replicas": 1}, decode={"replicas": 1})
    engine = Engine(PLAIN, 1000, 4, kv_bytes_per_token=1e6, num_layers=10)
    link = KvLink(1e9, 0.0, layer_wise=False, ranks=4)
    rows = requests((0.0, 40, 2), (0.0, 40, 2))
    found = simulate_serving(spec, {"prefill": engine, "decode": engine}, kv_link=link, requests=rows, debug=True)
    # 10 ms and 1 per token of prefill, 160 of transfer, a step of 10
    assert [r.last_token_s for r in found.records] == pytest.approx([0.090 + 0.160 + 0.010] * 2)


def test_lost_replica_retries_or_fails_what_it_held() -> None:
    fault = {"kind": "replica_loss", "at": "25 ms", "duration": "1 s"}
    rows = [(0.0, 1, 5), (0.1, 1, 1)]
    retried = play(rows, replicas=2, router="round_robin", faults=[fault]).records
    assert retried[0].retries == 1
    assert retried[0].last_token_s == pytest.approx(0.025 + 0.011 + 4 * 0.010)
    failed = play(rows, replicas=2, faults=[{**fault, "in_flight": "fail"}])
    assert failed.records[0].status == "failed"
    assert failed.records[0].output_tokens == 2  # at 11 and 21 ms
    assert failed.checks["failed"] == 1


def test_requests_wait_for_a_lost_replica_to_return() -> None:
    fault = {"kind": "replica_loss", "at": "25 ms", "duration": "1 s"}
    assert play([(0.0, 1, 5)], faults=[fault]).records[0].last_token_s == pytest.approx(1.025 + 0.051)
    never = play([(0.0, 1, 5)], faults=[{"kind": "replica_loss", "at": "25 ms"}]).records[0]
    assert (never.status, never.reason) == ("failed", "no replica came up again")


def test_slow_rank_stretches_the_steps_that_start_in_its_window() -> None:
    fault = {"kind": "slow_rank", "at": "21 ms", "duration": "20 ms", "slowdown": 3.0}
    # tokens at 11, 21, then a slow step to 51, then as before
    assert play([(0.0, 1, 4)], faults=[fault]).records[0].last_token_s == pytest.approx(0.061)


def test_of_overlapping_slow_ranks_the_worst_counts() -> None:
    faults = [
        {"kind": "slow_rank", "at": "21 ms", "duration": "25 ms", "slowdown": 3.0},
        {"kind": "slow_rank", "at": "22 ms", "duration": "1 s", "slowdown": 2.0},
    ]
    # tokens at 11 and 21 ms, then steps of 30 (to 51, when the first is over), 20 and 20 ms
    assert play([(0.0, 1, 5)], faults=faults).records[0].last_token_s == pytest.approx(0.091)


@pytest.mark.parametrize(("slowdowns", "transfer_s"), [((), 0.040), ((4.0,), 0.160), ((2.0, 4.0, 4.0), 0.160)])
def test_a_degraded_link_stretches_transfers_and_the_worst_counts(slowdowns: tuple, transfer_s: float) -> None:
    faults = [{"kind": "link_degradation", "at": "0 s", "duration": "1 s", "slowdown": s} for s in slowdowns]
    spec = serve_spec(prefill={"replicas": 1}, decode={"replicas": 1}, faults=faults)
    engine = Engine(PLAIN, 1000, 1, kv_bytes_per_token=1e6)
    link = KvLink(1e9, 0.0, layer_wise=False)
    rows = requests((0.0, 40, 3), (1.5, 40, 3))  # the second when the link is whole again
    found = simulate_serving(spec, {"prefill": engine, "decode": engine}, kv_link=link, requests=rows).records
    # 50 ms of prefill, the transfer, two steps of 10 ms that no link slows
    assert found[0].last_token_s == pytest.approx(0.050 + transfer_s + 0.020)
    assert found[1].last_token_s == pytest.approx(1.5 + 0.050 + 0.040 + 0.020)


def test_a_link_fault_has_no_replica_and_needs_a_link() -> None:
    pools = {"prefill": {"replicas": 1}, "decode": {"replicas": 1}}
    for place in ({"replica": 0}, {"pool": "decode"}):
        with pytest.raises(ValueError, match=rf"whole KV link.*got {next(iter(place))}; remove .*slow_rank"):
            serve_spec(**pools, faults=[{"kind": "link_degradation", "at": "1 s", **place}])
    with pytest.raises(ValueError, match=r"faults\[0\].kind.*got shared replicas.*slow_rank.*scale_up.bandwidth"):
        serve_spec(faults=[{"kind": "link_degradation", "at": "1 s"}])


@pytest.mark.parametrize(
    ("fault", "got"),
    [
        ({"kind": "slow_rank", "in_flight": "fail"}, "slow_rank takes pool, replica, slowdown.*got in_flight"),
        ({"kind": "replica_loss", "slowdown": 3}, "replica_loss takes pool, replica, in_flight.*got slowdown"),
    ],
)
def test_a_fault_takes_the_keys_of_its_kind_only(fault: dict, got: str) -> None:
    with pytest.raises(ValueError, match=got):
        serve_spec(faults=[{"at": "1 s", **fault}])


def test_what_is_down_cannot_be_lost() -> None:
    first, second = ({"kind": "replica_loss", "at": at} for at in ("1 s", "3 s"))
    for duration in ({}, {"duration": "2.5 s"}):
        with pytest.raises(ValueError, match=r"faults\[0\].*replica 0 is lost at 3 s, but faults\[1\] has it down"):
            serve_spec(faults=[second, first | duration])
    serve_spec(replicas=2, faults=[first, second | {"replica": 1}])
    # an autoscaler brings it back; seconds need not be binary
    serve_spec(autoscaler={"max_replicas": 2}, faults=[first, second])
    early = {"kind": "replica_loss", "at": "100 ms", "duration": "200 ms"}
    serve_spec(faults=[early, {"kind": "replica_loss", "at": "300 ms", "duration": "1 s"}])


def test_a_replica_can_be_lost_at_the_instant_that_it_comes_back() -> None:
    first = {"kind": "replica_loss", "at": "1 s", "duration": "2 s"}
    served = []
    for at in ("3 s", "3.001 s"):
        found = play([(4.0, 1, 1)], faults=[first, {"kind": "replica_loss", "at": at, "duration": "10 s"}])
        served.append(found.records[0].first_token_s)
    assert served[0] >= 13.0
    assert served[1] == pytest.approx(served[0] + 0.001)


def test_cold_start_and_autoscaler() -> None:
    spec = serve_spec(cold_start=True)
    cold = simulate_serving(spec, Engine(PLAIN, 100, weight_load_s=2.0), requests=requests((0.0, 1, 1)))
    assert cold.records[0].last_token_s == pytest.approx(2.011)
    rows = [(0.001 * n, 1, 50) for n in range(60)]
    scaler = {"max_replicas": 4, "interval": "100 ms", "scale_up_queue": 2.0}
    engine = Engine(PLAIN, 10_000, weight_load_s=0.2)
    spec = serve_spec(scheduler={"max_num_seqs": 4}, autoscaler=scaler)
    alone = simulate_serving(serve_spec(scheduler={"max_num_seqs": 4}), engine, requests=requests(*rows))
    scaled = simulate_serving(spec, engine, requests=requests(*rows), debug=True)
    assert len({r.replica for r in scaled.records}) >= 1
    assert scaled.pools["shared"].gpu_hours > alone.pools["shared"].gpu_hours


def test_agentic_tool_calls_at_100_tokens_per_second_take_less_than_a_second() -> None:
    """A tool call of 30 to 100 tokens at 10 ms a token, its prefix cached. Source: LongCat-Flash report, section 7."""
    step = LinearStepTimes(fixed_ns=9 * MS, per_sequence_ns=100_000, per_prefill_token_ns=20_000)
    spec = Serve.model_validate(
        {
            "workload": {
                "arrivals": {"rate": "0.2 /s"}, "input_tokens": 4000, "output_tokens": 300, "num_requests": 40,
                "sessions": {"turns": {"distribution": "uniform", "min": 4, "max": 12}, "new_tokens": 400,
                             "tool_call_ratio": 0.8, "system_prompt_tokens": 2000},
            },
        }
    )  # fmt: skip
    result = simulate_serving(spec, Engine(step, 100_000), debug=True)
    figures = result.metrics()
    assert figures["tool_call_s"]["mean"] < 1.0
    assert figures["tool_call_s"]["mean"] > 65 * 0.009
    assert figures["session_s"]["mean"] > figures["e2e_s"]["mean"]
    assert figures["prefix_hit_ratio"] > 0.8  # a growing prefix: only the last turn's news is computed
    tools = [r for r in result.records if r.is_tool_call]
    assert {30 <= r.output_tokens <= 100 for r in tools} == {True}
    grown = [r for r in result.records if r.session == 3]
    assert all(b.input_tokens == a.input_tokens + a.output_tokens + 400 for a, b in itertools.pairwise(grown))


def test_same_seed_same_bytes_and_other_seed_others(tmp_path: Path) -> None:
    def written(seed: int) -> bytes:
        spec = serve_spec(
            workload={
                "arrivals": {"process": "gamma", "rate": "40 /s", "cv": 2.0},
                "input_tokens": {"distribution": "lognormal", "mean": 30},
                "output_tokens": {"distribution": "gamma", "mean": 9}, "num_requests": 200,
            }
        )  # fmt: skip
        result = simulate_serving(spec, Engine(PLAIN, 10_000), seed=seed)
        path = tmp_path / f"{seed}.jsonl"
        write_requests(result.records, path)
        assert list(read_requests(path)) == list(result.records)
        return path.read_bytes()

    assert written(1) == written(1)
    assert written(1) != written(2)


def test_metrics_have_the_promised_keys_and_hand_worked_values() -> None:
    result = play([(0.0, 10, 3), (1.0, 20, 1)], slo=[{"name": "default", "ttft": "25 ms", "tpot": "10 ms"}])
    figures = result.metrics()
    promised = (
        "requests completed rejected failed retried unstable extrapolated duration_s ttft_s tpot_s itl_s e2e_s "
        "session_s tool_call_s input_tokens_per_s output_tokens_per_s goodput_requests_per_s prefix_hit_ratio "
        "preemptions gpu_hours wall_s"
    )
    assert set(promised.split()) <= set(figures)
    assert figures["ttft_s"]["mean"] == pytest.approx(0.025)
    assert figures["tpot_s"]["p99"] == pytest.approx(0.010)
    assert figures["duration_s"] == pytest.approx(1.030)
    assert figures["window_s"] == (0.0, 1.0)  # from the first arrival to the last
    assert figures["goodput_requests_per_s"] == pytest.approx(1 / 1.0)  # the second's first token takes 30 ms
    assert figures["itl_s"]["mean"] == pytest.approx(0.010)
    assert figures["output_tokens_per_s"] == pytest.approx(4 / 1.0)
    assert figures["session_s"] is None
    json.dumps(figures)


def test_what_was_not_served_is_not_within_its_level() -> None:
    """Of four requests one is too long, of another the replica is lost: half of them, not all, are within the level."""
    rows = requests((0.0, 1, 2), (0.1, 90, 20), (0.2, 1, 2), (0.3, 1, 20))
    rows[1].slo_class = 1
    spec = serve_spec(
        scheduler={"max_model_len": 100}, slo=[{"name": "a", "ttft": "1 s"}, {"name": "b"}, {"name": "unused"}],
        faults=[{"kind": "replica_loss", "at": "350 ms", "duration": "1 s", "in_flight": "fail"}],
    )  # fmt: skip
    figures = simulate_serving(spec, Engine(PLAIN, 1000), requests=rows).metrics()
    assert (figures["completed"], figures["rejected"], figures["failed"]) == (2, 1, 1)
    classes = figures["slo"]
    assert (classes["a"]["offered"], classes["a"]["completed"]) == (3, 2)
    assert classes["a"]["attained_ratio"] == pytest.approx(2 / 3)
    assert classes["b"]["attained_ratio"] == 0.0
    assert classes["unused"]["attained_ratio"] is None
    half = {"slo": {"a": {"attained_ratio": 0.5}}}
    assert metrics.intervals(figures, [half, half])["slo"]["a"]["attained_ratio"] == pytest.approx(
        {"p5": 0.5, "p95": 2 / 3}
    )


def test_overload_ends_and_says_so_with_the_rate_that_could_be_kept_up() -> None:
    one = LinearStepTimes(fixed_ns=10 * MS)
    workload = {"arrivals": {"rate": "300 /s"}, "input_tokens": 1, "output_tokens": 4, "num_requests": 1500}
    spec = serve_spec(workload=workload, scheduler={"max_num_seqs": 4})
    figures = simulate_serving(spec, Engine(one, 10_000)).metrics()
    assert figures["unstable"] is True
    assert figures["sustainable_requests_per_s"] == pytest.approx(100, rel=0.05)  # 4 slots of 40 ms
    calm = serve_spec(workload={**workload, "arrivals": {"rate": "60 /s"}}, scheduler={"max_num_seqs": 4})
    assert simulate_serving(calm, Engine(one, 10_000)).metrics()["unstable"] is False


@pytest.mark.parametrize("outputs", [{"distribution": "exponential", "mean": 200}, 200])
def test_a_short_overload_tells_the_rate_of_a_long_one(outputs: Any) -> None:
    """Batches take a stay or two to fill, and step times grow with them: neither that nor the drain may count.

    Full, 200 steps of 512 sequences take 10 + 512 x 0.125 ms each, and the prompts of the 512 that take their places
    1.28 s in all: 512 requests in 14.8 + 1.28 s. A short run is of four such stays.
    """
    times = LinearStepTimes(fixed_ns=10 * MS, per_sequence_ns=MS // 8, per_prefill_token_ns=MS // 400)
    rates = []
    for count in (2600, 26_000):
        workload = {
            "arrivals": {"rate": "44 /s"}, "input_tokens": 1000, "output_tokens": outputs, "num_requests": count,
        }  # fmt: skip
        spec = serve_spec(workload=workload, scheduler={"max_num_seqs": 512})
        figures = simulate_serving(spec, Engine(times, 100_000)).metrics()
        assert figures["unstable"] is True
        rates.append(figures["sustainable_requests_per_s"])
    assert rates[1] == pytest.approx(512 / (14.8 + 1.28), rel=0.02)
    assert rates[0] == pytest.approx(rates[1], rel=0.04)


def test_gap_percentiles_are_within_a_thousandth() -> None:
    random = np.random.default_rng(0)
    gaps = random.lognormal(16, 1, 20_000).astype(np.int64)
    histogram = GapHistogram()
    histogram.add_run(gaps, 1)
    histogram.add_run([int(g) for g in gaps[:100]], 2)
    every = np.concatenate([gaps, gaps[:100], gaps[:100]])
    assert histogram.mean_s() == pytest.approx(every.mean() * 1e-9, rel=1e-12)
    for percent in (50, 90, 99):
        assert histogram.percentile_s(percent) == pytest.approx(np.percentile(every, percent) * 1e-9, rel=2e-3)


def test_intervals_of_seeds_and_interpolation() -> None:
    workload = {
        "arrivals": {"rate": "20 /s"}, "input_tokens": 10, "num_requests": 50,
        "output_tokens": {"distribution": "exponential", "mean": 20},
    }  # fmt: skip
    runs = simulate_seeds(serve_spec(workload=workload), Engine(PLAIN, 10_000), range(5))
    spread = metrics.intervals(runs[0], runs)
    for figure in ("ttft_s", "e2e_s"):
        assert spread[figure]["mean"]["p5"] <= runs[0][figure]["mean"] <= spread[figure]["mean"]["p95"]
    wide = metrics.intervals(runs[0], runs, relative_error=0.1)
    assert wide["ttft_s"]["mean"]["p95"] == pytest.approx(1.1 * spread["ttft_s"]["mean"]["p95"])
    assert "unstable" not in spread


def test_chrome_trace_holds_the_window(tmp_path: Path) -> None:
    result = simulate_serving(
        serve_spec(), Engine(PLAIN, 100), requests=requests((0.0, 5, 9), (5.0, 5, 2)), trace_window_s=(0.0, 1.0)
    )
    result.write_chrome_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    names = [e["name"] for e in events if e["ph"] == "X"]
    assert names == ["mixed batch 0 prefill 5", "decode batch 1"]


def test_grid_reproduces_its_function_and_its_quantiles() -> None:
    def seconds(batch: Any, context: Any, tokens: Any, keys: Any) -> Any:
        base = 1e-3 + 1e-5 * batch + 2e-8 * batch * context + 1e-5 * tokens + 1e-9 * tokens * keys
        return np.stack([base, 1.5 * base])

    grid = StepTimeGrid.from_function(
        seconds, max_batch=64, max_context=8192, max_prefill_tokens=1024, quantiles=(0.5, 0.95)
    )
    assert grid.interpolation_error < 1e-6  # multilinear in its axes
    assert grid.decode_ns(37, 37 * 999) == round((1e-3 + 37e-5 + 2e-8 * 37 * 999) * 1e9)
    assert grid.at_quantile(0.9).decode_ns(64, 64 * 8192) == pytest.approx(1.5 * grid.decode_ns(64, 64 * 8192), abs=1)
    assert grid.is_outside(65, 1, 0)
    assert not grid.is_outside(64, 64 * 8192, 1024)
    runs = grid.decode_run_ns(13, 13 * 700, 400)
    assert [grid.decode_ns(13, 13 * 700 + 13 * k) for k in range(400)] == [int(t) for t in runs]


def test_settings_that_cannot_work_are_refused() -> None:
    with pytest.raises(SpecError, match=r"256 x 3 = 768 > 512"):
        simulate_serving(
            serve_spec(scheduler={"max_num_batched_tokens": 512}), Engine(PLAIN, 10), acceptance=(0.5, 0.5)
        )
    with pytest.raises(SpecError, match="kv_link"):
        simulate_serving(serve_spec(prefill={}, decode={}), {"prefill": Engine(PLAIN, 10), "decode": Engine(PLAIN, 10)})
    with pytest.raises(SpecError, match="expected shared; got decode"):
        simulate_serving(serve_spec(), {"decode": Engine(PLAIN, 10)})


def test_traffic_that_was_never_set_is_asked_for() -> None:
    with pytest.raises(WorkloadError, match=r"expected trace: PATH or arrivals: .*; got neither"):
        simulate_serving(Serve.model_validate({"workload": {}}), Engine(PLAIN, 10))
