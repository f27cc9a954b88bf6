"""A fit that is written into a profile and read back gives the same times, however far its law is off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from longcat_sim.calibration import OpTimes, write_fit
from longcat_sim.calibration.fit_file import SCHEMA
from longcat_sim.calibration.splits import neighbour_correlation
from longcat_sim.errors import MeasurementError
from longcat_sim.ops.op import op
from longcat_sim.records.measurement import Measurement
from longcat_sim.specs.hardware import load_hardware

SHEET = """\
schema: 1
name: mine
datasheet:
  device: test
  peak: {fp32: 100 GFLOP/s}
  memory: 8 GB
  memory_bandwidth: 10 GB/s
"""


def test_written_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(SHEET)
    rng = np.random.default_rng(0)
    rows = []
    for m in (1, 4, 16, 64, 256):
        for n in (64, 256, 1024, 4096):
            item = op("gemm", dtype="fp32", m=m, n=n, k=512)
            # steps of a factor of ten that no smooth law follows: the local correction must carry them
            seconds = 1e-5 * 10.0 ** (2 * (m > 8)) * (1 + n / 1000) * rng.uniform(0.95, 1.05)
            rows.append(Measurement(op=item, median_s=seconds, p10_s=seconds, p90_s=seconds, count=3))
    fitted = OpTimes.fit(rows, load_hardware(path), draws=4)
    write_fit(path, fitted.to_fit())
    read = OpTimes.from_hardware(load_hardware(path))
    for row in rows:
        assert read.seconds(row.op) == pytest.approx(fitted.seconds(row.op), rel=0.011)  # half a step of 0.01, twice


def test_a_fit_that_cannot_be_read_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(SHEET)
    write_fit(path, OpTimes(load_hardware(path), {}).to_fit())
    before = path.read_bytes()
    law = {"kind": "gemm", "dtype": "fp32", "correlation": float("nan")}
    with pytest.raises(
        MeasurementError, match=r"(?s)mine.yaml: fit: laws: gemm fp32: correlation: .*got nan.*as it was"
    ):
        write_fit(path, {"schema": SCHEMA, "laws": [law]})
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["mine.yaml"]


def test_points_that_all_have_one_neighbour_are_not_said_to_be_alike() -> None:
    """Of a constant numpy finds a correlation of NaN, which a profile may not hold."""
    sizes = tuple(np.full(12, size) for size in (8.0, 64.0, 64.0))
    assert neighbour_correlation(sizes, np.linspace(-0.1, 0.1, 12)) == 0.0
