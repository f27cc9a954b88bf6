"""The H100 campaign that lies in the repository, and the prediction of steps whose exchanges loop back."""

from dataclasses import replace

import numpy as np
import pytest

from longcat_sim.calibration import OpTimes
from longcat_sim.calibration.lenders import nearest
from longcat_sim.errors import ScheduleError
from longcat_sim.model import LatentCache
from longcat_sim.ops.op import loop_back, loop_back_sms, op
from longcat_sim.ops.schedules import LONGCAT_LAYER, schedule
from longcat_sim.profiling.suites import load_of, step_ops
from longcat_sim.records.measurement import StepMeasurement
from longcat_sim.specs.hardware import load_hardware
from longcat_sim.specs.model import model_spec
from longcat_sim.studies.beside import Beside, ExchangeRates, exchange_shares
from longcat_sim.studies.validate import gpu_campaign
from longcat_sim.studies.validate.loop_back import predict_s
from longcat_sim.studies.validate.transfer import measured_devices

SPEC = model_spec("longcat-1layer-32e")


@pytest.fixture(scope="module")
def section():
    return gpu_campaign.run()


@pytest.fixture(scope="module")
def times():
    return OpTimes.from_hardware(load_hardware("h100-sxm-measured"))


def exchanged(overlap: str, exchange_s: float, sms: int = 0) -> StepMeasurement:
    return StepMeasurement(
        model=SPEC.name, phase="decode", sequences=128, queries=1, context=1001, median_s=1.0, p10_s=1.0, p90_s=1.0,
        count=1, received=1000.0, active=32.0, overlap=overlap, exchange_s=exchange_s, exchange_bytes=18.9e6,
        exchange_sms=sms,
    )  # fmt: skip


def test_steps_of_a_full_width_layer_come_out_of_their_ops(section):
    rows = [row for row in section.rows if row.quantity.startswith(("decode", "prefill"))]
    assert len(rows) == 10
    assert max(abs(row.error) for row in rows) <= 0.05
    assert np.median([abs(row.error) for row in rows]) <= 0.02


def test_overlap_with_paced_exchanges_comes_out_of_the_lanes(section):
    rows = [row for row in section.rows if "paced" in row.quantity]
    assert len(rows) == 14
    assert max(abs(row.error) for row in rows) <= 0.05


def test_measured_contention_explains_exchanges_that_take_sms(section, times):
    found = [row for row in section.rows if "copying" in row.quantity and row.quantity.endswith("sbo")]
    assert len(found) == 8
    assert np.median([abs(row.error) for row in found]) <= 0.03
    assert max(abs(row.error) for row in found) <= 0.06
    assert all("without the wait" in row.note for row in found)
    # an exchange that outlasts the dense part: without contention the step comes out far too short
    path = next(f / "h100-sxm-measured.jsonl" for f in gpu_campaign.profile_folders())
    steps = gpu_campaign.load_measurements(path).steps
    step = next(s for s in steps if (s.sequences, s.exchange_sms, s.overlap) == (256, 2, "sbo"))
    assert predict_s(times, SPEC, step) < 0.9 * step.median_s


def test_the_engines_products_take_as_long_as_the_frameworks(section):
    ratio = next(row for row in section.rows if row.quantity == "published over measured: gemm bf16")
    assert ratio.predicted == pytest.approx(1.0, abs=0.05)


def test_without_overlap_a_step_is_its_ops_and_both_exchanges(times):
    base = predict_s(times, SPEC, exchanged("none", 0.0))
    assert predict_s(times, SPEC, exchanged("none", 300e-6)) == pytest.approx(base + 600e-6, rel=1e-6)
    assert exchanged("none", 0.0).received == pytest.approx(load_of(SPEC, 128).received, rel=0.03)
    ops = step_ops(SPEC, "decode", 128, 1, 1001, "bf16", load=None)
    left_out = [item for item in ops if item.kind in ("host", "sampling") or item.dims.get("n") == SPEC.vocab_size]
    assert len(left_out) == 3
    assert base == pytest.approx(sum(times.seconds(o) for o in ops) - sum(times.seconds(o) for o in left_out), rel=0.01)


def test_overlap_hides_an_exchange_up_to_the_dense_part_beside_it(times):
    base = predict_s(times, SPEC, exchanged("sbo", 0.0))
    assert predict_s(times, SPEC, exchanged("sbo", 50e-6)) == pytest.approx(base, rel=1e-6)
    long = predict_s(times, SPEC, exchanged("sbo", 2e-3))
    assert base + 2e-3 < long < base + 4e-3
    slowed = ExchangeRates([Beside(op("gemm", m=32, n=24576, k=6144), exchange(4), 0.5, 1.0)])
    assert predict_s(times, SPEC, exchanged("sbo", 200e-6, sms=4), slowed) > base


def exchange(sms: int):
    return op("dispatch", variant=loop_back(sms), message_bytes=1e8, ranks=1)


