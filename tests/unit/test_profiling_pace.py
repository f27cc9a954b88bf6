"""The pace of a shared CPU: what probes tell is taken off, and no more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from longcat_sim.ops.graph import LayerLoad
from longcat_sim.profiling import pace, profile
from longcat_sim.profiling.pace import (
    Probes,
    at_pace,
    mean_pace,
    powers_of,
    sensitivities,
    sensitivity,
    slowed,
    sort_of,
)
from longcat_sim.profiling.samples import Samples
from longcat_sim.profiling.suites import Grid, step_ops
from longcat_sim.profiling.timing import Clock, measurement, steady
from longcat_sim.records.measurement import StepMeasurement, load_measurements, save_measurements
from longcat_sim.specs.model import model_spec
from longcat_sim.studies.validate import own_step

POWERS = (1.3, 0.4)


def shaken(powers: tuple[float, ...], points: int, rounds: int, noise: float, seed: int) -> list[Samples]:
    """Return points of different sizes whose rounds follow two probes that wander by a third."""
    rng = np.random.default_rng(seed)
    found = []
    for seconds in rng.uniform(1e-5, 1e-2, points):
        probes = np.exp(rng.normal(0.0, 0.3, (rounds, 2))) * (1e-4, 2e-4)
        factors = np.prod((probes / (1e-4, 2e-4)) ** powers, axis=1)
        jitter = np.exp(rng.normal(0.0, noise, (rounds, 9)))
        times = (seconds * factors)[:, None] * jitter
        found.append(Samples(times.tolist(), [tuple(row) for row in probes.tolist()]))
    return found


def test_the_powers_of_both_probes_are_found_whatever_the_sizes() -> None:
    assert sensitivity(shaken(POWERS, 40, 3, 0.05, 1)) == pytest.approx(POWERS, abs=0.1)
    assert sensitivity(shaken((0.0, 0.0), 40, 3, 0.05, 2)) == pytest.approx((0.0, 0.0), abs=0.05)


def test_what_the_probes_tell_is_taken_off_and_the_level_stays() -> None:
    points = shaken(POWERS, 40, 3, 0.02, 3)
    usual, powers = mean_pace(points), {"gemm": sensitivity(points)}
    before = [np.ptp(np.log([np.median(part) for part in samples.rounds])) for samples in points]
    after = [at_pace(samples, usual, powers, "gemm") for samples in points]
    left = [np.ptp(np.log([np.median(part) for part in samples.rounds])) for samples in after]
    assert np.median(left) < 0.15 * np.median(before)
    shift = np.log([new.quantiles()[1] / old.quantiles()[1] for new, old in zip(after, points, strict=True)])
    assert abs(np.mean(shift)) < 0.1


def test_a_sort_with_few_rounds_follows_what_all_do() -> None:
    many, few = shaken(POWERS, 40, 3, 0.02, 4), shaken(POWERS, 2, 3, 0.02, 5)
    assert sensitivity(few) == ()
    found = sensitivities([*(("gemm", each) for each in many), *(("host", each) for each in few)])
    assert "host" not in found
    assert powers_of("host", found) == pytest.approx(POWERS, abs=0.1)
    assert sensitivities([("host", each) for each in few]) == {}


def test_without_probes_or_powers_nothing_is_scaled() -> None:
    plain = Samples([[1.0, 2.0], [3.0]])
    assert mean_pace([plain]) == ()
    assert at_pace(plain, (), {}, "gemm") is plain
    probed = Samples([[1.0], [2.0]], [(1.0, 1.0), (2.0, 2.0)])
    assert at_pace(probed, (1.0, 1.0), {}, "gemm").rounds == probed.rounds
    assert slowed((2.0, 1.0), (1.0, 1.0), (0.5, 1.0)) == pytest.approx(2**0.5)
    assert slowed((), (1.0, 1.0), (0.5, 1.0)) == 1.0


def test_the_median_is_of_the_mean_pace_and_the_10th_percentile_as_clocked() -> None:
    from longcat_sim.ops.op import op

    raw = Samples([[1.0] * 5, [2.0] * 10], [(1.0, 1.0), (2.0, 2.0)])
    paced = at_pace(raw, (1.0, 1.0), {"gemm": (0.5, 0.0)}, "gemm")
    row = measurement(op("gemm", dtype="fp32", m=1, n=1, k=1), raw, "decode", paced=paced)
    assert (row.p10_s, row.p90_s) == (1.0, 2.0)
    assert row.median_s == pytest.approx(2**0.5)
    assert row.block_s == (1.0, 2.0)


def test_probes_take_as_long_after_anything() -> None:
    probes, big = Probes(), torch.randn(16 << 20)
    small = torch.randn(4, 64)
    with steady(torch.device("cpu")), torch.inference_mode():
        found: dict[str, list[tuple[float, ...]]] = {"stream": [], "small": []}
        for _ in range(60):
            big.sum()
            found["stream"].append(probes.take())
            for _ in range(20):
                torch.softmax(small, -1)
            found["small"].append(probes.take())
    stream, small_ops = (np.quantile(found[name], 0.1, axis=0) for name in ("stream", "small"))
    assert stream == pytest.approx(small_ops, rel=0.5)  # 2 % on a quiet machine; cold ones take five times as long


def test_parts_are_sampled_warm_and_without_probes() -> None:
    with steady(torch.device("cpu")):
        clock = Clock(torch.device("cpu"))
        assert clock.sample(lambda: None, 1e-4, warm=True).probes == []
        found = clock.sample(lambda: None, 1e-4)
    assert len(found.probes) == len(found.rounds) == 1
    assert len(found.probes[0]) == len(pace.PRODUCTS)


def test_a_file_that_is_resumed_keeps_its_pace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, tiny = tmp_path / "m.jsonl", model_spec("longcat-tiny")
    grid = Grid(decode=((1, 32), (4, 64)), prefill=((1, 16),))

    def sample(self: Clock, run: object, budget_s: float, *, warm: bool = False, **_: object) -> Samples:
        return Samples([[1e-9]]) if warm else Samples([[1e-4] * 5], [(1e-4, 2e-4)])

    monkeypatch.setattr(Clock, "sample", sample)  # a clock that no neighbour disturbs
    first = profile(["decode"], "cpu", tiny, budget_s=10.0, grid=grid, out=out)
    assert first.environment.pace_s == pytest.approx((1e-4, 2e-4))
    known = {"gemm": (1.0, 0.0), "norm": (1.0, 0.0), "embedding": (0.0, 0.0)}
    slow = replace(first.environment, pace_s=(2e-4, 4e-4), sensitivity=known)  # as if it had been a slow minute
    save_measurements(out, slow, first.rows)
    again = profile(["decode", "small-ops"], "cpu", tiny, budget_s=10.0, grid=grid, out=out, resume=out)
    assert again.environment.pace_s == slow.pace_s == load_measurements(out).environment.pace_s
    assert again.environment.date == first.environment.date
    assert known.items() <= again.environment.sensitivity.items()
    for kind, seconds in (("gemm", 1e-4), ("norm", 2e-4), ("embedding", 1e-4)):  # kept; as the product; as nothing
        rows = [row for row in again if sort_of(row.op) == kind]
        assert rows
        for row in rows:
            assert (row.p10_s, row.median_s) == pytest.approx((seconds, seconds)), kind


def test_an_older_file_is_resumed_without_a_pace(tmp_path: Path) -> None:
    out, tiny = tmp_path / "m.jsonl", model_spec("longcat-tiny")
    grid = Grid(decode=((1, 32), (4, 64)), prefill=((1, 16),))
    profile(["decode"], "cpu", tiny, budget_s=2.0, grid=grid, out=out)
    older = load_measurements(out)
    save_measurements(out, replace(older.environment, pace_s=(), sensitivity={}), older.rows)
    again = profile(["small-ops"], "cpu", tiny, budget_s=2.0, grid=grid, out=out, resume=out)
    assert again.environment.pace_s == ()
    assert again.environment.sensitivity == {}
    assert "nothing is scaled to one pace" in again.summary()


def test_steps_are_predicted_at_the_pace_that_they_had() -> None:
    class Second:
        def seconds(self, item: object) -> float:
            return 1.0

    spec = model_spec("longcat-tiny")
    pace_of_ops = {"probe_s": [1e-4, 2e-4], "sensitivity": {}}
    step = StepMeasurement(
        model="longcat-tiny", phase="decode", sequences=1, queries=1, context=33, median_s=1.0, p10_s=1.0, p90_s=1.0,
        count=3, pace_s=(2e-4, 2e-4),
    )  # fmt: skip
    plain = own_step.predict_s(Second(), spec, step, "fp32")  # type: ignore[arg-type]
    assert own_step.predict_s(Second(), spec, step, "fp32", pace_of_ops) == plain  # type: ignore[arg-type]
    pace_of_ops["sensitivity"] = {"gemm": [1.0, 0.0]}
    slower = own_step.predict_s(Second(), spec, step, "fp32", pace_of_ops)  # type: ignore[arg-type]
    ops = step_ops(spec, "decode", 1, 1, 33, "fp32", LayerLoad(0.0, 0.0, 0.0))
    assert plain == len(ops)
    assert slower == plain + sum(sort_of(item) == "gemm" for item in ops)
