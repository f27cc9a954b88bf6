"""Contention within one device: what is measured, and how rates follow from it."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from longcat_sim.calibration import OpTimes
from longcat_sim.calibration.roofline import Roofline
from longcat_sim.errors import MeasurementError, SpecError
from longcat_sim.ops import op
from longcat_sim.ops.op import Op
from longcat_sim.profiling.campaign import run_campaign
from longcat_sim.profiling.kernels import BUILDERS
from longcat_sim.profiling.place import Place
from longcat_sim.profiling.profile import profile
from longcat_sim.profiling.streams import measure_streams, stream_pairs
from longcat_sim.profiling.suites import Grid, suite_ops
from longcat_sim.records.measurement import (
    Environment,
    Measurement,
    load_measurements,
    save_measurements,
    skipped_lines,
)
from longcat_sim.specs.hardware import load_hardware
from longcat_sim.specs.model import model_spec
from longcat_sim.studies.beside import rate_beside, slowdowns, summary
from longcat_sim.studies.measure import calibrate, card_of, measured_collectives

TINY = model_spec("longcat-tiny")
CPU = Place(torch.device("cpu"), torch.float32)
GRID = Grid(decode=((1, 32), (4, 64)), prefill=((1, 16),))


def test_a_rate_is_that_of_the_time_that_was_shared() -> None:
    assert rate_beside(1.0, 2.0, 1.0) == pytest.approx(0.5)
    # 1.5 s in all, of which 1.0 s shared: half a second alone does half the work, the other half took 1.0 s
    assert rate_beside(1.0, 1.5, 1.0 / 1.5) == pytest.approx(0.5)
    assert rate_beside(1.0, 1.0, 0.3) == pytest.approx(1.0)


def test_two_passes_that_fill_the_memory_halve_each_other() -> None:
    hardware = load_hardware("h100-sxm")
    times = Roofline(hardware)
    first, second = (op("elementwise", dtype="bf16", rows=rows, width=4096, inputs=1) for rows in (16384, 8192))

    def row(item: Op, seconds: float, alongside: Op | None = None) -> Measurement:
        return Measurement(
            op=item, median_s=seconds, p10_s=seconds, p90_s=seconds, count=3, suite="contention", alongside=alongside
        )

    rows = [row(first, 1e-4), row(second, 5e-5), row(first, 2e-4, second), row(second, 1e-4, first)]
    found = slowdowns(rows, times, hardware)
    assert [(one.measured, one.neighbour) for one in found] == [(0.5, second), (0.5, first)]
    assert all(one.predicted == pytest.approx(0.5, abs=0.03) for one in found)
    assert summary(found)["mean_difference"] < 0.03


def test_pairs_run_alone_and_at_once() -> None:
    pairs = stream_pairs(TINY, CPU, "fp32")
    assert {item.kind for item, _ in pairs} == {"gemm", "grouped_gemm", "mla_decode", "norm", "router"}
    small = op("gemm", dtype="fp32", m=8, n=64, k=64)
    beside = op("elementwise", dtype="fp32", rows=64, width=64, inputs=1)
    rows = measure_streams(TINY, CPU, "fp32", budget_s=5.0, pairs=[(small, beside)])
    assert [(row.op, row.alongside) for row in rows] == [
        (small, None), (beside, None), (small, beside), (beside, small)
    ]  # fmt: skip
    assert all(0 < row.overlapped <= 1 for row in rows)
    with torch.inference_mode():
        once = BUILDERS["gemm"](small, TINY, CPU).run
        once()
        start = time.perf_counter()
        for _ in range(100):
            once()
        seconds = (time.perf_counter() - start) / 100
    assert rows[0].p10_s < 10 * seconds  # a thread with the library's own threads took 600 times as long


def test_one_suite_leaves_the_measurements_of_the_others_in_the_file(tmp_path: Path) -> None:
    out = tmp_path / "m.jsonl"
    ops = profile(["small-ops"], "cpu", TINY, budget_s=1.0, grid=GRID, out=out)
    for _ in range(2):  # the second time finds everything there
        run_campaign(out, device="cpu", budget_s=4.0, plan=(("model-step", "longcat-tiny", 1.0),))
        saved = load_measurements(out)
        assert len(saved) == len(ops)
        assert len(saved.steps) == 5
    with pytest.raises(MeasurementError, match=r"suite: expected some of .*overlap; got steps"):
        run_campaign(out, device="cpu", plan=(("steps", "longcat-tiny", 1.0),))


def test_a_gpu_measures_products_in_fp8_too() -> None:
    items = [item for item in suite_ops("decode", model_spec("longcat-flash"), GRID, "bf16") if item.dtype == "fp8"]
    assert items
    assert {item.kind for item in items} == {"gemm"}
    with torch.inference_mode():
        timed = BUILDERS["gemm"](op("gemm", dtype="fp8", m=3, n=32, k=64), TINY, Place(CPU.device, torch.bfloat16))
        assert timed.run().shape == (3, 32)  # type: ignore[attr-defined]


def test_what_a_library_cannot_do_is_named_and_the_rest_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setitem(BUILDERS, "norm", refuses)
    found = profile(["small-ops"], "cpu", TINY, budget_s=1.5, grid=GRID)
    assert found.failed == {"norm fp32": "no such kernel"}
    assert "norm fp32 failed: no such kernel" in found.summary()
    assert {row.op.kind for row in found} >= {"router", "embedding"}
    assert all(item.kind != "norm" for _, item in found.dropped)


def test_a_resumed_profile_keeps_pairs_and_steps(tmp_path: Path) -> None:
    """The file's contention pairs and model steps were thrown away by the next suite of ops."""
    out = tmp_path / "m.jsonl"
    run_campaign(out, device="cpu", budget_s=3.0, plan=(("model-step", "longcat-tiny", 1.0),))
    beside = op("elementwise", dtype="fp32", rows=64, width=64, inputs=1)
    pair = Measurement(
        op=op("gemm", dtype="fp32", m=8, n=64, k=64), median_s=1.0, p10_s=1.0, p90_s=1.0, count=1, alongside=beside
    )
    before = load_measurements(out)
    save_measurements(out, before.environment, [*before, pair], before.steps)
    found = profile(["small-ops"], "cpu", TINY, budget_s=1.0, grid=GRID, out=out, resume=out)
    after = load_measurements(out)
    assert pair in list(after)
    assert after.steps == before.steps
    assert f"{found.fresh} of them new" in found.summary()


