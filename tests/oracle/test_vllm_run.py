"""A recorded vLLM run, predicted from the profile of its card, beside what was measured; and other such folders."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longcat_sim.calibration.attention_tables import AttentionTable
from longcat_sim.calibration.engine_links import Collective
from longcat_sim.calibration.engine_times import EngineTimes, capture_sizes
from longcat_sim.calibration.layer_profile import LayerProfile
from longcat_sim.errors import MeasurementError, WorkloadError
from longcat_sim.specs.model import model_spec
from longcat_sim.studies.validate.vllm_run import Recording, run

TOLERANCE = {
    ("tpot_s", "mean"): 0.01, ("e2e_s", "mean"): 0.015, ("ttft_s", "mean"): 0.05,
    ("tpot_s", "p99"): 0.03, ("e2e_s", "p99"): 0.03, ("ttft_s", "p99"): 0.03,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(shared: Path) -> Path:
    path = shared / "data" / "vllm_runs" / "rtxpro6000_llama31_8b"
    if not path.is_dir():
        pytest.skip("no recorded vLLM run")
    return path


def test_recorded_run_is_predicted_within_its_tolerances(folder: Path) -> None:
    table = run(folder)
    for (metric, statistic), tolerance in TOLERANCE.items():
        assert abs(table[metric][statistic]["error"]) < tolerance, (metric, statistic, table[metric][statistic])
    assert set(table) == {"ttft_s", "tpot_s", "e2e_s"}
    assert all(set(row) == {"mean", "p50", "p90", "p99"} for row in table.values())


def variant(folder: Path, to: Path, settings: dict[str, Any], moe: str = "", **meta: Any) -> Path:
    to.mkdir()
    for name in ("requests.jsonl", "config.json"):
        shutil.copy(folder / name, to / name)
    document = json.loads((folder / "meta.json").read_text())
    document["engine_kwargs"].update(settings)
    (to / "meta.json").write_text(json.dumps(document | meta))
    shutil.copytree(folder / "profile", to / "profile")
    if moe:
        (to / "profile" / "tp1" / "moe.csv").write_text(moe)
    return to


def test_prediction_does_not_look_at_measured_times(folder: Path, tmp_path: Path) -> None:
    other = variant(folder, tmp_path / "x", {})
    rows = [json.loads(line) for line in (folder / "requests.jsonl").read_text().splitlines()]
    for row in rows:
        for key in ("scheduled_ts", "first_token_ts", "last_token_ts"):
            row[key] = row[key] * 2 + 5
    (other / "requests.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = run(folder), run(other)
    for metric, statistics in first.items():
        for name, cell in statistics.items():
            assert second[metric][name]["predicted"] == cell["predicted"]


def test_tensor_parallel_run_reads_its_own_tables_and_pays_for_its_link(folder: Path, tmp_path: Path) -> None:
    one = Recording.read(folder).simulate()
    two = Recording.read(variant(folder, tmp_path / "tp2", {"tensor_parallel_size": 2})).simulate()
    assert two.pools["shared"].num_gpus == 2
    assert two.duration_s < one.duration_s
    slow = variant(folder, tmp_path / "slow", {"tensor_parallel_size": 2})
    config = json.loads((slow / "config.json").read_text())
    (slow / "config.json").write_text(json.dumps(config | {"link_bw": 1}))
    assert Recording.read(slow).simulate().duration_s > two.duration_s


def test_full_kv_cache_preempts_and_completes_everything(folder: Path, tmp_path: Path) -> None:
    tight = variant(folder, tmp_path / "kv", {"max_num_seqs": 256}, kv_cache={"num_gpu_blocks": 2588})
    result = Recording.read(tight).simulate()
    assert result.preemptions > 50
    assert result.checks["completed"] == 300


def test_expert_parallel_ranks_step_together(folder: Path, tmp_path: Path) -> None:
    rows = [(ep, t, e, 20 + 6 * e + 0.05 * t) for ep in (1, 2) for t in (1, 64, 2048, 4096) for e in (4, 16, 64)]
    moe = "ep,tokens,activated_experts,time_us\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)
    settings = {"data_parallel_size": 2, "enable_expert_parallel": True}
    path = variant(folder, tmp_path / "ep", settings, moe, model="Qwen/Qwen3-30B-A3B-Instruct-2507")
    result = Recording.read(path).simulate()
    assert result.checks["completed"] == 300
    replicas = result.records.numpy("replica")
    assert 100 < (replicas == 0).sum() < 200
    # every first token comes at a common boundary: both ranks share the instants of their steps
    first = result.records.numpy("first")
    assert len(set(first[replicas == 0]) & set(first[replicas == 1])) > 5


def test_step_is_the_sum_of_its_kernels(folder: Path) -> None:
    profile = LayerProfile.read(folder / "profile", 1)
    times = EngineTimes(profile, model_spec("llama-3.1-8b"), 128)
    dense = {name: dict(zip(*curve, strict=True)) for name, curve in profile.dense.items()}
    head = {name: dict(zip(*curve, strict=True)) for name, curve in profile.per_sequence.items()}
    layer = sum(dense[n][8] for n in ("qkv_proj", "rotary_emb", "o_proj", "gate_up_proj", "act_fn", "down_proj"))
    keys, attention = profile.attention.decode[1][4]
    layer += 2 * dense["layernorm"][8] + attention[7]
    total = 32 * layer + dense["embedding"][8] + dense["final_layernorm"][8]
    total += head["lm_head"][4] + head["sampler"][4]
    assert keys[7] == 1024
    # three sequences would run the graph of 4; five that of 8
    assert times.rows(3) == 4
    assert times.rows(5) == 8
    wide = EngineTimes(profile, model_spec("llama-3.1-8b"), 128)
    wide.sizes = [8]
    assert wide.step_ns([1024] * 4, ()) == round(total * 1000)


@pytest.mark.parametrize(("left_out", "most"), [("rows", 0.015), ("chunk", 0.02), ("count", 0.05)])
def test_attention_that_was_left_out_is_interpolated(folder: Path, tmp_path: Path, left_out: str, most: float) -> None:
    """Beside 64 and more sequences, where a cache stops holding what heads share between two measured contexts."""
    with (folder / "profile" / "tp1" / "attention.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    mixed = [
        row
        for row in rows
        if float(row["prefill_chunk"]) > 0 and float(row["n_decode"]) >= 64 and 128 <= float(row["kv_decode"]) <= 4096
    ]
    some = {id(mixed[i]) for i in np.random.default_rng(0).permutation(len(mixed))[:400]}
    without = {
        "rows": lambda row: id(row) in some,
        "chunk": lambda row: float(row["prefill_chunk"]) == 256,
        "count": lambda row: float(row["n_decode"]) == 64 and float(row["prefill_chunk"]) > 0,
    }[left_out]
    path = tmp_path / "attention.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(row for row in rows if not without(row))
    table = AttentionTable.read(path)
    names = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
    missed = [
        abs(table.us(*(float(row[name]) for name in names)) / float(row["time_us"]) - 1)
        for row in mixed
        if without(row)
    ]
    assert len(missed) >= 140
    assert np.mean(missed) < most


def _written(path: Path, counts: tuple[int, ...], keys: tuple[int, ...] = (0, 1024)) -> AttentionTable:
    """A profile whose times are linear in chunk and count x KV, with a floor up to 64 sequences."""
    rows = [(0, 0, n, kv, 2 + n * kv * 1e-3) for n in (1, 8, 64) for kv in (16, 1024, 8192)]
    for chunk in (16, 512, 2048):
        for past in keys:
            rows.append((chunk, past, 0, 0, 2 + chunk * 0.1))
            rows += [(chunk, past, n, kv, 2 + chunk * 0.1 + n * kv * 1e-3) for n in counts for kv in (16, 1024, 8192)]
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"))
        writer.writerows(rows)
    return AttentionTable.read(path)


def test_attention_between_and_beyond_few_counts(tmp_path: Path) -> None:
    for counts in ((8,), (8, 64), (1, 8, 64)):
        table = _written(tmp_path / "attention.csv", counts)
        for count in (1, 4, 8, 30, 64, 128, 512):
            assert table.us(512, 0, count, 1024) == pytest.approx(2 + 51.2 + count * 1.024)
    # a profile without keys 0 ends where it begins
    assert _written(tmp_path / "attention.csv", (1, 64), (16, 1024)).us(512, 0, 8, 1024) > 0


def test_attention_beyond_the_counts_never_falls(tmp_path: Path) -> None:
    """Up to 64 sequences take equally long: nothing says that more of them would take less."""
    table = _written(tmp_path / "attention.csv", (1, 64))
    table = AttentionTable(table.decode, table.alone, {n: table.beside[64] for n in (1, 8, 64)})
    times = [table.us(512, 0, n, 1024) for n in (64, 128, 256, 512)]
    assert times == sorted(times)


def test_capture_sizes_and_collectives() -> None:
    assert capture_sizes(128)[:5] == [1, 2, 4, 8, 16]
    assert capture_sizes(128)[-1] == 256
    assert capture_sizes(4)[-1] == 8
    # 2 ranks, 1 MB, 16 GB/s, 20 us: two hops of half a megabyte
    assert Collective(16e9, 20e-6).all_reduce_us(1e6, 2) == pytest.approx(2 * (20 + 31.25))


def test_faults_of_a_folder_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(MeasurementError, match=r"meta\.json: expected a recorded engine run"):
        run(tmp_path)
    bad = variant(folder, tmp_path / "bad", {})
    with (bad / "requests.jsonl").open("a") as file:
        file.write("{\n" + json.dumps({"input_toks": 1}) + "\n")
    with pytest.raises(WorkloadError, match=r"requests\.jsonl:301: .*\n.*requests\.jsonl:302: "):
        run(bad)
    unknown = variant(folder, tmp_path / "unknown", {}, model="someone/else-7B")
    with pytest.raises(MeasurementError, match=r"model_config\.json"):
        run(unknown)
    eight = variant(folder, tmp_path / "tp8", {"tensor_parallel_size": 8})
    with pytest.raises(MeasurementError, match="tensor parallelism 8 in tp8/; got tp1, tp2"):
        run(eight)
