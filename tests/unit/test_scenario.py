"""Scenarios: packaged ones load, what-if changes one figure, every fault of a file is told at once with its line."""

from __future__ import annotations

from pathlib import Path

import pytest

from longcat_sim.errors import ScheduleError, SpecError
from longcat_sim.specs.changes import parse_changes
from longcat_sim.specs.hardware import load_hardware
from longcat_sim.specs.scenario import scenario
from longcat_sim.studies.simulate import simulate

GOOD = """\
model: longcat-flash
hardware: h800-sxm
deployment: {num_gpus: 128, ep_size: 128, dense_tp_size: 4, overlap: sbo}
speculative: {draft_tokens: 1, acceptance: [0.8]}
step: {phase: decode, sequences_per_gpu: 96, context_tokens: 5000}
price: {usd_per_gpu_hour: 2.0}
"""


@pytest.fixture
def write(tmp_path: Path):
    def make(text: str) -> Path:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return path

    return make


def test_a_scenario_reads_its_sections(write) -> None:
    made = scenario(write(GOOD))
    assert made.model.num_layers == 28
    assert made.hardware.memory_bandwidth == 3.352e12
    assert made.speculative.tokens_per_step == pytest.approx(1.8)
    assert made.usd_per_gpu_hour == 2.0


def test_what_if_changes_one_figure_and_nothing_else(write) -> None:
    before = scenario(write(GOOD))
    after = before.what_if({"hardware.scale_out.bandwidth": "100 GB/s", "deployment.overlap": "none"})
    assert after.hardware.scale_out.bandwidth == 100e9
    assert after.hardware.scale_out.latency == before.hardware.scale_out.latency
    assert after.hardware.peak == before.hardware.peak
    assert (before.deployment.overlap, after.deployment.overlap) == ("sbo", "none")
    assert before.digest() != after.digest()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hardware.scale_out.bandwith": "1 GB/s"}, "did you mean 'bandwidth'?"),
        ({"hardware.memory": 80}, "bare number 80; write its unit"),
        ({"deployment.ep_size": 96}, "128 % 96 = 32"),
        ({"model": "longcat-flush"}, "longcat-flash"),
        ({"hardware": "h900"}, "h800-sxm"),
        ({"deployment.num_gpu": 4}, "did you mean 'num_gpus'?"),
        (
            {"step": {"phase": "prefill", "prompt_tokens": 9, "sequences_per_gpu": 4}},
            "did you mean 'tokens_per_gpu'?",
        ),
        ({"speculative.acceptance": [0.8, 0.7]}, "one rate per draft token (1)"),
        ({"model.moe_top": 3}, "did you mean 'moe_topk'?"),
        ({"step.sequences_per_gpu": -1}, "greater than 0"),
    ],
)
def test_a_wrong_change_says_what_to_do(write, change: dict, words: str) -> None:
    with pytest.raises(SpecError) as error:
        scenario(write(GOOD)).what_if(change)
    assert words in str(error.value)


def test_all_faults_of_a_file_at_once_with_lines(write) -> None:
    path = write(
        "model: longcat-flash\n"
        "hardware: h800-sxm\n"
        "deployment:\n"
        "  num_gpus: 128\n"
        "  ep_size: 96\n"
        "  ep_size: 96\n"
        "  colour: red\n"
        "step: {phase: decode, sequences_per_gpu: 0, context_tokens: 10}\n"
        "draws: 0\n"
    )
    with pytest.raises(SpecError) as error:
        scenario(path)
    text = str(error.value)
    assert "mine.yaml:6: deployment.ep_size: expected each key once; it is also on line 5" in text
    assert "mine.yaml:7: deployment.colour: expected a known key" in text
    assert "mine.yaml:8: step" in text
    assert "mine.yaml:9: draws" in text