def test_the_fit_of_a_cpu_does_not_go_into_the_profile_of_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "m.jsonl"
    profile(["decode"], "cpu", TINY, budget_s=1.0, grid=GRID, out=out)
    for name, match in (("h100-sxm", "a name of its own"), ("../zz", "expected letters")):
        with pytest.raises(SpecError, match=match):
            calibrate(out, name, tmp_path / "fit.yaml")
    assert not (tmp_path / "fit.yaml").exists()


def test_the_fit_of_a_cpu_does_not_go_into_the_profile_of_another_cpu(tmp_path: Path) -> None:
    """The names of CPUs hold no card's, and all of them passed for one."""
    out, sheet = tmp_path / "m.jsonl", tmp_path / "cpu-local.yaml"
    items = [op("gemm", dtype="fp32", m=m, n=64, k=64) for m in (1, 2, 4, 8, 16)]
    rows = [Measurement(op=item, median_s=1e-5, p10_s=1e-5, p90_s=1e-5, count=3) for item in items]
    sheet.write_text(
        "schema: 1\nname: cpu-local\ndatasheet:\n  device: AMD EPYC, one core\n  peak: {fp32: 100 GFLOP/s}\n"
        "  memory: 8 GB\n  memory_bandwidth: 10 GB/s\n  sm_count: 1\n"
    )
    head = sheet.read_text()
    save_measurements(out, Environment(device="Intel Xeon Gold", kind="cpu"), rows)
    with pytest.raises(SpecError, match=r"expected measurements of AMD EPYC, one core.*got those of 'Intel Xeon Gold'"):
        calibrate(out, "cpu-local", sheet)
    assert sheet.read_text() == head
    save_measurements(out, Environment(device="AMD EPYC", kind="cpu"), rows)
    calibrate(out, "cpu-local", sheet, draws=2)
    assert load_hardware(sheet).has_own_kernels


