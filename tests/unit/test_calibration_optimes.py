from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from longcat_sim.calibration import OpTimes, Roofline, write_fit
from longcat_sim.calibration.laws import Device
from longcat_sim.calibration.weights import law_seconds, weigh, weigh_again
from longcat_sim.errors import MeasurementError, UnmeasuredOpError
from longcat_sim.ops import Op, OpArrays, op
from longcat_sim.records.measurement import Measurement
from longcat_sim.specs.hardware import HardwareSpec, load_hardware

SHEET = {
    "device": "a made-up GPU", "peak": {"bf16": "1000 TFLOP/s", "fp8": "2000 TFLOP/s"}, "memory": "80 GB",
    "memory_bandwidth": "3 TB/s", "l2": "50 MB", "sm_count": 128,
}  # fmt: skip
HARDWARE = HardwareSpec.model_validate({"name": "made-up", **SHEET})


def true_seconds(m: float, n: float, k: float) -> float:
    """A made-up kernel: 4 us, then the slower of 70 % of peak and 85 % of bandwidth."""
    flop, data = 2 * m * n * k, 2 * (m * k + n * k + m * n)
    return 4e-6 + max(flop / 0.7e15, data / 2.55e12)


def rows(noise: float = 0.02, seed: int = 0) -> list[Measurement]:
    rng = np.random.default_rng(seed)
    found = []
    for m in (1, 16, 64, 128, 256, 512, 1024, 2048, 4096):
        for n in (512, 1024, 2048, 4096, 8192):
            for k in (512, 1024, 2048, 4096, 8192):
                seconds = true_seconds(m, n, k) * float(np.exp(rng.normal(0, noise)))
                found.append(
                    Measurement(op=op("gemm", m=m, n=n, k=k), median_s=seconds, p10_s=seconds, p90_s=seconds, count=1)
                )
    return found


@pytest.fixture(scope="module")
def times() -> OpTimes:
    return OpTimes.fit(rows(), HARDWARE, draws=32)


def test_a_known_kernel_is_found_again(times: OpTimes) -> None:
    errors = {row["split"]: row for row in times.errors_}
    # the noise put in is 2 %, whose mean absolute value is 1.6 %
    assert errors["random"]["mape"] < 0.03
    assert errors["largest"]["mape"] < 0.05
    assert errors["dimension"]["mape"] < 0.05
    assert 0.75 <= errors["random"]["coverage"] <= 1.0
    assert errors["random"]["half_width"] <= 5 * errors["random"]["mape"]
    for size in ((100, 3000, 6000), (700, 5000, 700)):
        m, n, k = size
        assert times.seconds(op("gemm", m=m, n=n, k=k)) == pytest.approx(true_seconds(m, n, k), rel=0.08)


def test_a_fit_is_the_same_however_many_cores_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = [(kind, dtype) for kind in ("gemm", "norm") for dtype in ("bf16", "fp8")]
    found = [
        Measurement(op=op(kind, dtype=dtype, **sizes), median_s=row.median_s, p10_s=row.p10_s, p90_s=row.p90_s, count=1)
        for row in rows()[::3]
        for kind, dtype in kinds
        for sizes in ({"m": row.op["m"], "n": row.op["n"], "k": row.op["k"]} if kind == "gemm" else
                      {"rows": row.op["m"], "width": row.op["k"]},)
    ]  # fmt: skip
    fits = []
    for cores in (1, 4):
        monkeypatch.setattr("os.cpu_count", lambda cores=cores: cores)
        fits.append(OpTimes.fit(found, HARDWARE, draws=4).to_fit())
    assert fits[0] == fits[1]
    assert len(fits[0]["laws"]) == 4


def test_two_fits_at_once_leave_the_threads_of_the_process_as_they_were() -> None:
    before = [pool["num_threads"] for pool in threadpool_info()]
    few = rows()[::9]
    with ThreadPoolExecutor(2) as threads:
        one, other = threads.map(lambda seed: OpTimes.fit(few, HARDWARE, draws=2, seed=seed).to_fit(), (0, 0))
    assert one == other
    assert [pool["num_threads"] for pool in threadpool_info()][: len(before)] == before


def test_one_and_many_agree(times: OpTimes) -> None:
    rng = np.random.default_rng(1)
    m, n, k = (rng.integers(1, 20000, 50).astype(float) for _ in range(3))
    many = times.seconds_many(OpArrays("gemm", {"m": m, "n": n, "k": k}))
    one = [times.seconds(op("gemm", m=a, n=b, k=c)) for a, b, c in zip(m, n, k, strict=True)]
    assert np.allclose(many, one, rtol=1e-12)


