"""The command line: one JSON document on stdout with the agreed keys; wrong input exits 2 with every fault at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longcat_sim.calibration.fit_file import SCHEMA
from longcat_sim.cli import main

DECODE = {
    "step_s", "tpot_s", "tokens_per_s_per_user", "tokens_per_s_per_gpu", "usd_per_million_output_tokens",
    "exposed_communication_s", "communication_s", "compute_s", "memory_bytes_per_gpu",
}  # fmt: skip
SERVE = {
    "requests", "completed", "rejected", "failed", "retried", "unstable", "extrapolated", "duration_s", "ttft_s",
    "tpot_s", "itl_s", "e2e_s", "session_s", "tool_call_s", "input_tokens_per_s", "output_tokens_per_s",
    "goodput_requests_per_s", "prefix_hit_ratio", "preemptions", "gpu_hours", "usd_per_million_input_tokens",
    "usd_per_million_cached_input_tokens", "usd_per_million_output_tokens", "usd_basis", "wall_s", "intervals",
}  # fmt: skip


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    printed = capsys.readouterr()
    return int(stop.value.code or 0), printed.out, printed.err


def test_decode_prints_the_agreed_keys(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "simulate", "longcat-flash-h800-decode", "--json", "--set", "draws=4")
    found = json.loads(out)
    assert code == 0
    assert set(found) >= DECODE
    assert found["usd_basis"] == "decode_gpus"
    for key in DECODE:
        assert found[key]["p5"] <= found[key]["median"] <= found[key]["p95"], key
    # TGS x TPOT = sequences per GPU, and the price follows from TGS
    assert found["tokens_per_s_per_gpu"]["median"] * found["tpot_s"]["median"] == pytest.approx(96, rel=0.02)
    rate = found["tokens_per_s_per_gpu"]["median"]
    assert found["usd_per_million_output_tokens"]["median"] == pytest.approx(2 / 3600 / rate * 1e6, rel=0.02)
    assert {"name", "lane", "start_s", "end_s", "tag"} <= set(found["layers"][0])


def test_prefill_prints_input_rates(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "simulate", "deepseek-v3-h800-prefill", "--json", "--set", "draws=1")
    assert code == 0
    assert {"input_tokens_per_s_per_gpu", "usd_per_million_input_tokens", "ttft_s"} <= set(json.loads(out))


def test_traffic_prints_the_agreed_keys_and_a_bill_that_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, "simulate", "longcat-flash-h800-serve", "--json", "--set", "draws=2", "--set",
        "serve.workload.duration=40 s", "--set", "serve.workload.warm_up=5 s",
    )  # fmt: skip
    found = json.loads(out)
    assert code == 0
    assert set(found) >= SERVE
    lines = found["bill_usd"]
    assert sum(usd for name, usd in lines.items() if name != "total") == pytest.approx(lines["total"], rel=1e-9)
    assert lines["total"] == pytest.approx(found["gpu_hours"] * 2.0, rel=1e-9)


def test_pools_pay_their_own_price(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, "simulate", "longcat-flash-h800-serve", "--json", "--set", "draws=1", "--set",
        "serve.workload.duration=20 s", "--set", "serve.workload.warm_up=1 s", "--set",
        "serve.decode={replicas: 2, hardware: h200-sxm}", "--set", "price={hardware_usd_per_gpu_hour: {h200-sxm: 4.0}}",
    )  # fmt: skip
    found = json.loads(out)
    assert code == 0
    hours = found["gpu_hours_by_pool"]
    expected = hours["prefill"] * 2.0 + hours["decode"] * 4.0
    assert found["bill_usd"]["total"] == pytest.approx(expected, rel=1e-9)


def test_a_larger_token_budget_never_frees_memory(capsys: pytest.CaptureFixture[str]) -> None:
    from longcat_sim.specs.scenario import scenario
    from longcat_sim.studies.engines import kv_blocks

    blocks = []
    for budget in (4096, 8192, 8208, 16384, 65536):
        case = scenario("longcat-flash-h800-serve", {"serve.scheduler.max_num_batched_tokens": budget})
        assert case.serve is not None
        blocks.append(kv_blocks(case, case.serve, "prefill"))
    assert blocks == sorted(blocks, reverse=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["simulate", "nope"], ["expected a path or one of", "longcat-flash-h800-decode"]),
        (["simulate", "longcat-flash-h800-decode", "--set", "hardware.memory=80", "--set", "foo=1"],
         ["--set hardware.memory=80: expected a quantity in B", "--set foo=1: expected a known key"]),
        (["simulate", "longcat-flash-h800-decode", "--set", "model=longcat"],
         ["--set model=longcat: ", "longcat-flash"]),
        (["simulate", "longcat-flash-h800-decode", "--set", "step.sequences_per_gpu=abc", "--set", "price.pue=0.5"],
         ["--set step.sequences_per_gpu=abc: expected a valid number", "--set price.pue=0.5: expected greater than"]),
        (["simulate", "longcat-flash-h800-decode", "--set", "deployment.ep_size=96"],
         ["--set deployment.ep_size=96: ep_size must divide num_gpus: 128 % 96 = 32"]),
        (["simulate", "longcat-flash-h800-decode", "--set", "deployment.overlap=fast"],
         ["error: --set deployment.overlap=fast: expected one of chunked, none,", "got 'fast'; choose one of these"]),
        (["simulate", "longcat-flash-h800-decode", "--set", "deployment.overlap=fast", "--set", "step.phase=decod",
          "--set", "draws=0"],
         ["error: --set deployment.overlap=fast: ", "error: --set step.phase=decod: ", "error: --set draws=0: "]),
        (["simulate", "longcat-flash-h800-decode", "--set", "speculative.acceptance.0=1.5"],
         ["error: --set speculative.acceptance.0=1.5: expected less than or equal to 1; got 1.5"]),
        (["simulate", "longcat-flash-h800-decode", "--set", "speculative.acceptance=[1.5]"],
         ["error: --set speculative.acceptance=[1.5]: [0]: expected less than or equal to 1; got 1.5"]),
        *((["simulate", "longcat-flash-h800-serve", "--set", f"{path}=2"], [f"error: --set {path}=2: expected a quan"])
          for path in ("serve.slo.0.ttft", "serve.slo[0].ttft", "serve.slo.ttft")),
        (["simulate", "longcat-flash-h800-decode", "--set", "hardware.memory_bandwidth=-5 TB/s",
          "--set", "hardware.scale_out.bandwidth=0 GB/s", "--set", "hardware.scale_up={bandwidth: 1 B/s}",
          "--set", "hardware.sm_count=0", "--set", "hardware.scale_out.latency=-1 us"],
         ["error: --set hardware.memory_bandwidth=-5 TB/s: expected a quantity in B/s greater than 0, such as "
          "'3.35 TB/s'; got '-5 TB/s'; write a larger one",
          "error: --set hardware.scale_out.bandwidth=0 GB/s: expected a quantity in B/s greater than 0",
          "error: --set hardware.scale_up={bandwidth: 1 B/s}: domain_size: expected this key; it is missing; add it",
          "error: --set hardware.sm_count=0: expected greater than or equal to 1; got 0",
          "error: --set hardware.scale_out.latency=-1 us: expected a quantity in s of at least 0, such as '5 us'"]),
        (["simulate", "longcat-flash-h800-decode", "--set", "step.phase=decod"],
         ["error: --set step.phase=decod: expected one of 'decode', 'prefill', such as decode; got 'decod'"]),
        (["simulate", "longcat-flash-h800-decode", "--set", "step={sequences_per_gpu: 1}"],
         ["error: --set step={sequences_per_gpu: 1}: phase: expected this key; it is missing; add it, such as"]),
        (["simulate", "longcat-flash-h800-decode", "--set", "model.num_layers=-3"],
         ["num_layers: expected greater than or equal to 1; got -3"]),
        (["simulate", "longcat-flash-h800-decode", "--set", "model.moe_topk=abc"],
         ["moe_topk: expected a valid integer, unable to parse string as an integer; got 'abc'"]),
        (["simulate", "longcat-flash-h800-serve", "--set", "serve.workload.duration=0 s"],
         ["error: --set serve.workload.duration=0 s: expected a quantity in s greater than 0, such as '5 us'"]),
        (["simulate", "longcat-flash-h800-serve", "--set", "serve.workload.duration=5 min"],
         ["error: --set serve.workload.duration=5 min: warm_up: expected less than duration, such as 75 s; got a "]),
        (["simulate", "longcat-flash-h800-serve", "--set", "serve.workload.duration=1 us", "--set",
          "serve.workload.warm_up=0 s"], ["serve.workload.duration: expected a time in which one request arrives"]),
        (["simulate", "longcat-flash-h800-serve", "--set", "serve.workload.input_tokens.max=100", "--set",
          "serve.workload.output_tokens.min=2000"],
         ["error: --set serve.workload.input_tokens.max=100: expected a mean between min and max, such as ",
          "got mean 3600 and max 100: ", "error: --set serve.workload.output_tokens.min=2000: expected a mean between",
          "got mean 1000 and min 2000: "]),
        (["capacity", "longcat-flash-decode-capacity", "--set", "search.hardware=[b200-sxm, h20]"],
         ["price.hardware_usd_per_gpu_hour: expected a price of h20, such as {h20: 1.5}; neither", "add it"]),
        (["capacity", "longcat-flash-h800-decode", "--set", "search={ep_sizes: [2]}"],
         ["--set search={ep_sizes: [2]}: ep_sizes: expected a known key", "did you mean 'ep_size'?"]),
        (["capacity", "longcat-flash-decode-capacity", "--set", "price.usd_per_gpu_hour=-1"],
         ["--set price.usd_per_gpu_hour=-1: expected greater than 0"]),
        (["capacity", "longcat-flash-decode-capacity", "--set", "search.probability=0.99"],
         ["which 16 draws can show", "set draws: 49"]),
        (["capacity", "longcat-flash-decode-capacity", "--set", "search.max_gpus=4"],
         ["a replica of 16 GPUs exceeds 4"]),
        (["capacity", "longcat-flash-serve-capacity", "--set", "serve.slo=[{name: a, ttft: 1 ms}]"],
         ["ttft: expected at least", "loosen the level"]),
        (["capacity", "longcat-flash-serve-capacity", "--set", "search.max_gpus=32"],
         ["by traffic", "replicas, 48 GPUs of 32"]),
        (["capacity", "longcat-flash-serve-capacity", "--set", "serve.slo=[{name: a, tpot: 1 ms}]"],
         ["serve.slo.tpot: expected at least", "read the weights"]),
        (["simulate", "longcat-flash-h800-decode", "--set", "step.sequences_per_gpu=2000"],
         ["GB too much", "sequences per GPU of this length fit"]),
        (["simulate", "longcat-flash-h800-decode", "--set", "deployment.pp_size=2"], ["pp_size: expected 1; got 2"]),
        (["simulate", "longcat-flash-h800-serve", "--set", "serve.workload.arrivals.rate=-1 /s"], ["greater than 0"]),
        (["simulate", "qwen3-32b-h200-serve"], ["serve.workload", "set one"]),
        (["simulate", "longcat-flash-h800-decode", "--set", "price.usd_per_gpu_hour=0"],
         ["--set price.usd_per_gpu_hour=0: expected greater than 0"]),
        (["validate", "--section", "nope"], ["expected some of longcat-report"]),
        (["validate", "--section", "ops", "--hardware", "h100"], ["--hardware", "'h100'", "did you mean 'h100-sxm"]),
        (["validate", "--section", "limits", "--hardware", "h100-sxm"], ["expected --section ops or transfer"]),
        (["validate", "--vllm-run", "x", "--section", "ops"], ["--vllm-run: expected neither"]),
        (["calibrate", "--name", "b200-sxm", "--backend", "tgi", "--out", "x.yaml"],
         ["backend: expected one of trtllm, sglang, vllm", "'tgi'"]),
        (["calibrate", "--name", "b200-sxm", "--backend", "vllm"], ["--out hardware_profiles/b200-sxm-vllm.yaml"]),
        (["calibrate", "--name", "mi300x", "--backend", "vllm", "--out", "x.yaml"],
         ["--backend vllm: expected a device with published tables", "got mi300x"]),
        (["calibrate", "m.jsonl", "--name", "b200-sxm", "--backend", "vllm"],
         ["--backend vllm: expected published tables"]),
        (["calibrate", "--name", "mine"], ["MEASUREMENTS: expected a file that `profile` wrote", "got none"]),
    ],
)  # fmt: skip
def test_wrong_input_exits_2_and_says_what_to_do(
    capsys: pytest.CaptureFixture[str], arguments: list[str], words: list[str]
) -> None:
    code, out, err = run(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert "Traceback" not in err
    for word in words:
        assert word in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["simulate", "longcat-flash-h800-decode", "--trace"],
        ["capacity", "longcat-flash-decode-capacity", "--store"],
        ["capacity", "longcat-flash-decode-capacity", "--picture"],
        ["profile", "--out"],
        ["calibrate", "none.jsonl", "--name", "mine", "--out"],
        ["quickstart", "--out"],
        ["train", "--out"],
        ["train", "--study", "--out"],
        ["topk-study", "--out"],
    ],
)
def test_what_cannot_be_written_is_refused_before_any_work(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    what, other = ("folder", file) if arguments[0] in ("quickstart", "train", "topk-study") else ("file", tmp_path)
    for path in ("/proc/x/y.html", file / "y.html", other):
        code, out, err = run(capsys, *arguments, str(path))
        assert (code, out) == (2, "")
        assert f"{arguments[-1]}: expected a {what} that can be written, such as out" in err
        assert f"got {path}: " in err
        assert "give another path" in err


def test_outputs_are_checked_together_and_leave_nothing(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    given = ["capacity", "longcat-flash-decode-capacity", "--store", str(tmp_path), "--picture", "/dev/null"]
    assert run(capsys, *given)[2].splitlines() == [
        "error: --picture: expected a file that can be written, such as out/result.json; got /dev/null: it is a "
        "device; give another path",
        f"error: --store: expected a file that can be written, such as out/result.json; got {tmp_path}: it is a "
        "folder; give another path",
    ]
    new = tmp_path / "new"
    assert run(capsys, "capacity", "nope", "--store", str(new / "deep" / "s.jsonl"))[0] == 2
    assert not new.exists()


def test_a_profile_without_a_link_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "lonely.yaml"
    path.write_text(
        "schema: 1\nname: lonely\ndatasheet:\n  device: X\n  peak: {bf16: 989 TFLOP/s, fp8: 1979 TFLOP/s}\n"
        "  memory: 200 GB\n  memory_bandwidth: 3 TB/s\n"
    )
    code, _, err = run(capsys, "simulate", "longcat-flash-h800-decode", "--set", f"hardware={path}")
    assert code == 2
    assert "scale_" in err
    assert "Traceback" not in err


def test_a_damaged_fit_is_a_fault_of_the_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(
        "schema: 1\nname: broken\ndatasheet:\n  device: X\n  peak: {bf16: 989 TFLOP/s}\n  memory: 200 GB\n"
        "  memory_bandwidth: 3 TB/s\nfit:\n"
        f"  schema: {SCHEMA}\n  laws: []\n  collectives: {{curves: [], reference: null}}\n"
    )
    code, _, err = run(capsys, "simulate", "longcat-flash-h800-decode", "--set", f"hardware={path}")
    assert code == 2
    assert "broken.yaml: fit: collectives: reference: expected a valid dictionary; got None; restore the section" in err