@pytest.fixture
def h100(tmp_path: Path) -> Path:
    """A file of an H100: products, collectives over 2 and 16 ranks, an uneven one, one size alone, a pair."""

    def row(item: Op, seconds: float, suite: str, alongside: Op | None = None) -> Measurement:
        return Measurement(
            op=item, median_s=seconds, p10_s=seconds, p90_s=seconds, count=3, suite=suite, alongside=alongside
        )

    def shared(kind: str, size: float, ranks: int, variant: str = "") -> Op:
        return op(kind, dtype="fp32", variant=variant, message_bytes=size, ranks=ranks)

    gemms = [row(op("gemm", m=m, n=4096, k=4096), 1e-5 * (1 + m / 64), "decode") for m in (1, 4, 16, 64, 256)]
    found = [
        row(shared("all_reduce", size, ranks), 2e-5 + size / 1e11, "collectives")
        for ranks in (2, 16) for size in (2.0**14, 2.0**20, 2.0**24)
    ]  # fmt: skip
    found += [row(shared("all_to_all", size, 2, "uneven"), 3e-5, "collectives") for size in (2.0**14, 2.0**20)]
    found += [row(shared("all_gather", 2.0**14, 2), 3e-5, "collectives")]
    found += [row(gemms[0].op, 9e-5, "contention between ranks", found[0].op)]
    environment = Environment(device="NVIDIA H100 80GB HBM3", kind="cuda", date="2026-01-02T03:04:05+00:00")
    save_measurements(tmp_path / "ops.jsonl", environment, gemms)
    save_measurements(tmp_path / "collectives.jsonl", environment, found)
    save_measurements(tmp_path / "all.jsonl", environment, [*gemms, *found])
    return tmp_path


def test_measured_collectives_reach_the_profile_and_what_does_not_is_counted(h100: Path) -> None:
    if not Path("hardware_profiles/h100-sxm.yaml").exists():
        pytest.skip("not run from the repository")
    calibrate(h100 / "all.jsonl", "mine", h100 / "mine.yaml", draws=2)
    times = OpTimes.from_hardware(load_hardware(h100 / "mine.yaml"))
    asked = op("all_reduce", message_bytes=2.0**20, ranks=2)
    assert times.seconds(asked) == pytest.approx(2e-5 + 2**20 / 1e11, abs=1e-8)  # us to two digits
    assert times.tag(asked) == "measured"
    assert times.collectives_.kernel_gap_s == 0.0
    assert times.provenance["left_out"] == {
        "all_to_all uneven (tables hold none of that variant)": 2,
        "all_gather over 2 ranks (1 size, a table needs 2)": 1,
        "contention between ranks (nothing is fitted to it)": 1,
    }


def test_a_file_of_collectives_alone_leaves_the_laws_and_one_without_leaves_the_collectives(h100: Path) -> None:
    if not Path("hardware_profiles/h100-sxm.yaml").exists():
        pytest.skip("not run from the repository")
    mine = h100 / "mine.yaml"
    with pytest.raises(MeasurementError, match="expected measurements of ops alone; got none"):
        calibrate(h100 / "collectives.jsonl", "mine", mine)
    assert not mine.exists()  # nor a data sheet alone, which a scenario would take for a device
    calibrate(h100 / "ops.jsonl", "mine", mine, draws=2)
    before = load_hardware(mine).fit["laws"]
    calibrate(h100 / "collectives.jsonl", "mine", mine)
    fit = load_hardware(mine).fit
    assert fit["laws"] == before
    assert {(row["kind"], row["ranks"]) for row in fit["collectives"]["curves"]} == {
        ("all_reduce", 2), ("all_reduce", 16)
    }  # fmt: skip
    calibrate(h100 / "ops.jsonl", "mine", mine, draws=2)
    assert load_hardware(mine).fit["collectives"] == fit["collectives"]


def test_collectives_need_their_link_in_the_data_sheet_and_devices_to_run_between(h100: Path) -> None:
    rows = load_measurements(h100 / "collectives.jsonl")
    hardware = load_hardware("h100-sxm")
    times, left_out = measured_collectives(rows, hardware.model_copy(update={"scale_out": None}))
    assert {curve.ranks for curve in times.curves_} == {2}
    assert left_out["collectives over 16 ranks (the data sheet has no scale_out)"] == 3
    here = replace(rows, environment=replace(rows.environment, kind="cpu"))
    times, left_out = measured_collectives(here, hardware)
    assert times is None
    assert left_out["collectives (between processes of a CPU, not between devices)"] == 9


