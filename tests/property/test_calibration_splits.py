"""Intervals from held-out residuals hold what they promise, on noise of any shape."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from longcat_sim.calibration.fitted import FittedLaw
from longcat_sim.calibration.laws import LAWS, Device
from longcat_sim.calibration.splits import _interval, _quantiles, judge
from longcat_sim.calibration.table import TimeTable, raised, refine, rising, thin
from longcat_sim.calibration.weights import law_seconds

DEVICE = Device(1e15, 3e12, 128.0, 5e7)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), shape=st.sampled_from([(7,), (4, 5), (3, 4, 3)]))
def test_isotonic_grids_rise_along_every_axis(seed: int, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(seed).normal(size=shape)
    for fitted in (rising(values), raised(values)):
        assert all((np.diff(fitted, axis=axis) >= -1e-12).all() for axis in range(len(shape)))
    risen = raised(values)
    assert np.allclose(rising(risen), risen)  # what rises is left alone


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), shape=st.sampled_from([(12,), (6, 5), (3, 4, 3)]))
def test_rising_times_miss_hardly_more_than_any_can(seed: int, shape: tuple[int, ...]) -> None:
    """The least absolute error is a linear program's."""
    slope = sum(np.indices(shape)) / 4
    values = slope + np.random.default_rng(seed).standard_t(2, shape) / 4
    count, at = values.size, np.arange(values.size).reshape(shape)
    low, high = (
        np.concatenate([np.delete(at, end, axis).ravel() for axis in range(at.ndim)]) for end in (-1, 0)
    )  # fmt: skip
    one = np.eye(count)
    step = one[low] - one[high]
    bounds = np.block([[one, -one], [-one, -one], [step, np.zeros_like(step)]])
    right = np.r_[values.ravel(), -values.ravel(), np.zeros(len(step))]
    best = linprog(np.r_[np.zeros(count), np.ones(count)], bounds, right, bounds=(None, None)).fun
    assert np.abs(rising(values) - values).sum() <= 1.1 * best + 0.01 * count


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000))
def test_a_product_is_read_back_exactly_between_knots(seed: int) -> None:
    rng = np.random.default_rng(seed)
    axes = [np.array([1.0, 4.0, 16.0, 64.0]), np.array([8.0, 32.0, 100.0])]
    grid = np.meshgrid(*axes, indexing="ij")
    a, b, c = rng.uniform(0, 1, 3)
    table = TimeTable(axes, a + b * grid[0] + c * grid[0] * grid[1])
    x, y = rng.uniform(1, 64, 20), rng.uniform(8, 100, 20)
    assert np.allclose(table.many([x, y]), a + b * x + c * x * y)
    assert table.one((x[0], y[0])) == pytest.approx(a + b * x[0] + c * x[0] * y[0])


def test_knots_are_thinned_and_refined() -> None:
    axes = thin([np.arange(1.0, 65.0), np.array([8.0, 1024.0])], 40)
    assert np.prod([len(axis) for axis in axes]) <= 40
    assert axes[0][0] == 1.0
    assert axes[0][-1] == 64.0
    fine = refine(np.array([1.0, 64.0]))
    assert (fine[1:] / fine[:-1] <= 4.0 + 1e-9).all()  # 2 inside, 4 beyond the ends
    assert refine(np.array([0.0, 100.0]))[0] == 0.0


