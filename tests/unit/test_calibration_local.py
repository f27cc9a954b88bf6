"""The local correction (kriging) and the rule that drops accidents of published tables."""

import numpy as np
import pytest

from longcat_sim.calibration.artefacts import RARE, accidents, without_accidents
from longcat_sim.calibration.local import NEIGHBOURS, Smoothness, correct, krige, learn_smoothness
from longcat_sim.ops.op import op
from longcat_sim.records.measurement import Measurement

SMOOTH = Smoothness((2.0, 2.0), 1e-6)


def grid(*sizes: int) -> tuple[np.ndarray, ...]:
    return tuple(part.ravel() for part in np.meshgrid(*(2.0 ** np.arange(n) for n in sizes), indexing="ij"))


def test_a_measured_point_comes_back_and_a_line_is_followed() -> None:
    points = np.log2(np.stack(grid(6, 6), axis=-1))
    values = 0.1 * points[:, 0] - 0.05 * points[:, 1]
    assert np.allclose(krige(points, values, points, SMOOTH), values, atol=1e-4)
    # between knots of a full grid, a plane is guessed to a tenth of what it changes from knot to knot
    between = np.array([[1.5, 2.0], [2.5, 3.5]])
    assert krige(points, values, between, SMOOTH) == pytest.approx(0.1 * between[:, 0] - 0.05 * between[:, 1], abs=0.01)


def test_targets_that_share_their_neighbours_are_guessed_as_if_alone() -> None:
    """Against ordinary kriging written out (Cressie 1993, eq. 3.2.2), in double precision, of targets in one cell."""
    rng = np.random.default_rng(1)
    points = np.log2(np.stack(grid(6, 6), axis=-1)) + rng.uniform(-0.2, 0.2, (36, 2))
    values, smooth = rng.normal(size=36), Smoothness((1.5, 3.0), 0.02)
    targets = np.array([[2.45, 2.5], [2.5, 2.5], [2.55, 2.45], [0.0, 5.0]])

    def alike(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.exp(-(np.abs(a[:, None] - b[None]) / np.array(smooth.octaves)).sum(-1))

    for target, guess in zip(targets, krige(points, values, targets, smooth), strict=True):
        near = np.argsort(alike(points, target[None])[:, 0])[-NEIGHBOURS:]
        system = np.ones((NEIGHBOURS + 1, NEIGHBOURS + 1))
        system[:-1, :-1] = alike(points[near], points[near]) + smooth.nugget * np.eye(NEIGHBOURS)
        system[-1, -1] = 0.0
        weights = np.linalg.solve(system, np.append(alike(points[near], target[None])[:, 0], 1.0))[:-1]
        assert guess == pytest.approx(weights @ values[near], abs=2e-5)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_fewer_points_than_neighbours_are_all_taken(count: int) -> None:
    points = np.log2(np.stack(grid(3, 3), axis=-1))[:count]
    values = np.linspace(0.1, 0.5, count)
    assert krige(points, values, points, SMOOTH) == pytest.approx(values, abs=1e-4)
    assert krige(points, values, points[:0], SMOOTH).shape == (0,)
    assert values.min() - 0.1 <= krige(points, values, points[:1] + 0.3, SMOOTH)[0] <= values.max() + 0.1


def test_lengths_tell_a_coordinate_that_matters_from_one_that_does_not() -> None:
    rng = np.random.default_rng(0)
    points = np.log2(np.stack(grid(20, 20), axis=-1))
    rough = rng.normal(size=20)  # changes from knot to knot along the first coordinate only
    learned = learn_smoothness(points, rough[points[:, 0].astype(int)], rng)
    assert learned.octaves[1] >= 8 * learned.octaves[0]


def test_far_from_every_point_the_law_is_left() -> None:
    sizes = grid(4, 4)
    local, measured = correct(sizes, np.full(16, 0.4), (np.array([1.0, 2.0**20]), np.array([1.0, 2.0**20])), SMOOTH)
    assert measured.tolist() == [True, False]
    assert local[0] == pytest.approx(0.4)
    assert abs(local[1]) < 0.02


def rows(spoiled: int) -> list[Measurement]:
    found = []
    for number, (m, n) in enumerate(zip(*grid(10, 10), strict=True)):
        seconds = 1e-5 * (1 + m * n / 100) * (100.0 if number < spoiled else 1.0)
        found.append(
            Measurement(op=op("gemm", m=m, n=n, k=512), median_s=seconds, p10_s=seconds, p90_s=seconds, count=1)
        )
    return found


def test_an_accident_is_dropped_and_counted() -> None:
    kept, dropped = without_accidents(rows(spoiled=3))
    assert dropped == {"gemm bf16": 3}
    assert len(kept) == 97
    assert without_accidents(rows(spoiled=0)) == (rows(0), {})


def test_what_is_not_rare_is_no_accident() -> None:
    spoiled = int(RARE * 100) + 1
    kept, dropped = without_accidents(rows(spoiled))
    assert len(kept) == 100
    assert not dropped


def test_a_larger_size_must_be_larger_in_every_size() -> None:
    m, n = np.array([1.0, 4.0, 4.0]), np.array([8.0, 4.0, 16.0])
    # the first is slow beside the second, whose n is smaller, and beside the third, which holds it
    assert accidents((m, n), np.array([3.0, 1.0, 2.5])).tolist() == [False, False, False]
    assert accidents((m, n), np.array([3.0, 1.0, 1.9])).tolist() == [True, False, False]
