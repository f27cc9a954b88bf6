"""Data-parallel attention: a prompt is prefilled on one rank of its replica, experts see the tokens of all."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longcat_sim.calibration.roofline import Roofline
from longcat_sim.simulation.serving.cluster import Engine
from longcat_sim.simulation.serving.ranked import RankedStepTimes, fill_nodes, fullest_ranks, rank_share
from longcat_sim.simulation.serving.simulate import simulate_serving
from longcat_sim.simulation.step import replica_kv_tokens, step_seconds_many
from longcat_sim.specs.scenario import Scenario, scenario
from longcat_sim.specs.serve import Serve
from longcat_sim.studies.engines import StepFunction
from longcat_sim.studies.simulate import simulate
from tests.unit.test_serving_engine import requests

RANKS = 4


def linear(batch: Any, context: Any, tokens: Any, keys: Any, fill: float) -> Any:
    """1 ms, 1 us per token of the fullest rank, 0.2 us per token of all."""
    return 1e-3 + tokens / RANKS * 1e-6 + tokens * fill * 2e-7


def times(tokens: int = 256) -> RankedStepTimes:
    return RankedStepTimes.from_function(linear, RANKS, max_batch=8, max_context=4096, max_prefill_tokens=tokens)


def run(rows: Any, **scheduler: Any) -> list[int]:
    settings = {"max_num_batched_tokens": 1024, "max_num_seqs": 8, "prefix_cache": False, **scheduler}
    serve = Serve.model_validate({"workload": {}, "scheduler": settings})
    made = times() if settings.get("chunked_prefill", True) else times(1024)
    result = simulate_serving(serve, Engine(made, 10_000), requests=requests(*rows))
    return [int(first) for first in result.records.numpy("first")]


def test_a_prompt_alone_gets_one_rank_and_its_share_of_the_budget() -> None:
    """1,024 tokens a step over 4 ranks: 600 tokens take 256 + 256 + 88, each step 1 ms + 1.2 us per token."""
    assert times().interpolation_error < 1e-6
    assert run([(0.0, 600, 1)]) == [round(3e6 + 600 * 1200)]


def test_prompts_on_ranks_of_their_own_run_at_once() -> None:
    """Four prompts of 200: one step of 200 on each rank, 800 for the experts. A fifth doubles up: 400 and 1,000."""
    one, four = run([(0.0, 200, 1)])[0], run([(0.0, 200, 1)] * 4)
    assert one == 1_000_000 + 200 * 1000 + 200 * 200
    assert set(four) == {1_000_000 + 200 * 1000 + 800 * 200}
    # with a fifth a rank would have 400, more than its share of 256: it is cut there
    assert set(run([(0.0, 200, 1)] * 5)) == {1_000_000 + 256 * 1000 + 1000 * 200}


def test_without_chunks_a_prompt_stays_whole() -> None:
    assert run([(0.0, 600, 1)], chunked_prefill=False) == [1_000_000 + 600 * 1200]


def test_fast_forward_and_single_steps_agree() -> None:
    serve = Serve.model_validate(
        {"workload": {}, "scheduler": {"max_num_batched_tokens": 1024, "max_num_seqs": 8, "prefix_cache": False}}
    )
    rng = np.random.default_rng(7)
    arrivals = np.cumsum(rng.exponential(0.004, 120))
    rows = [(float(t), int(rng.integers(1, 900)), int(rng.integers(1, 60))) for t in arrivals]
    engine = Engine(times(), 10_000)
    fast, slow = (
        simulate_serving(serve, engine, requests=requests(*rows), step_by_step=each).records for each in (False, True)
    )
    for name in ("first", "last"):
        assert np.array_equal(fast.numpy(name), slow.numpy(name))


def case() -> Scenario:
    short = {"serve.workload.duration": "30 s", "serve.workload.warm_up": "5 s"}
    return scenario("longcat-flash-h800-serve", {"draws": 1, **short})


def test_what_a_lone_prompt_takes_is_its_ranks_work() -> None:
    """The dense part of a lone chunk costs what it costs where all ranks have one; only experts and links are idler."""
    step, op_times = StepFunction(case(), Roofline(case().hardware)), Roofline(case().hardware)
    ranks = case().deployment.dp_size
    zero, size, keys = np.zeros(2), np.full(2, 2048.0 * ranks), np.full(2, 1024.5)
    lone, full = step(zero, zero, size, keys, np.array([1 / ranks, 1.0]))
    spread = step(zero[:1], zero[:1], size[:1] / ranks, keys[:1])[0]  # the same tokens dealt out over all ranks
    assert spread < 0.6 * lone < lone < full
    # a device's own share never falls below its FLOP at the highest peak
    flop = sum(case().model.flop_per_token(1024.5, phase="prefill").values()) * 2048
    assert full > flop / max(case().hardware.peak.values())
    # all ranks equally full is what a step of the scenario is
    plain = step_seconds_many(case(), op_times, 1.0, 2048.0, phase="prefill", queries=2048.0)
    assert full == pytest.approx(float(plain), rel=1e-9)


def test_a_lone_prompt_on_a_wide_replica_waits_for_one_gpu() -> None:
    """Before, 16 GPUs shared one prompt: 3,600 tokens of LongCat-Flash in 37 ms, beyond the peak of one H800."""
    of = case().what_if({"serve.workload.arrivals.rate": "0.05 /s", "serve.workload.duration": "400 s",
                         "serve.workload.warm_up": "0 s", "serve.workload.input_tokens": 3600})  # fmt: skip
    model = of.model
    dense = model.num_active_parameters(ffn_experts=0)  # what the rank itself computes, dense FFN over 4 ranks
    least = 2 * dense / 4 * 3600 / max(of.hardware.peak.values())
    assert simulate(of).figures["ttft_s"]["p50"] > 3 * least


def test_a_budget_that_leaves_ranks_few_tokens_is_named() -> None:
    of = case().what_if({"serve.scheduler.max_num_batched_tokens": 4096})
    assert any("each of its 16 data-parallel ranks prefills 256 tokens" in note for note in simulate(of).notes)
    assert not any("data-parallel ranks prefills" in note for note in simulate(case()).notes)


def test_fills_run_from_one_rank_to_all() -> None:
    assert fill_nodes(2) == [0.5, 1.0]
    assert fill_nodes(16) == [1 / 16, 0.25, 0.5, 1.0]
    assert fill_nodes(32) == [1 / 32, 1 / 8, 0.25, 0.5, 1.0]


def test_the_others_wait_for_the_rank_with_the_most_tokens_or_the_most_keys() -> None:
    late = (100, 100 * 30_000)  # after 30,000 tokens
    assert fullest_ranks([late], 4, 256) == [(100, 3_000_000)]
    assert fullest_ranks([late, (256, 256 * 128)], 4, 256) == [(256, 32_768), late]  # as long as either rank
    assert fullest_ranks([(50, 5)] * 4 + [(1, 1)], 4, 256) == [(51, 6)]  # the last joins the least full
    assert fullest_ranks([(200, 20)] * 5, 4, 256) == [(256, 26)]  # a full rank cuts its last chunk, and its pairs
    assert fullest_ranks([(200, 20)] * 5, 4, 500) == [(400, 40)]


def test_fresh_tokens_on_another_rank_do_not_shorten_a_late_chunk() -> None:
    """Of LongCat: what a late chunk expands again depends on its own context, not on the tokens of another rank."""
    of = case()
    made = RankedStepTimes.from_function(
        StepFunction(of, Roofline(of.hardware)), RANKS, max_batch=8, max_context=65536, max_prefill_tokens=2048
    )
    late = (500, 50_000)
    alone, _ = made.dealt_ns(0, 0, [late], 2048)
    beside, _ = made.dealt_ns(0, 0, [late, (2048, 0)], 2048)
    assert beside >= alone * 0.999
    full, _ = made.dealt_ns(0, 0, [(2048, 10_000)] * RANKS, 2048)
    crowded, _ = made.dealt_ns(0, 0, [(1800, 10_000)] * (RANKS + 1), 2048)
    assert crowded <= full * 1.02  # read between shares of full ranks; with pairs of uncut chunks it was 1.23


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 256), st.integers(0, 20_000)), min_size=1, max_size=9))
def test_a_chunk_more_never_shortens_a_step(rows: list[tuple[int, int]]) -> None:
    """Of a step function that grows with tokens, keys and fill."""
    made = attending()
    chunks = [(tokens, tokens * before + tokens * (tokens + 1) // 2) for tokens, before in rows]

    def step(of: list[tuple[int, int]]) -> int:
        total = min(sum(tokens for tokens, _ in of), RANKS * 256)
        return max(made.ranked_ns(0, 0, total, *rank) for rank in fullest_ranks(of, RANKS, 256))

    if len(chunks) <= RANKS:
        assert all(step(chunks[: n + 1]) >= step(chunks[:n]) - 1 for n in range(1, len(chunks)))
    assert step(chunks) >= max(step([chunk]) for chunk in chunks) - 1


@cache
def attending() -> RankedStepTimes:
    def f(batch: Any, context: Any, tokens: Any, keys: Any, fill: float) -> Any:
        return linear(batch, context, tokens, keys, fill) + tokens / RANKS * keys * 1e-10

    return RankedStepTimes.from_function(f, RANKS, max_batch=8, max_context=32768, max_prefill_tokens=256)


@pytest.mark.parametrize("ep_size", [16, 8])
def test_work_on_more_ranks_never_shortens_a_step_of_longcat(ep_size: int) -> None:
    of = case().what_if({"deployment.ep_size": ep_size})
    step, fills = StepFunction(of, Roofline(of.hardware)), np.linspace(1 / 16, 1, 16)
    for tokens in (64.0, 512.0, 2048.0):
        flat = np.full(len(fills), tokens * 16)
        seconds = step(np.zeros(16), np.zeros(16), flat, (flat / 16 + 1) / 2, fills)
        assert (np.diff(seconds) >= -2e-3 * seconds[1:]).all()


def test_a_budget_that_ranks_do_not_divide_is_inside_the_grid() -> None:
    made = RankedStepTimes.from_function(
        linear, 3, max_batch=8, max_context=4096, max_prefill_tokens=rank_share(1024, 3)
    )
    serve = Serve.model_validate({"workload": {}, "scheduler": {"max_num_batched_tokens": 1024, "max_num_seqs": 8}})
    result = simulate_serving(serve, Engine(made, 10_000), requests=requests(*[(0.0, 700, 1)] * 6))
    assert result.pools["shared"].outside_steps == 0
    assert 0.9 < result.pools["shared"].prefill_fill <= 1.0


def test_a_whole_prompt_on_one_rank_needs_room_for_its_activations() -> None:
    of = case().what_if({"serve.scheduler.chunked_prefill": False})
    chunked, whole = (replica_kv_tokens(each, each.serve, "prefill")[1] for each in (case(), of))  # type: ignore[arg-type]
    assert whole.parts["activations"] == pytest.approx(16 * chunked.parts["activations"], rel=0.01)
