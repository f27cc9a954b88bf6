"""How close any times that never fall as a size grows can come to the published tables: a linear program (HiGHS)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import sparse
from scipy.optimize import linprog

from longcat_sim.calibration import OpTimes
from longcat_sim.calibration.op_times import points_of
from longcat_sim.calibration.published import published_measurements
from longcat_sim.ops.op import FloatArray
from longcat_sim.specs.hardware import load_hardware

pytest.importorskip("aiconfigurator_core")
pytest.importorskip("pyarrow")
KERNELS = Path(__file__).parents[3] / "shared" / "reference" / "kernels.yaml"


def least_error(coordinates: tuple[FloatArray, ...], seconds: FloatArray) -> float:
    """Return the least mean |t / measured - 1| of times t that rise along every coordinate.

    Points that differ in one coordinate only are compared, so that the true bound is no lower.
    """
    points, pairs = np.stack(coordinates, 1), []
    for axis in range(points.shape[1]):
        others = np.delete(points, axis, 1)
        order = np.lexsort((points[:, axis], *others.T))
        same = (others[order][1:] == others[order][:-1]).all(1)
        pairs.append(np.stack([order[:-1][same], order[1:][same]], 1))
    low, high = np.concatenate(pairs).T
    count, rows = len(seconds), np.arange(len(low))
    # unknowns: t / measured, then its distance from 1
    scale = 1 / np.maximum(seconds[low], seconds[high])
    rising = sparse.csr_matrix(
        (np.r_[seconds[low] * scale, -seconds[high] * scale], (np.r_[rows, rows], np.r_[low, high])),
        shape=(len(low), 2 * count),
    )
    one = sparse.eye(count)
    bounds = sparse.vstack([sparse.hstack([one, -one]), sparse.hstack([-one, -one]), rising])
    right = np.r_[np.ones(count), -np.ones(count), np.zeros(len(low))]
    return float(linprog(np.r_[np.zeros(count), np.ones(count)], A_ub=bounds, b_ub=right).fun / count)


def test_the_bound_of_a_fall_is_half_of_it() -> None:
    """1, 2, 1: the cheapest rising answer gives up the last two to 1 and 1: (0 + 1/2 + 0) / 3."""
    assert least_error((np.array([1.0, 2.0, 3.0]),), np.array([1.0, 2.0, 1.0])) == pytest.approx(1 / 6)


@pytest.mark.slow
@pytest.mark.skipif(not KERNELS.exists(), reason="the published records are not here")
@pytest.mark.parametrize("name", ["b200-sxm", "gb200-nvl72", "h100-sxm"])
def test_the_fit_is_nearly_as_close_as_rising_times_can_be(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    hardware = load_hardware(name)
    rows, _, _ = published_measurements(hardware, KERNELS, None)
    laws = OpTimes.from_hardware(hardware).laws_
    wanted = (("gemm", "bf16"), ("mla_decode", "bf16"), ("mla_decode", "fp8"))
    for kind, dtype, variant in (key for key in laws if key[:2] in wanted):
        table = [row for row in rows if (row.op.kind, row.op.dtype, row.op.variant) == (kind, dtype, variant)]
        bound = least_error(*points_of(kind, table))
        errors = laws[kind, dtype, variant].errors_
        fitted, held_out = errors["fitted"]["mape"], errors["random"]["mape"]
        with capsys.disabled():
            print(
                f"\n{name} {kind} {dtype} {variant}: rising times differ by {bound:.1%} at least; ours by {fitted:.1%}",
                end="",
            )
            print(f", on a fifth held out by {held_out:.1%}")
        assert fitted < bound + 0.01
