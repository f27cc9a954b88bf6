"""What a serving run tells a person: lines of the table, shares within the level, notes."""

from __future__ import annotations

from typing import Any

import pytest

from longcat_sim.errors import SpecError
from longcat_sim.specs.scenario import Scenario, scenario
from longcat_sim.studies.simulate import LEANING, simulate


def traffic(count: int = 200, rate: str = "10 /s", **changes: Any) -> Scenario:
    workload = {"arrivals": {"rate": rate}, "input_tokens": 1000, "output_tokens": 20, "num_requests": count}
    settings = {name.replace("__", "."): value for name, value in changes.items()}
    return scenario("qwen3-32b-h200-serve").what_if({"draws": 1, "serve.workload": workload, **settings})


def test_what_is_wrong_with_a_fault_is_said_with_an_example() -> None:
    for faults, words in (
        ("x", [r"serve.faults: expected a list, such as [{kind: slow_rank, at: 60 s, ", "; got 'x'"]),
        ([{"at": "1 s", "down": "2 s"}], ["add it, such as kind: slow_rank", "got 'down'"]),
        ([{"kind": "slow_rank"}], ["add it, such as at: 60 s"]),
    ):
        with pytest.raises(SpecError) as error:
            traffic(serve__faults=faults)
        for each in words:
            assert each in str(error.value)


def test_a_fault_after_the_end_leaves_a_note() -> None:
    late = [{"kind": "slow_rank", "at": "1 s"}, {"kind": "slow_rank", "at": "1 h"}]
    notes = [note for note in simulate(traffic(serve__faults=late)).notes if "serve.faults" in note]
    assert len(notes) == 1
    assert "serve.faults[1]: at = 3600 s lies beyond the end of the run" in notes[0]


def test_the_table_counts_what_was_retried_and_failed() -> None:
    rows = {name: value for name, value, _ in simulate(traffic()).rows()}
    assert not any("retried" in name or "failed" in name for name in rows)
    lost = [{"kind": "replica_loss", "at": "5 s", "duration": "1 s", "replica": r} for r in range(8)]
    for kept, name in (("retry", "requests retried"), ("fail", "requests failed")):
        faults = [{**fault, "in_flight": kept} for fault in lost]
        rows = {name: value for name, value, _ in simulate(traffic(serve__faults=faults)).rows()}
        assert int(rows[name]) > 0


def test_the_table_says_what_the_warm_up_leaves_out_and_the_interval_of_every_percentile() -> None:
    found = simulate(traffic(draws=2, serve__workload__warm_up="5 s"))
    rows = {name: (value, unit) for name, value, unit in found.rows()}
    counted = found["requests"]
    assert 0 < counted < 200
    assert rows["requests completed"] == (f"{counted} of {counted}", f"{200 - counted} of the warm-up left out")
    shown = rows["TTFT mean / p50 / p90 / p99"][0].split(" / ")
    for name, text in zip(("mean", "p50", "p90", "p99"), shown, strict=True):
        spread = found.intervals["ttft_s"][name]  # type: ignore[index]
        assert text == f"{found['ttft_s'][name]:.3g} [{spread['p5']:.3g}, {spread['p95']:.3g}]"


def test_a_note_counts_why_requests_were_not_served() -> None:
    inputs = {"distribution": "uniform", "min": 100, "max": 2000}
    long = {"serve__workload__input_tokens": inputs, "serve__scheduler__max_model_len": 1500}
    lost = [
        {"kind": "replica_loss", "at": "5 s", "duration": "1 s", "replica": r, "in_flight": "fail"} for r in range(8)
    ]
    found = simulate(traffic(**long, serve__workload__output_tokens=400, serve__faults=lost))
    rejected, failed = found["rejected"], found["failed"]
    assert min(rejected, failed) > 0
    assert f"{rejected} of 200 requests rejected: {rejected} longer than max_model_len" in found.notes
    assert f"{failed} of 200 requests failed: {failed} on a replica that was lost" in found.notes
    queue = simulate(
        traffic(rate="400 /s", **long, serve__replicas=1, serve__max_queue=1, serve__scheduler__max_num_seqs=4)
    )
    note = next(note for note in queue.notes if "rejected" in note)
    assert "longer than max_model_len" in note
    assert "the queue was full (max_queue)" in note
    cache = simulate(traffic(serve__workload__input_tokens=50_000, serve__scheduler__num_kv_blocks=1000))
    assert "200 of 200 requests rejected: 200 longer than the KV cache of a shared replica" in cache.notes
    assert not any("served all the same" in note for note in cache.notes)  # none of them was


