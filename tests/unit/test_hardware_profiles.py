import os
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from longcat_sim.calibration import OpTimes
from longcat_sim.errors import SpecError
from longcat_sim.ops import op
from longcat_sim.specs.hardware import hardware_names, load_hardware

ASKED = (
    "a100-sxm", "h20", "h100-sxm", "h800-sxm", "h200-sxm", "b200-sxm", "gb200-nvl72", "b300-sxm", "mi300x", "mi355x",
    "tpu-v7", "ascend-910c", "rtx-4090", "rtx-pro-6000",
)  # fmt: skip
SHARED = Path(os.environ.get("LONGCAT_SIM_SHARED", Path(__file__).parents[3] / "shared"))


def test_every_asked_device_is_packaged() -> None:
    assert set(ASKED) <= set(hardware_names())


@pytest.mark.parametrize("name", ASKED)
def test_peaks_memory_and_bandwidth_have_a_source(name: str) -> None:
    hardware = load_hardware(name)
    unsourced = set(hardware.assumed)
    core = {"memory", *(f"peak.{dtype}" for dtype in hardware.peak)}
    if name != "tpu-v7":  # its bandwidth is recalled, and says so
        core.add("memory_bandwidth")
    assert not core & unsourced, f"{name}: without a source: {core & unsourced}"
    assert 1e10 < hardware.memory < 1e12
    assert all(peak > 1e14 for dtype, peak in hardware.peak.items() if dtype != "fp32")  # without tensor cores


@pytest.mark.parametrize("name", ASKED)
def test_every_device_answers_for_a_decode_step(name: str) -> None:
    times = OpTimes.from_hardware(load_hardware(name))
    hardware = load_hardware(name)
    for asked in (
        op("gemm", m=128, n=8192, k=6144), op("norm", rows=128, width=6144),
        op("mla_decode", batch=64, queries=1, context=4096, heads=64, latent=512, rope=64),
    ):  # fmt: skip
        # never faster than a cold read at the full data-sheet bandwidth, except what a cache may hold
        least = (asked.memory_bytes - (hardware.l2 or 0)) / hardware.memory_bandwidth
        assert least < times.seconds(asked) < 0.01, f"{name} {asked}: {times.seconds(asked)}"


def test_h800_mla_core_keeps_to_the_published_kernel() -> None:
    """FlashMLA: up to 3,000 GB/s where memory binds, 660 TFLOPS where compute does (README @9241ae3)."""
    times = OpTimes.from_hardware(load_hardware("h800-sxm"))
    half = op("mla_decode", batch=128, queries=1, context=8192, heads=64, latent=512, rope=64)
    full = op("mla_decode", batch=128, queries=2, context=8192, heads=128, latent=512, rope=64)
    assert half.memory_bytes / times.seconds(half) == pytest.approx(2.95e12, rel=0.1)
    assert full.flop / times.seconds(full) == pytest.approx(660e12, rel=0.08)


@pytest.mark.skipif(not (SHARED / "reference" / "kernels.yaml").exists(), reason="the kernel tables are not here")
def test_kernel_tables_are_read() -> None:
    from longcat_sim.calibration.importers.kernels import import_kernels

    left_out: Counter[str] = Counter()
    rows = import_kernels(SHARED / "reference" / "kernels.yaml", "h800-sxm", left_out=left_out)
    gemm = [row for row in rows if row.op.kind == "gemm"]
    # one origin per kind: DeepGEMM's own 18 rows of the same kind are counted, not mixed in
    assert len(gemm) == 110
    assert left_out["gemm fp8: deepgemm, beside infersim"] == 18
    first = next(row for row in gemm if row.op.dims == {"m": 16, "n": 1536, "k": 7168})
    assert first.median_s == pytest.approx(16.443e-6)
    assert all("github.com" in row.source for row in rows)
    experts = [row for row in rows if row.op.variant == "masked" and row.op["groups"] == 256]
    # masked rows follow from the table's MFU: 16 tokens per expert come out near 4,096
    assert max(row.op["m"] for row in experts) == pytest.approx(3951, rel=0.02)


@pytest.mark.skipif(not (SHARED / "reference" / "kernels.yaml").exists(), reason="the exchange tables are not here")
@pytest.mark.parametrize("name", ["h800-sxm", "h100-sxm", "h200-sxm", "b200-sxm", "gb200-nvl72", "mi300x"])
def test_packaged_collectives_are_what_the_records_give(name: str) -> None:
    from longcat_sim.calibration.collective_file import collectives_section
    from longcat_sim.calibration.published import published_collectives

    hardware = load_hardware(name)
    found = published_collectives(SHARED / "reference" / "kernels.yaml", hardware, load_hardware)
    assert hardware.fit is not None
    assert found is not None
    assert collectives_section(found) == hardware.fit["collectives"]