def test_faults_of_names_and_between_sections_come_with_the_others(write) -> None:
    path = write(
        "model: longcat-flash\n"
        "hardware: h800-sxm\n"
        "deployment:\n"
        "  num_gpus: 192\n"
        "  ep_size: 96\n"
        "  colour: red\n"
        "  overlap: sbx\n"
        "step: {phase: decode, sequences_per_gpu: 0, context_tokens: 10}\n"
        "search: {overlap: [none, fast, tbo_prefill]}\n"
        "price: {hardware_usd_per_gpu_hour: {h800: 9}}\n"
        "draws: 0\n"
    )
    known = "expected one of chunked, none, sbo, sbo_engine, tbo for a longcat layer; got"
    with pytest.raises(SpecError) as error:
        scenario(path)
    for part in (
        "mine.yaml:6: deployment.colour: ",
        f"mine.yaml:7: deployment.overlap: {known} 'sbx'; choose one of these",
        "mine.yaml:8: step.sequences_per_gpu: ",
        f"mine.yaml:9: search.overlap[1]: {known} 'fast'",
        f"mine.yaml:9: search.overlap[2]: {known} 'tbo_prefill'",
        "mine.yaml:10: price.hardware_usd_per_gpu_hour: expected a path or one of",
        "mine.yaml:11: draws: ",
    ):
        assert part in str(error.value)
    path.write_text(path.read_text().replace("  colour: red\n  overlap: sbx\n", ""))
    with pytest.raises(SpecError, match=r"512 % 96 = 32(.|\n)*got 'fast'|got 'fast'(.|\n)*512 % 96 = 32"):
        scenario(path)


def test_all_faults_of_a_what_if_at_once(write) -> None:
    changes = {
        "model.moe_top": 3, "model.foo": 3, "hardware.memory": 80, "hardware.foo": 1, "serve..slo": 1,
        "speculative.acceptance.7": 1, "deployment.overlap": "sbx", "draws": 0,
    }  # fmt: skip
    with pytest.raises(SpecError) as error:
        scenario(write(GOOD), changes)
    assert len(error.value.faults) == len(changes)
    with pytest.raises(SpecError, match=r"overlap: expected one of none, sbo, tbo, tbo_prefill for a moe layer"):
        scenario("deepseek-v3-h800-decode", {"deployment.overlap": "chunked"})


def test_experts_must_divide_over_ranks(write) -> None:
    with pytest.raises(SpecError, match=r"ep_size must divide n_routed_experts: 512 % 96 = 32; try one of .*64"):
        scenario(write(GOOD.replace("num_gpus: 128, ep_size: 128", "num_gpus: 192, ep_size: 96")))