def test_tags_tell_where_a_figure_comes_from(times: OpTimes) -> None:
    assert times.tag(op("gemm", m=64, n=1024, k=512)) == "measured"
    assert times.tag(op("gemm", m=90, n=1500, k=700)) == "interpolated"
    assert times.tag(op("gemm", m=64, n=200_000, k=512)) == "extrapolated"
    assert times.tag(op("gemm", m=64, n=1024, k=512, dtype="fp8")) == "extrapolated"  # carried from bf16
    assert times.tag(op("norm", rows=64, width=1024)) == "datasheet"


def test_what_was_not_measured_comes_from_the_data_sheet(times: OpTimes) -> None:
    asked = op("norm", rows=4096, width=8192)
    # floor + bytes / (0.8 bandwidth)
    assert times.seconds(asked) == pytest.approx(3e-6 + 2 * 2 * 4096 * 8192 / (0.8 * 3e12))
    assert times.seconds(asked) == Roofline(HARDWARE).seconds(asked)
    low, high = times.interval(asked)
    assert low < 0.5 * times.seconds(asked)
    assert high > 2 * times.seconds(asked)


def test_what_not_even_the_data_sheet_tells_is_refused() -> None:
    bare = HardwareSpec.model_validate({"name": "bare", **SHEET, "peak": {"int8": "1000 TFLOP/s"}})
    times = OpTimes.from_hardware(bare)
    with pytest.raises(UnmeasuredOpError, match=r"gemm in bf16: neither measured nor in the data sheet"):
        times.seconds(op("gemm", m=1, n=2, k=3))
    with pytest.raises(UnmeasuredOpError, match="expected scale_out in the data sheet"):
        times.seconds(op("all_to_all", message_bytes=1e6, ranks=16))


def test_too_few_points_say_how_many_are_needed() -> None:
    few = [row for row in rows() if row.op["m"] == 1 and row.op["n"] == 512][:3]
    with pytest.raises(MeasurementError, match="gemm bf16: expected at least 5 sizes; got 3; measure 2 more"):
        OpTimes.fit(few, HARDWARE)
    with pytest.raises(MeasurementError, match="got none"):
        OpTimes.fit([], HARDWARE)


def test_a_kind_that_a_time_box_cut_short_is_left_out_and_said() -> None:
    begun = [
        Measurement(op=op("host", calls=n), median_s=1e-6 * n, p10_s=1e-6 * n, p90_s=2e-6 * n, count=5) for n in (1, 2)
    ]
    times = OpTimes.fit([*rows(), *begun], HARDWARE, draws=2)
    assert times.provenance["left_out"] == {"host bf16: 2 sizes, a law needs 5": 2}
    assert {law.kind for law in times.laws_.values()} == {"gemm"}


def test_a_changed_peak_scales_the_law_and_widens_the_interval(times: OpTimes) -> None:
    faster = HardwareSpec.model_validate({"name": "faster", **SHEET, "peak": {"bf16": "2000 TFLOP/s"}})
    changed = OpTimes(faster, times.laws_)
    big, small = op("gemm", m=4096, n=8192, k=8192), op("gemm", m=1, n=8192, k=8192)
    assert changed.seconds(big) == pytest.approx(times.seconds(big) / 2, rel=0.1)
    assert changed.seconds(small) == pytest.approx(times.seconds(small), rel=0.02)
    assert changed.tag(big) == "extrapolated"

    def width(of: OpTimes, asked: Op = big) -> float:
        low, high = of.interval(asked)
        return high / low

    assert width(changed) > width(times) * 1.2
    assert width(changed, small) < width(times, small) * 1.1  # it waits for memory: a peak tells nothing of it
    assert "widened by up to" in changed.notes([big])[0]
    drawn = [np.median([of.draw(i).seconds(small) for i in range(100)]) for of in (times, changed)]
    assert drawn[1] == pytest.approx(drawn[0], rel=0.03)