@pytest.mark.skipif(not (SHARED / "reference" / "kernels.yaml").exists(), reason="the exchange tables are not here")
def test_calibrate_writes_the_collectives_of_a_device_without_op_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longcat_sim.studies.measure import calibrate_published

    folder = tmp_path / "hardware_profiles"
    folder.mkdir()
    packaged = Path(__file__).parents[2] / "hardware_profiles" / "mi300x.yaml"
    text = packaged.read_text(encoding="utf-8")
    sheet, _, old = text.partition("\nfit:\n")
    (folder / "mi300x.yaml").write_text(sheet + "\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)  # profiles of the working folder go first
    calibrate_published(SHARED / "reference" / "kernels.yaml", "mi300x")
    assert (folder / "mi300x.yaml").read_text(encoding="utf-8").partition("\nfit:\n")[2] == old
    before = (folder / "mi300x.yaml").read_bytes()
    calibrate_published(SHARED / "reference" / "kernels.yaml", "mi300x", out=tmp_path / "copy.yaml")
    assert before == (folder / "mi300x.yaml").read_bytes()
    assert (tmp_path / "copy.yaml").read_bytes() == before.replace(b"name: mi300x\n", b"name: copy\n")
    other = tmp_path / "other.yaml"
    other.write_bytes(packaged.with_name("a100-sxm.yaml").read_bytes())
    with pytest.raises(SpecError, match=r"--out .*: expected a profile of AMD .*; got one of NVIDIA A100"):
        calibrate_published(SHARED / "reference" / "kernels.yaml", "mi300x", out=other)
    assert other.read_bytes() == packaged.with_name("a100-sxm.yaml").read_bytes()


@pytest.mark.parametrize("splits", [("random",), ("largest", "dimension")], ids=["between", "beyond"])
def test_intervals_of_the_packaged_fits_hold_what_they_promise(splits: tuple[str, ...]) -> None:
    """Held-out points of all laws together: 85..95 % inside their 90 % interval, which is no wider than it must be."""
    found = [
        figures
        for name in hardware_names() if "cpu" not in name
        for law in OpTimes.from_hardware(load_hardware(name)).laws_.values() if not law.transferred_from
        for split, figures in law.errors_.items() if split in splits
    ]  # fmt: skip
    count = sum(figures["count"] for figures in found)
    assert count > 200

    def pooled(figure: str) -> float:
        return sum(figures[figure] * figures["count"] for figures in found) / count

    assert 0.85 <= pooled("coverage") <= 0.95
    assert pooled("half_width") <= 5 * pooled("mape")


@pytest.mark.parametrize(
    ("name", "asked", "microseconds"),
    [
        # rows of aiconfigurator-core 0.12.0: the same keys and values, another kernel for one query row, or for 64
        ("h200-sxm", {"kind": "gqa_decode", "dtype": "fp8", "heads": 1, "batch": 256, "context": 16384}, 376),
        ("h200-sxm", {"kind": "gqa_decode", "dtype": "fp8", "heads": 2, "batch": 256, "context": 16384}, 254),
        ("h200-sxm", {"kind": "gqa_decode", "dtype": "fp8", "heads": 16, "batch": 1, "context": 32768}, 23.6),
        ("h200-sxm", {"kind": "gqa_decode", "dtype": "fp8", "heads": 64, "batch": 1, "context": 32768}, 233),
        # small experts in 300 MB of weights, and larger ones in 430 MB: it is their number that takes the time
        ("b200-sxm", {"kind": "grouped_gemm", "dtype": "nvfp4", "groups": 384, "m": 384, "n": 192, "k": 7168}, 331),
        ("b200-sxm", {"kind": "grouped_gemm", "dtype": "nvfp4", "groups": 128, "m": 2048, "n": 2112, "k": 2816}, 211),
    ],
)
def test_kernels_of_one_kind_have_laws_of_their_own(name: str, asked: dict[str, Any], microseconds: float) -> None:
    from longcat_sim.ops import op
    from longcat_sim.ops.attention import gqa_variant

    dims = dict(asked)
    kind, dtype = dims.pop("kind"), dims.pop("dtype")
    if kind == "gqa_decode":
        dims |= {"queries": 1, "kv_heads": 1, "head_dim": 128}
        variant = gqa_variant(dims["heads"])
    else:
        variant = "fused"
    found = OpTimes.from_hardware(load_hardware(name)).seconds(op(kind, dtype=dtype, variant=variant, **dims))
    assert found * 1e6 == pytest.approx(microseconds, rel=0.08)