def test_lines_that_could_not_be_read_are_named() -> None:
    assert skipped_lines([]) == ""
    said = skipped_lines([(3, "not JSON"), (5, "nan"), (6, "x"), (9, "y")])
    assert said.startswith("; 4 lines could not be read and were left out (line 3: not JSON;")
    assert said.endswith("and 1 more)")


def test_an_op_alone_beside_others_is_not_fitted(tmp_path: Path) -> None:
    """In a pair it runs again and again with warm caches."""
    item, beside = (
        suite_ops("decode", TINY, GRID, "fp32")[0],
        op("elementwise", dtype="fp32", rows=9, width=64, inputs=1),
    )

    def row(suite: str, seconds: float, alongside: Op | None = None) -> Measurement:
        return Measurement(
            op=item, median_s=seconds, p10_s=seconds, p90_s=seconds, count=1, suite=suite, alongside=alongside
        )

    assert not row("decode", 1.0).is_contention
    assert row("contention", 1.0).is_contention
    assert row("contention between ranks", 1.0, beside).is_contention
    out = tmp_path / "m.jsonl"
    found = profile(["decode"], "cpu", TINY, budget_s=0.2, grid=GRID, out=out)
    known = load_measurements(out)
    save_measurements(out, known.environment, [*known, row("contention", 9.0), row("contention", 8.0, beside)])
    run_campaign(out, device="cpu", budget_s=1.0, plan=(("decode", "longcat-tiny", 1.0),), grid=GRID)
    after = load_measurements(out)
    mine = next(r for r in found if r.op == item)
    assert mine in list(after)
    assert sum(r.is_contention for r in after) == 2


@pytest.mark.parametrize(("heads", "drafts", "variant"), [(32, 0, "mha"), (64, 3, ""), (64, 8, "")])
def test_drafts_do_not_change_the_decode_kernel(heads: int, drafts: int, variant: str) -> None:
    """64 heads on 8 KV heads with 4 drafts: 40 query rows per KV head, and still no kernel that nobody measured so."""
    from longcat_sim.ops.attention import StepSize, attention
    from longcat_sim.specs.deployment import Deployment

    model = model_spec("qwen3-32b").replace(num_attention_heads=heads, num_key_value_heads=8 if heads == 64 else heads)
    _, core = attention(model, Deployment(num_gpus=1), StepSize("decode", 4, 1 + drafts, 4096))
    assert next(shape for shape in core if shape.kind == "gqa_decode").variant == variant


def test_pairs_that_the_time_box_drops_are_named() -> None:
    failed: dict[str, str] = {}
    assert measure_streams(TINY, CPU, "fp32", budget_s=-1.0, failed=failed) == []
    assert failed["contention"] == "the time box dropped 10 of 10 pairs"


def test_a_fit_goes_into_no_profile_of_another_card_or_of_published_tables(tmp_path: Path) -> None:
    campaign = Path("hardware_profiles/h100-sxm-measured.jsonl")
    if not campaign.exists():
        pytest.skip("not run from the repository")
    for name, match in (("b200-sxm", "expected measurements of NVIDIA B200"), ("h100-sxm", "h100-sxm-measured")):
        with pytest.raises(SpecError, match=match):
            calibrate(campaign, name)
    calibrate(campaign, "mine", tmp_path / "mine.yaml", draws=2)  # the data sheet of the same card
    mine = load_hardware(tmp_path / "mine.yaml")
    assert (mine.name, mine.sm_count, mine.has_own_kernels) == ("mine", 132, True)


def test_a_card_is_known_by_the_name_that_its_driver_gives() -> None:
    for driver, name in (
        ("NVIDIA H100 80GB HBM3", "h100-sxm"), ("NVIDIA A100-SXM4-80GB", "a100-sxm"), ("NVIDIA B200", "b200-sxm"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx-pro-6000"),
    ):  # fmt: skip
        assert card_of(driver) == card_of(load_hardware(name).device) is not None
    assert card_of("NVIDIA GeForce RTX 5090") != card_of(load_hardware("rtx-4090").device)
    assert card_of("NVIDIA H100 PCIe") != card_of(load_hardware("h100-sxm").device)
    assert card_of("AMD EPYC 7B13") is None