def test_draws_are_repeatable_and_spread_as_the_interval_says(times: OpTimes) -> None:
    asked = op("gemm", m=90, n=1500, k=700)
    seconds = np.array([times.draw(i).seconds(asked) for i in range(200)])
    assert times.draw(7).seconds(asked) == seconds[7]
    assert len(set(seconds.round(12))) > 150
    low, high = times.interval(asked)
    # 90 % expected of 200 draws; their tails may be kept in
    assert ((seconds >= low * 0.9999) & (seconds <= high * 1.0001)).mean() >= 0.8
    # and they fill the interval: their 10th to 90th percentile spans a good part of it
    tenth, ninetieth = np.quantile(seconds, [0.1, 0.9])
    assert 0.5 <= (ninetieth - tenth) / (high - low) <= 1.0


def test_a_fit_survives_the_profile(times: OpTimes, tmp_path) -> None:
    path = tmp_path / "made-up.yaml"
    path.write_text(
        "schema: 1\nname: made-up\ndatasheet:\n  device: a made-up GPU\n"
        "  peak: {bf16: 1000 TFLOP/s, fp8: 2000 TFLOP/s}\n  memory: 80 GB  # a comment stays\n"
        "  memory_bandwidth: 3 TB/s\n  l2: 50 MB\n  sm_count: 128\n"
    )
    head = path.read_text()
    write_fit(path, times.to_fit())
    write_fit(path, times.to_fit())
    assert path.read_text().startswith(head)
    again = OpTimes.from_hardware(load_hardware(path))
    for m in (1, 100, 5000):
        asked = op("gemm", m=m, n=3000, k=1000)
        # corrections are kept in hundredths
        assert again.seconds(asked) == pytest.approx(times.seconds(asked), rel=0.011)
        assert again.tag(asked) == times.tag(asked)
    assert again.errors_[0]["mape"] == pytest.approx(times.errors_[0]["mape"], rel=0.01)
    assert again.draw(3).seconds(asked) == pytest.approx(times.draw(3).seconds(asked), rel=0.02)


def test_a_fit_of_another_version_is_refused() -> None:
    old = HardwareSpec.model_validate({"name": "old", **SHEET, "fit": {"schema": 0}})
    with pytest.raises(MeasurementError, match=r"schema: expected \d+; got 0"):
        OpTimes.from_hardware(old)


def test_demand_says_what_binds(times: OpTimes) -> None:
    compute = times.demand(op("gemm", m=4096, n=8192, k=8192))
    memory = times.demand(op("gemm", m=1, n=8192, k=8192))
    assert compute.sm > 0.9 > compute.memory
    assert memory.memory > 0.7 > memory.sm


def test_a_law_settles_where_both_compute_and_memory_matter() -> None:
    """Absorption products timed on an EPYC (us): rounds of choosing the larger swing to and fro, 90 % off and more."""
    rows = np.array([1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32] * 2, dtype=float)
    wide = [34.2, 42.6, 48.9, 39.2, 41.8, 43.5, 46.0, 51.3, 52.7, 58.9, 65.7, 69.4, 82.6]
    deep = [23.6, 35.3, 42.0, 39.7, 45.1, 45.3, 46.1, 51.6, 52.6, 57.6, 64.4, 70.0, 82.5]
    seconds = np.array([*wide, *deep]) * 1e-6
    sizes = (np.full(26, 8.0), rows, np.repeat([128.0, 64.0], 13), np.repeat([64.0, 128.0], 13))
    device = Device(96.4e9, 28.65e9, 1.0, 1 << 20)
    weights = weigh(sizes, seconds, "bmm", "fp32", device)
    assert np.abs(law_seconds(weights, sizes, "bmm", "fp32", device) / seconds - 1).mean() < 0.08


def test_no_weight_is_below_zero() -> None:
    """A descent may end 1e-19 below its bound, and a profile with a negative weight is refused when it is read."""
    device = Device(1e11, 3.25e10, 1.0, 1 << 20)
    rows, pairs = (part.ravel() for part in np.meshgrid(4.0 ** np.arange(6), np.arange(4)))
    sizes = (rows, np.array([768.0, 512, 2048, 4096])[pairs], np.array([256.0, 512, 512, 1024])[pairs])
    law = np.array([2.6e-5, 0, 1.02, 0, 0, 0, 0.32, 0.12, 1.25, 54, 19.7, 1.06])
    for seed in (1, 6, 16, 26, 27):
        rng = np.random.default_rng(seed)
        seconds = law_seconds(law, sizes, "gemm", "fp32", device) * rng.lognormal(0, 0.15, len(rows))
        weights = weigh(sizes, seconds, "gemm", "fp32", device)
        counts = rng.multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=64).astype(float)
        assert weigh_again(weights, sizes, seconds, "gemm", "fp32", device, counts).min() >= 0
