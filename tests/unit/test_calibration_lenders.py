"""Kinds that nobody measured on a device: who lends a law, and how far off it is on devices whose times are known."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from longcat_sim.calibration import OpTimes
from longcat_sim.calibration.artefacts import without_warm
from longcat_sim.calibration.lenders import nearest
from longcat_sim.ops.attention import mla_variant
from longcat_sim.ops.op import op
from longcat_sim.records.measurement import Measurement
from longcat_sim.specs.hardware import load_hardware
from longcat_sim.studies.validate.transfer import carried_step, lent_errors, spread_left, step_ratios

LINEAR = {"qkv_proj": (6144, 4096), "o_proj": (4096, 4096), "gate_up_proj": (28672, 4096), "down_proj": (4096, 14336)}
"""Layer of Llama-3.1-8B -> (outputs, inputs)."""


def test_the_same_cores_lend_before_others() -> None:
    h20 = load_hardware("h20")
    lent = nearest(("gemm", "fp8", ""), h20)
    assert lent is not None
    assert lent.lender.architecture == "Hopper"
    times = OpTimes.from_hardware(h20)
    product = op("gemm", dtype="fp8", m=256, n=6144, k=6144)
    assert times.tag(product) == "extrapolated"
    low, high = times.interval(product)
    assert high / low > 1.5
    assert f"of {lent.lender.name}" in times.notes([product])[0]


def test_a_profile_without_an_architecture_lends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So `calibrate` writes for a CPU, whose laws no GPU should take; a user's own GPU lends where it names one."""
    folder = tmp_path / "hardware_profiles"
    folder.mkdir()
    text = Path("hardware_profiles/h100-sxm.yaml").read_text(encoding="utf-8").replace("name: h100-sxm", "name: mine")
    (folder / "mine.yaml").write_text(text.replace("  architecture: Hopper\n", ""), encoding="utf-8")
    h100 = load_hardware("h100-sxm")
    monkeypatch.chdir(tmp_path)
    lent = nearest(("topk", "fp32", ""), h100)
    assert lent is not None
    assert lent.lender.name == "h200-sxm"
    (folder / "mine.yaml").write_text(text, encoding="utf-8")
    lent = nearest(("topk", "fp32", ""), h100)
    assert lent is not None
    assert lent.lender.name == "mine"


def test_the_kernel_asked_for_is_taken_from_the_same_cores() -> None:
    """An H200 runs the masked expert kernels that were timed on an H800; its own table holds other kernels."""
    times = OpTimes.from_hardware(load_hardware("h200-sxm"))
    masked = times.answer(("grouped_gemm", "fp8", "masked"))
    assert masked is not None
    assert (masked.origin, masked.law.variant) == ("h800-sxm", "masked")
    blackwell = OpTimes.from_hardware(load_hardware("b200-sxm")).answer(("grouped_gemm", "fp8", "masked"))
    assert blackwell is not None
    assert blackwell.origin == ""


def test_another_makers_cores_are_not_sms() -> None:
    """The lender's SM count stands; the interval holds what laws missed on the only other maker that was measured."""
    times = OpTimes.from_hardware(load_hardware("tpu-v7"))
    answer = times.answer(("gemm", "bf16", ""))
    assert answer is not None
    assert answer.device.sm_count == load_hardware(answer.origin).sm_count
    assert answer.spread > 0.7


@pytest.mark.parametrize("name", ["a100-sxm", "h200-sxm", "b200-sxm", "rtx-pro-6000", "l40s"])
def test_a_lent_law_beats_the_data_sheet(name: str) -> None:
    """Kind by kind, and over a whole step, on devices whose own times are known and not used."""
    assert np.median([np.median(np.abs(row)) for row in lent_errors(name).values()]) < 0.25
    lent, sheet = step_ratios(name)
    assert abs(np.log(lent)) < 0.5
    assert abs(np.log(lent)) < abs(np.log(sheet))


def test_rows_that_no_memory_can_have_fed_are_dropped() -> None:
    """33.6 MB in 11 us are 3.05 TB/s: from the cache, not from a memory of 1.8 TB/s; a small row may be."""
    warm, cold = (
        Measurement(op=op("gemm", m=1, n=4096, k=4096), median_s=seconds, p10_s=seconds, p90_s=seconds, count=1)
        for seconds in (11e-6, 22e-6)
    )
    passes = Measurement(op=op("norm", rows=512, width=4096), median_s=1e-6, p10_s=1e-6, p90_s=1e-6, count=1)
    kept, dropped = without_warm([warm, cold, passes], 1.8e12)
    assert kept == [cold, passes]
    assert dropped == {"gemm bf16": 1}