@pytest.mark.parametrize("heavy", [False, True], ids=["normal", "heavy tails"])
def test_ninety_percent_intervals_hold_about_ninety_percent(heavy: bool) -> None:
    rng = np.random.default_rng(5)
    sizes = np.array(
        [(m, n, k) for m in 2.0 ** np.arange(12) for n in (512.0, 2048.0, 8192.0) for k in (512.0, 4096.0)]
    )
    sizes = np.repeat(sizes, 5, axis=0) * rng.uniform(0.8, 1.2, (360, 3))
    point = tuple(sizes.T)
    weights = np.array([4e-6, 0.0, 1.4, 0.0, 0.0, 0.0, 0.0, 0.0, 1.2, 1.2, 1.2, 0.0])
    noise = 0.03 * (rng.standard_t(2.5, 360) if heavy else rng.normal(size=360))
    seconds = law_seconds(weights, point, "gemm", "bf16", DEVICE) * np.exp(noise)
    law = FittedLaw.fit(("gemm", "bf16", ""), point, seconds, DEVICE, rng=rng)
    judge(law, point, seconds, rng=rng, max_cells=2000)
    random = law.errors_["random"]
    assert random["count"] == 360
    assert 0.85 <= random["coverage"] <= 0.95
    assert random["half_width"] <= 5 * random["mape"]


def test_a_roof_is_found_before_the_largest_sizes_have_met_it() -> None:
    """Losses that shrink with size, under a roof at 1 / 1.7 of the peak: sizes 64 times as large run no faster."""
    rng = np.random.default_rng(3)
    narrow, deep = (512.0, 1024.0, 1536.0, 2048.0, 3072.0, 4096.0, 8192.0, 16384.0), 2.0 ** np.arange(9, 15)
    sizes = np.array([(m, n, k) for m in 2.0 ** np.arange(4, 15) for n in narrow for k in deep])
    weights = np.array([4e-6, 0.5, 0.6, 0.2, 0.0, 0.2, 3.0, 3.0, 1.2, 1.2, 1.2, 1.7])
    flop = 2 * sizes.prod(1)
    small = flop <= flop.max() / 64
    known, beyond = tuple(sizes[small].T), tuple(sizes[~small].T)
    seconds = law_seconds(weights, known, "gemm", "bf16", DEVICE) * np.exp(0.02 * rng.normal(size=small.sum()))
    truth = law_seconds(weights, beyond, "gemm", "bf16", DEVICE)
    law = FittedLaw.fit(("gemm", "bf16", ""), known, seconds, DEVICE, rng=rng)
    assert law.weights_[-1] == pytest.approx(1.7, rel=0.05)
    assert np.median(np.abs(law_seconds(law.weights_, beyond, "gemm", "bf16", DEVICE) / truth - 1)) < 0.04
    losses = np.append(law.weights_[:-1], 0.0)
    assert np.median(law_seconds(losses, beyond, "gemm", "bf16", DEVICE) / truth) < 0.75  # what these would promise


@pytest.mark.parametrize("kind", sorted(set(LAWS) - {"host"}))
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_work_term_grows_with_every_coordinate(kind: str, data: st.DataObject) -> None:
    law = LAWS[kind]
    low = {name: float(data.draw(st.integers(2, 4000))) for name in law.coordinates}
    if kind == "grouped_gemm":
        low["m"] = max(low["m"], low["groups"] * 2)
    name = data.draw(st.sampled_from(law.coordinates))
    high = {**low, name: low[name] * data.draw(st.floats(1, 8))}
    if kind == "grouped_gemm":
        high["m"] = max(high["m"], high["groups"])
    before, after = law.terms(low, "bf16", DEVICE), law.terms(high, "bf16", DEVICE)
    for group_before, group_after in zip(before, after, strict=True):
        for a, b in zip(group_before, group_after, strict=True):
            assert float(b) >= float(a) * (1 - 1e-9)


@pytest.mark.parametrize(("count", "least"), [(4, 0.8), (8, 0.85), (15, 0.88), (30, 0.88)])
def test_intervals_of_few_residuals_hold_nearly_what_they_promise(count: int, least: float) -> None:
    """The outermost of eight stands for 1 / 9, and 90 % reach further."""
    rng = np.random.default_rng(count)
    held = []
    for _ in range(2000):
        low, high = _interval(_quantiles(rng.normal(size=count)))
        held.append(np.mean((low <= (fresh := rng.normal(size=20))) & (fresh <= high)))
    assert least < np.mean(held) < 0.93