def test_the_note_on_extrapolation_agrees_with_the_figures() -> None:
    for output, is_beyond in ((20, False), (45_000, True)):  # contexts that were evaluated end at the model's 40,960
        found = simulate(traffic(4, serve__workload__output_tokens=output))
        assert (found["extrapolated_step_ratio"] > 0) == is_beyond
        leaning = found["unmeasured_op_time_ratio"]
        assert found["extrapolated"] == (is_beyond or leaning > LEANING)
        notes = [note for note in found.notes if note.startswith("extrapolated: ")]
        assert bool(notes) == found["extrapolated"]
        if notes:
            assert f"{100 * found['extrapolated_step_ratio']:.3g}% of the steps" in notes[0]
            assert f"{100 * leaning:.3g}% of a typical step's op time" in notes[0]


def test_an_overload_is_not_told_to_run_longer() -> None:
    short = traffic(400, "400 /s", serve__scheduler__max_num_seqs=4)
    calm = simulate(traffic(40, "20 /s"))
    assert not calm["unstable"]
    assert any("no steady state" in note for note in calm.notes)
    found = simulate(short)
    assert found["unstable"]
    assert not any("steady state" in note for note in found.notes)
    assert f"about {found['sustainable_requests_per_s']:.3g} requests/s can be kept up" in str(found)
    assert "says nothing of the SLO" in str(found)


def test_a_decode_pool_that_lags_behind_is_an_overload() -> None:
    """Prefill takes all in, one decode replica does not: 20 /s are fine, and 40 and 60 /s leave the same 27 /s."""
    rates = []
    for rate, is_over in ((20, False), (40, True), (60, True)):
        figures = simulate(
            scenario(
                "longcat-flash-h800-serve",
                {
                    "draws": 1, "serve.prefill.replicas": 9, "serve.decode.replicas": 1,
                    "serve.workload.arrivals.rate": f"{rate} /s", "serve.workload.duration": "4 min",
                    "serve.workload.warm_up": "20 s",
                },
            )
        ).figures  # fmt: skip
        assert figures["unstable"] is is_over
        rates += [figures["sustainable_requests_per_s"]] if is_over else []
    assert rates[0] == pytest.approx(rates[1], rel=0.05)
    assert 20 < rates[0] < 40


def test_a_median_far_from_the_single_run_is_said() -> None:
    lent = scenario("longcat-flash-h800-decode").what_if({"hardware": "mi325x", "draws": 16})
    (said,) = [note for note in simulate(lent).notes if "the median over draws is" in note]
    assert "above the step at the fit's own figures (33." in said
    for calm in (lent.what_if({"draws": 1}), scenario("longcat-flash-h800-decode").what_if({"draws": 16})):
        assert not [note for note in simulate(calm).notes if "the median over draws is" in note]


def test_a_result_says_what_it_was_made_for() -> None:
    step = simulate(scenario("longcat-flash-h800-decode").what_if({"draws": 1, "step.context_tokens": 6000}))
    assert (
        "96 sequences per GPU at 6,000 tokens of context; 1.8 tokens a step (drafts accepted with 0.8); 2 USD"
        in str(step)
    )


def test_sequences_decoded_at_once_obey_littles_law_and_never_exceed_the_places() -> None:
    found = simulate(traffic(2000, "20 /s", serve__workload__output_tokens=200))
    decode_s = found["e2e_s"]["mean"] - found["ttft_s"]["mean"]
    expected = 20 * decode_s / found.run.pools["shared"].num_replicas
    assert found["decode_sequences_per_replica"] == pytest.approx(expected, rel=0.1)
    assert f"{found['decode_sequences_per_replica']:.4g}  of a replica" in str(found)
    places = {"serve__replicas": 1, "serve__scheduler__max_num_seqs": 64}
    for rate in ("1000 /s", "1e6 /s"):  # an overload, and a batch
        full = simulate(traffic(1000, rate, **places, serve__workload__output_tokens=200))
        assert 50 < full["decode_sequences_per_replica"] <= 64


def test_traffic_is_not_headed_by_the_sizes_of_a_step() -> None:
    both = {"step": {"phase": "decode", "sequences_per_gpu": 96, "context_tokens": 5000}}
    assert "sequences per GPU" not in str(simulate(traffic(40, "20 /s", **both)))


def test_a_fault_after_the_last_arrival_is_said() -> None:
    last = float(simulate(traffic(40, "20 /s")).run.records.numpy("arrival").max()) * 1e-9
    late = [{"kind": "slow_rank", "at": f"{last + 0.01} s", "duration": "1 s", "replica": 0, "slowdown": 2}]
    (note,) = [each for each in simulate(traffic(40, "20 /s", serve__faults=late)).notes if "serve.faults[0]" in each]
    assert "lies beyond the last arrival" in note
    fatal = [{"kind": "replica_loss", "at": "1 s", "replica": r, "in_flight": "fail"} for r in range(8)]
    assert not any("lies beyond" in each for each in simulate(traffic(40, "20 /s", serve__faults=fatal)).notes)