def test_the_rtx_pro_6000_of_the_tables_is_that_of_a_recorded_engine(shared: Path) -> None:
    """Linear layers that vLLM timed on that card, none of them in the fit, 1 to 4,096 tokens."""
    times = OpTimes.from_hardware(load_hardware("rtx-pro-6000"))
    path = shared / "data/vllm_runs/rtxpro6000_llama31_8b/profile/tp1/dense.csv"
    errors = []
    with path.open(encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["layer"] in LINEAR:
                n, k = LINEAR[row["layer"]]
                predicted = times.seconds(op("gemm", dtype="bf16", m=int(row["tokens"]), n=n, k=k))
                errors.append(np.log(predicted / (float(row["time_us"]) * 1e-6)))
    assert len(errors) > 40
    assert np.median(np.abs(errors)) < 0.06
    assert abs(np.median(errors)) < 0.04


def test_a_device_whose_one_law_serves_all_kernels_lends_it_for_each() -> None:
    """Hopper's MLA tables make no difference by heads; Blackwell's do, and lie further from an MI300X."""
    few = nearest(("mla_decode", "bf16", "narrow"), load_hardware("mi300x"))
    many = nearest(("mla_decode", "bf16", ""), load_hardware("mi300x"))
    assert few is not None
    assert many is not None
    assert few.lender.name == many.lender.name
    assert few.lender.architecture == "Hopper"
    wide = nearest(("gqa_decode", "bf16", "wide"), load_hardware("mi300x"))
    assert wide is not None
    assert wide.law.variant == "wide"


def test_blackwell_answers_for_few_heads_with_a_kernel_of_their_own() -> None:
    """32 heads take longer than 64 there; on Hopper, whose one law serves both, they do not."""

    def seconds(device: str, heads: int) -> float:
        dims = {"batch": 128, "queries": 1, "context": 16384, "heads": heads, "latent": 512, "rope": 64}
        item = op("mla_decode", variant=mla_variant(heads), **dims)
        times = OpTimes.from_hardware(load_hardware(device))
        assert not times.notes([item])
        return times.seconds(item)

    assert seconds("b200-sxm", 32) > 1.2 * seconds("b200-sxm", 64)
    assert seconds("h100-sxm", 32) < seconds("h100-sxm", 64)


def test_128_heads_in_fp8_are_another_kernel_on_an_rtx_pro_6000_and_nowhere_else() -> None:
    dims = {"batch": 64, "queries": 1, "context": 16384, "latent": 512, "rope": 64}

    def seconds(device: str, heads: int) -> float:
        item = op("mla_decode", dtype="fp8", variant=mla_variant(heads), heads=heads, **dims)
        return OpTimes.from_hardware(load_hardware(device)).seconds(item)

    assert seconds("rtx-pro-6000", 128) < 0.6 * seconds("rtx-pro-6000", 64)
    for device in ("b200-sxm", "h100-sxm", "l40s"):
        assert seconds(device, 128) >= 0.98 * seconds(device, 64), device
    for heads in (32, 64, 128):  # a card of its cores takes all from it, in bf16 too, where one law serves all
        for dtype in ("bf16", "fp8"):
            lent = nearest(("mla_decode", dtype, mla_variant(heads)), load_hardware("rtx-5090"))
            assert lent is not None
            assert lent.lender.name == "rtx-pro-6000", (dtype, heads)


@pytest.mark.parametrize(
    ("name", "gap"),
    [("h800-sxm", 1.5e-6), ("rtx-pro-6000", 1.5e-6), ("h20", 1.5e-6), ("mi325x", 1.5e-6), ("h100-sxm-measured", 0.0)],
)
def test_kernels_have_gaps_wherever_tables_leave_them_out(name: str, gap: float) -> None:
    """With or without tables of collectives; what `profile` measured holds them."""
    times = OpTimes.from_hardware(load_hardware(name))
    assert times.links.kernel_gap_s == gap
    assert (times.draw(2).links.kernel_gap_s != gap) == bool(gap)


def test_a_sister_device_comes_within_a_few_percent_over_a_step() -> None:
    for name in ("h100-sxm", "h200-sxm"):
        assert step_ratios(name)[0] == pytest.approx(1.0, abs=0.03)


def test_one_generations_laws_foretell_a_step_of_the_next() -> None:
    """Kind by kind they miss by a fifth; over a decode step, experts and quantising on either side make up for it."""
    assert carried_step("h200-sxm", "h100-sxm") == pytest.approx(1.0, abs=0.03)
    for source in ("h100-sxm", "h200-sxm"):
        assert carried_step(source, "b200-sxm") == pytest.approx(1.0, abs=0.12)


def test_what_a_factor_per_kind_would_leave() -> None:
    assert spread_left(np.full(9, 0.5)) == pytest.approx(0.0)  # all too slow by half: a factor mends it
    # logs 0, 0.1 .. 1.0: half of eleven points lie within five steps, so at best 0.25 to either side
    assert spread_left(np.expm1(np.arange(11) / 10)) == pytest.approx(np.expm1(0.25))


@pytest.mark.parametrize("name", ["mi325x", "mi355x", "tpu-v7"])
def test_a_what_if_keeps_its_lender(name: str) -> None:
    """Another lender at another bandwidth made twice the bandwidth 37 % slower."""
    hardware = load_hardware(name)
    ops = [
        op("gemm", m=64, n=6144, k=6144),
        op("mla_decode", batch=64, queries=1, context=4096, heads=64, latent=512, rope=64),
    ]
    for figure in ("memory_bandwidth", "peak"):
        found = []
        for factor in (0.25, 0.5, 0.8, 1.0, 1.3, 1.6, 2.0, 4.0):
            value = getattr(hardware, figure)
            faster = {kind: rate * factor for kind, rate in value.items()} if figure == "peak" else value * factor
            times = OpTimes.from_hardware(hardware.model_copy(update={figure: faster}))
            found.append([times.seconds(one) for one in ops])
        assert (np.diff(found, axis=0) <= 1e-12).all(), figure
