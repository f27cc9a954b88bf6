"""Absolute times are printed; only the ratio within one run is asserted."""

import time

import numpy as np
import pytest

from longcat_sim.calibration import OpTimes
from longcat_sim.calibration.published import published_measurements
from longcat_sim.ops import OpArrays, op
from longcat_sim.specs.hardware import load_hardware


def test_many_ops_cost_far_less_than_one_by_one(capsys) -> None:
    times = OpTimes.from_hardware(load_hardware("h800-sxm"))
    rng = np.random.default_rng(0)
    m, n, k = (rng.integers(16, 20000, 100_000).astype(float) for _ in range(3))
    times.seconds_many(OpArrays("gemm", {"m": m[:10], "n": n[:10], "k": k[:10]}, "fp8"))
    start = time.perf_counter()
    times.seconds_many(OpArrays("gemm", {"m": m, "n": n, "k": k}, "fp8"))
    many = (time.perf_counter() - start) / len(m)
    ops = [op("gemm", dtype="fp8", m=a, n=b, k=c) for a, b, c in zip(m[:2000], n[:2000], k[:2000], strict=True)]
    start = time.perf_counter()
    for item in ops:
        times.seconds(item)
    one = (time.perf_counter() - start) / len(ops)
    with capsys.disabled():
        print(f"\nseconds_many {many * 1e6:.2f} us per op, seconds {one * 1e6:.1f} us per op")
    assert many < one / 5


@pytest.mark.slow
def test_a_hundred_thousand_rows_are_fitted_in_seconds(capsys) -> None:
    """All published rows of a B200: 64 draws and the three held-out splits."""
    pytest.importorskip("aiconfigurator_core")
    pytest.importorskip("pyarrow")
    hardware = load_hardware("b200-sxm")
    rows, _, _ = published_measurements(hardware, None, None)
    start = time.perf_counter()
    OpTimes.fit(rows, hardware)
    spent = time.perf_counter() - start
    with capsys.disabled():
        print(f"\n{len(rows)} rows fitted in {spent:.1f} s, {spent * 1e5 / len(rows):.1f} s for 100,000")
    assert spent * 1e5 / len(rows) < 40  # 14 to 18 s on two cores of an EPYC, 16 to 22 on one