def test_rates_beside_an_exchange_are_read_between_what_was_measured():
    small, large = (op("gemm", m=m, n=24576, k=6144) for m in (32, 192))
    found = [
        Beside(item, exchange(sms), rate, 1.0)
        for item, sms, rate in ((small, 1, 1.0), (small, 4, 0.9), (large, 1, 0.9), (large, 4, 0.5))
    ]
    rates = ExchangeRates([*found, Beside(exchange(4), large, 0.7, 1.0)])
    assert rates.of(small, 4) == (pytest.approx(0.9), 1.0)
    assert rates.of(large, 4) == (pytest.approx(0.5), pytest.approx(0.7))
    assert rates.of(large, 2)[0] == pytest.approx(0.7)  # half way in octaves
    assert 0.5 < rates.of(op("gemm", m=80, n=24576, k=6144), 4)[0] < 0.9
    other = rates.of(op("gemm", m=80, n=999, k=6144), 4)[0]
    assert other == pytest.approx(0.7)  # the kind's median
    assert rates.of(op("norm", rows=8, width=64), 4) == (1.0, 1.0)


def test_a_copy_by_few_sms_is_read_and_written_once():
    hardware = load_hardware("h100-sxm")
    shares = exchange_shares(hardware, 48e3, 1e-6, 1)
    assert shares.memory == pytest.approx(96e9 / 3.35e12)
    assert shares.sm == pytest.approx(1 / 132)
    assert loop_back_sms(exchange(16)) == 16
    with pytest.raises(ValueError, match="loop_back_20"):
        loop_back_sms(op("dispatch", variant="low_latency", message_bytes=1.0, ranks=2))


def test_a_frameworks_kernels_are_lent_to_nobody():
    assert load_hardware("h100-sxm-measured").has_own_kernels
    assert not load_hardware("h100-sxm").has_own_kernels
    assert "h100-sxm-measured" not in measured_devices()
    lent = nearest(("router", "fp32", ""), load_hardware("h200-sxm"))
    assert lent is None or lent.lender.name != "h100-sxm-measured"


def test_a_gpu_takes_the_rows_of_zero_experts_along():
    spec = SPEC.replace(num_layers=1)
    rows = {
        dtype: [item["rows"] for item in step_ops(spec, "decode", 16, 1, 100, dtype) if item.kind == "permute"]
        for dtype in ("bf16", "fp32")
    }
    assert rows == {"bf16": [16 * 12, 16 * 12], "fp32": []}


def test_segments_are_launched_after_what_they_wait_for():
    for name in ("none", "sbo"):
        seen: set[str] = set()
        for launch in schedule(name, "longcat").launches():
            assert launch.waits <= seen
            seen.add(launch.segment)
        assert seen == set(LONGCAT_LAYER)
    with pytest.raises(ScheduleError, match="one part"):
        schedule("tbo", "longcat").launches()


def test_a_cpu_reads_as_many_positions_as_there_are():
    cache = LatentCache(model_spec("longcat-tiny"), num_sequences=2, max_tokens=64)
    assert cache.extend(range(2), 13).readable == 13


def test_a_step_whose_exchanges_loop_back_is_written_and_read(tmp_path):
    from longcat_sim.records.measurement import Environment, load_measurements, save_measurements

    step = exchanged("sbo", 1e-4, sms=4)
    save_measurements(tmp_path / "m.jsonl", Environment(device="x", kind="cuda"), [], [step])
    assert load_measurements(tmp_path / "m.jsonl").steps == (step,)
    assert replace(step, overlap="") != step


def test_an_exchange_waits_behind_the_product_launched_with_it(times):
    """Nothing slows anything here, and the exchange is far shorter than the dense part: it waits, the step does not."""
    free = ExchangeRates([])
    assert predict_s(times, SPEC, exchanged("sbo", 20e-6, sms=4), free) == pytest.approx(
        predict_s(times, SPEC, exchanged("sbo", 20e-6)), rel=1e-6
    )
    # one that just fits beside the dense part does not fit behind its first product
    first = times.seconds(op("gemm", m=128, n=24576, k=6144))
    base = predict_s(times, SPEC, exchanged("sbo", 0.0))
    fits = next(
        s for s in np.arange(900e-6, 50e-6, -5e-6) if predict_s(times, SPEC, exchanged("sbo", s)) < base * 1.0001
    )
    waited = predict_s(times, SPEC, exchanged("sbo", fits, sms=4), free) - base
    assert 0.5 * first < waited <= first * 1.01


@pytest.mark.parametrize("turned", [True, False])
def test_of_experts_the_data_chooses_in_which_sizes_neighbours_are_alike(turned):
    """A bump at 128 rows of each expert, or at 1,000 rows of all together: guesses follow the right one."""
    from longcat_sim.calibration.fitted import _smoothness

    groups, rows = (axis.ravel() for axis in np.meshgrid([2, 4, 6, 8, 12, 16, 24, 32], np.geomspace(64, 16384, 25)))
    sizes = (groups, rows, np.full(groups.shape, 4096.0), np.full(groups.shape, 6144.0))
    bump = np.exp(-(np.log2(rows / groups / 128) ** 2) / 0.3) if turned else np.exp(-(np.log2(rows / 1000) ** 2) / 0.3)
    assert _smoothness("grouped_gemm", sizes, 0.3 * bump, np.random.default_rng(0)).is_turned == turned