def test_settings() -> None:
    assert parse_changes(["a.b=3", "c=[0.8]", "d=100 GB/s"]) == {"a.b": 3, "c": [0.8], "d": "100 GB/s"}
    with pytest.raises(SpecError, match="expected path=value"):
        parse_changes(["overlap"])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: x\nschema: 1\ndatasheet:\n  device: X\n  peak: {bf16: 989}\n", "x.yaml:5: datasheet.peak.bf16"),
        ("schema: 2\nname: x\ndatasheet: {device: X}\n", "schema: expected 1; got 2"),
        ("schema: 1\nname: x\n", "datasheet: expected this section"),
        ("", "expected a description; got an empty file"),
        ("a: [1\n", "expected YAML"),
    ],
)
def test_hardware_faults(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(SpecError) as error:
        load_hardware(path)
    assert words in str(error.value)


def test_a_price_of_an_unknown_device_is_refused() -> None:
    with pytest.raises(SpecError, match=r"hardware_usd_per_gpu_hour.*did you mean 'h800-sxm'"):
        scenario("longcat-flash-h800-decode", {"price.hardware_usd_per_gpu_hour": {"h800": 9}})


def test_a_what_if_does_not_change_the_one_it_comes_from() -> None:
    """A mapping of one change is not the place where the next one writes."""
    first = scenario("qwen3-32b-h200-serve").what_if({"serve.scheduler": {"max_num_seqs": 64}})
    digest = first.digest()
    first.what_if({"serve.scheduler.block_tokens": 32})
    assert first.digest() == digest
    assert first.what_if({}).serve.scheduler.block_tokens == 16


def test_a_place_in_an_empty_list_is_refused_and_the_last_of_two_spellings_counts(write) -> None:
    with pytest.raises(SpecError, match=r"serve\.faults: expected a list with a place 0; it is empty"):
        scenario(write(SERVED), {"serve.faults": [], "serve.faults.0.kind": "slow_rank"})
    case = scenario(write(SERVED))
    for path, value in (("serve.slo.ttft", "3 s"), ("serve.slo.0.ttft", "4 s"), ("serve.slo.ttft", "5 s")):
        case = case.what_if({path: value})
    assert case.serve.slo[0].ttft == 5.0


SERVED = """\
model: longcat-flash
hardware: h800-sxm
deployment: {num_gpus: 16, ep_size: 16, dense_tp_size: 4, overlap: sbo}
speculative: {draft_tokens: 2, acceptance: [0.8, 0.5]}
serve:
  workload: {arrivals: {process: poisson, rate: 1 /s}, input_tokens: 100, output_tokens: 10, num_requests: 9}
  slo: [{name: default, ttft: 2 s, tpot: 50 ms}]
"""


@pytest.mark.parametrize("path", ["serve.slo.ttft", "serve.slo.0.ttft", "serve.slo[0].ttft"])
def test_a_list_of_one_needs_no_place_and_takes_one(write, path: str) -> None:
    changed = scenario(write(SERVED), {path: "3 s"})
    assert [(level.ttft, level.tpot) for level in changed.serve.slo] == [(3.0, 0.05)]
    assert [level.ttft for level in scenario(write(SERVED)).serve.slo] == [2.0]


def test_an_entry_of_a_list_is_set_by_its_place(write) -> None:
    for path in ("speculative.acceptance.1", "speculative.acceptance[1]"):
        assert scenario(write(SERVED), {path: 0.6}).speculative.acceptance == (0.8, 0.6)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("speculative.acceptance.first", "speculative.acceptance: expected a place from 0 to 1, such as"),
        ("speculative.acceptance.2", "speculative.acceptance: expected a place from 0 to 1, such as"),
        ("serve.slo.1.ttft", "serve.slo: expected a place from 0 to 0, such as serve.slo.0.ttft; got '1'"),
        ("serve.slo[x].ttft", "serve.slo: expected a place from 0 to 0"),
        ("speculative.acceptance[0", "expected names joined by single dots"),
        ("draws[0]", "draws: expected a list; got 32; leave [0] out"),
        (
            "serve..slo",
            "expected names joined by single dots, such as deployment.overlap or serve.slo[0].ttft; got 'serve..slo'",
        ),
    ],
)
def test_a_path_into_a_list_says_which_places_there_are(write, path: str, words: str) -> None:
    with pytest.raises(SpecError) as raised:
        scenario(write(SERVED + "draws: 32\n"), {path: 1})
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("text", "value"), [("1e9", 10**9), ("2.5e-1", 0.25), ("1E3", 1000), ("3e", "3e"), ("e4", "e4")]
)
def test_powers_of_ten_are_numbers(text: str, value: object) -> None:
    assert parse_changes([f"deployment.num_gpus={text}"]) == {"deployment.num_gpus": value}


def test_a_fault_names_a_pool_that_there_is(write) -> None:
    shared = {"serve.faults": [{"kind": "replica_loss", "at": "1 s", "pool": "decode"}]}
    with pytest.raises(SpecError, match=r"pool: expected shared, or no pool, .*; got 'decode'"):
        scenario(write(SERVED), shared)
    pools = {"serve.prefill": {}, "serve.decode": {}, "serve.faults": [{"kind": "replica_loss", "at": "1 s"}]}
    with pytest.raises(SpecError, match=r"pool: expected prefill or decode, .*; got 'shared'"):
        scenario(write(SERVED), pools)


def test_what_a_what_if_changed_of_a_data_sheet_is_said() -> None:
    case = scenario("longcat-flash-h800-decode")
    assert case.hardware.changed == []
    wider = case.what_if({"hardware.memory_bandwidth": "6.704 TB/s", "hardware.scale_up.domain_size": 72})
    assert wider.hardware.changed == ["memory_bandwidth x 2", "scale_up.domain_size x 9"]
    assert case.what_if({"hardware.l2": None, "hardware.price": "9 USD/h"}).hardware.changed == ["no l2"]


def test_an_overlap_that_a_step_is_too_small_for_names_its_place() -> None:
    small = {"step.sequences_per_gpu": 1, "deployment.overlap": "tbo", "draws": 1}
    with pytest.raises(
        ScheduleError, match=r"longcat-flash-h800-decode.*: deployment\.overlap: tbo cuts a step into 2"
    ):
        simulate(scenario("longcat-flash-h800-decode", small))


def test_a_figure_beyond_all_numbers_is_refused() -> None:
    with pytest.raises(SpecError, match=r"hardware\.peak\.bf16: .*got '1e400 TFLOP/s'; give a finite one"):
        scenario("longcat-flash-h800-decode", {"hardware.peak.bf16": "1e400 TFLOP/s"})
