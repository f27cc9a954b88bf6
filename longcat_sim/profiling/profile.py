"""``profile``: measure suites of ops on this machine, in rounds, inside a time box; resumable."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longcat_sim.errors import MeasurementError
from longcat_sim.ops.op import Op
from longcat_sim.profiling.environment import here
from longcat_sim.profiling.kernels import BUILDERS, Timed
from longcat_sim.profiling.pace import at_pace, mean_pace, powers_of, sensitivities, slowed, sort_of
from longcat_sim.profiling.place import TORCH_DTYPES, Place
from longcat_sim.profiling.samples import Samples, merged
from longcat_sim.profiling.suites import DENSE, FULL, SUITES, Grid, reuse_bytes, suite_ops
from longcat_sim.profiling.timing import Clock, first_line, measurement, steady
from longcat_sim.records.measurement import (
    UNSTABLE_SPREAD,
    Environment,
    Measurement,
    StepMeasurement,
    load_measurements,
    skipped_lines,
)
from longcat_sim.records.measurement import save_measurements as save
from longcat_sim.specs.model import ModelSpec

Progress = Callable[[str, float, float], None]
"""(what runs, share done, seconds left)."""
ROUNDS = 3
EXTRA_ROUNDS = 2
POINT_S = {"cpu": 0.03, "cuda": 0.01}
"""Seconds of samples per point and round where the time box allows."""
CPU_DTYPE, CUDA_DTYPE = "fp32", "bf16"


FEW_UNSTABLE = 0.1
"""Share of unstable points below which a file needs no advice. Assumed."""


@dataclass
class Profiled(Sequence[Measurement]):
    """What was measured, and what the time box dropped."""

    environment: Environment
    rows: list[Measurement] = field(default_factory=list)
    dropped: list[tuple[str, Op]] = field(default_factory=list)
    """(suite, op) of points that were not reached."""
    wall_s: float = 0.0
    dropped_suites: list[str] = field(default_factory=list)
    """Whole suites for which no time was left, or that need more than one GPU."""
    fresh: int = 0
    """Points and steps that were measured now; the others were in the file."""
    skipped: Sequence[tuple[int, str]] = ()
    """(line, reason) of what could not be read of a file that was resumed, and is measured again."""
    paces: Sequence[Sequence[float]] = ()
    """Seconds of a CPU's probes in each round."""
    failed: dict[str, str] = field(default_factory=dict)
    """Kind of op with its dtype, or suite -> what the library said when one could not run."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def advice(self) -> str:
        """Return what to do about unstable points; nothing where they are few."""
        if sum(not row.stable for row in self.rows) <= FEW_UNSTABLE * len(self.rows):
            return ""
        return (
            "this machine was busy or its clock changed: medians are of its mean pace, as far as probes tell. Close "
            "other programs and profile into a new file (points of an old one are kept, not measured again), with "
            "more --budget-s where it can be had"
        )

    def summary(self) -> str:
        """Return one line: points, unstable ones, and what was dropped."""
        unstable = sum(not row.stable for row in self.rows)
        text = f"{len(self.rows)} points in {self.wall_s:.0f} s, {unstable} unstable"
        text += f" (spread over {UNSTABLE_SPREAD:.0%})" if unstable else ""
        if self.fresh < len(self.rows):
            text += f"; {self.fresh} of them new"
        if self.paces and not self.environment.pace_s:
            text += "; nothing is scaled to one pace, of which the file, an older version's, says nothing"
        elif self.paces:
            product = np.array(self.paces)[:, 0] / self.environment.pace_s[0]
            low, high = 1 / np.quantile(product, 0.9), 1 / np.quantile(product, 0.1)
            text += f"; the machine ran {low:.2f} to {high:.2f} times as fast as at the pace of the medians"
        text += skipped_lines(self.skipped)
        if self.dropped:
            kinds = sorted({item.kind for _, item in self.dropped})
            text += f"; the time box dropped {len(self.dropped)} points ({', '.join(kinds)})"
        if self.dropped_suites:
            text += f"; not run: {', '.join(self.dropped_suites)}"
        text += "".join(f"; {name} failed: {why}" for name, why in self.failed.items())
        return text


def pick_device(name: str) -> torch.device:
    """Return the device for ``auto``, ``cpu`` or ``cuda``.

    Raises:
        MeasurementError: another name, or no GPU where one is asked for.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise MeasurementError(f"device: expected auto, cpu or cuda; got {name!r}; choose one")
    if name == "cuda" and not torch.cuda.is_available():
        raise MeasurementError("device: expected a CUDA device; torch finds none; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def profile(
    suites: Iterable[str] = tuple(SUITES),
    device: str | torch.device = "auto",
    spec: ModelSpec | str = "longcat-cpu-64e",
    budget_s: float = 60.0,
    *,
    grid: Grid | None = None,
    dtype: str | None = None,
    resume: str | Path | None = None,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Profiled:
    """Return measurements of the suites' ops at the sizes that steps of ``spec`` need, within ``budget_s``.

    Points are taken in rounds, so that drift falls on all alike; on a CPU medians are of the file's pace
    (``profiling.pace``), the mean one of its first suite; a point whose spread stays large is measured again and then
    marked. Points of ``resume`` are kept. ``out`` is written after each round. One thread on a CPU.

    Raises:
        MeasurementError: an unknown suite or device, or a file to resume from another device.
    """
    from longcat_sim.specs.model import model_spec

    spec = model_spec(spec) if isinstance(spec, str) else spec
    names = list(suites)
    check_suites(names, SUITES)
    place_on = pick_device(device) if isinstance(device, str) else device
    dtype = dtype or (CUDA_DTYPE if place_on.type == "cuda" else CPU_DTYPE)
    grid = grid or (FULL if place_on.type == "cuda" else DENSE)
    with steady(place_on), torch.inference_mode():
        run = _Run(Place(place_on, TORCH_DTYPES[dtype]), spec, budget_s, progress, out)
        return run.measure(names, grid, dtype, resume)


def check_suites(names: Iterable[str], known: Iterable[str]) -> None:
    """Raise MeasurementError if a suite is not among the known ones."""
    known = tuple(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise MeasurementError(
            f"suite: expected some of {', '.join(known)}; got {', '.join(unknown)}; choose known ones"
        )


def check_same_device(path: str | Path, found: Environment, here: Environment) -> None:
    """Raise MeasurementError if a file that is to be resumed is of another device."""
    if found.device != here.device:
        raise MeasurementError(
            f"{path}: expected measurements of {here.device!r}; got {found.device!r}; write to another file"
        )


class _Run:
    """One call of ``profile``."""

    def __init__(
        self, place: Place, spec: ModelSpec, budget_s: float, progress: Progress | None, out: str | Path | None
    ) -> None:
        self.place, self.spec, self.budget_s, self.progress, self.out = place, spec, budget_s, progress, out
        self.clock, self.point_s = Clock(place.device), POINT_S[place.device.type]
        self.start = time.monotonic()
        self.dtype = CPU_DTYPE
        self.result = Profiled(here(place.device))
        self.steps: tuple[StepMeasurement, ...] = ()
        self.broken: set[Op] = set()
        """Points that do not run here."""
        self.samples: dict[Op, list[Samples]] = {}
        self.pace_s: tuple[float, ...] = ()
        """Of this run."""
        self.before: Environment | None = None
        """Of a file that holds ops already: its pace and what it knows of sorts stay."""

    def measure(self, names: list[str], grid: Grid, dtype: str, resume: str | Path | None) -> Profiled:
        """Measure all rounds of all suites."""
        kept: list[Measurement] = []
        if resume is not None and Path(resume).exists():
            before = load_measurements(resume)
            check_same_device(resume, before.environment, self.result.environment)
            kept, self.steps, self.result.skipped = list(before), before.steps, before.skipped
            if any(not row.is_contention and not row.op.is_collective for row in kept):
                self.before = before.environment
                here_now = self.result.environment.at_pace_of(self.before)
                self.result.environment = replace(here_now, date=self.before.date)
        known = {row.op for row in kept if not row.is_contention}
        points = [(suite, item) for suite in names for item in suite_ops(suite, self.spec, grid, dtype)]
        points = list({item: (suite, item) for suite, item in points if item not in known}.values())
        self.dtype = dtype
        self.samples = {item: [] for _, item in points}
        total = max(1, len(points) * ROUNDS)
        # every point once, then again: what the box cuts off is repetitions first, points last
        for number in range(ROUNDS):
            for index, (suite, item) in enumerate(points):
                if self._left() <= 0 and not (number == 0 and index == 0):
                    break
                share = self._left() / max(1, total - number * len(points) - index)
                self._take(item, min(self.point_s, share / 2))
                self._tell(suite, item, (number * len(points) + index + 1) / total)
            self._store(points, kept)
        for _ in range(EXTRA_ROUNDS):
            shaky = [
                (suite, item)
                for suite, item in points
                if self.samples[item] and self._at_pace(item).spread > UNSTABLE_SPREAD
            ]
            for suite, item in shaky:
                if self._left() <= 0:
                    break
                self._take(item, self.point_s)
                self._tell(suite, item, 1.0)
        self._store(points, kept)
        self.result.dropped = [
            (suite, item)
            for suite, item in points if not self.samples[item] and item not in self.broken
        ]  # fmt: skip
        self.result.wall_s = time.monotonic() - self.start
        return self.result

    def _left(self) -> float:
        return self.budget_s - (time.monotonic() - self.start)

    def _take(self, item: Op, budget_s: float) -> None:
        """Build the op, time one round of it and of the parts that are taken off, and let go of its memory."""
        if item in self.broken:
            return
        try:
            self.samples[item].append(self._timed(item, budget_s))
        except RuntimeError as error:  # out of memory, or a kernel that this device or library does not have
            self.result.failed.setdefault(f"{item.kind} {item.dtype}", first_line(error))
            self.broken.add(item)
            free_memory(self.place.device)

    def _timed(self, item: Op, budget_s: float) -> Samples:
        timed: Timed = BUILDERS[item.kind](item, self.spec, self.place)
        streamed = reuse_bytes(self.spec, self.dtype, item) if self.spec.is_mla else 0.0
        whole = self.clock.sample(timed.run, budget_s, stream_bytes=streamed)
        for part in timed.less:  # inside the whole its parts follow each other: their caches are warm
            whole = whole.minus(self.clock.sample(part, budget_s / 2, warm=True))
        return replace(whole, rounds=[[sample / timed.divide for sample in whole.flat]])

    def _at_pace(self, item: Op) -> Samples:
        """Return all rounds of a point at the file's pace."""
        environment = self.result.environment
        return at_pace(merged(self.samples[item]), environment.pace_s, environment.sensitivity, sort_of(item))

    def _clocked(self, item: Op) -> Samples:
        """Return all rounds of a point as the clock has them; in a resumed file scaled as a whole, from this run's pace
        to the file's."""
        environment, samples = self.result.environment, merged(self.samples[item])
        powers = powers_of(sort_of(item), environment.sensitivity)
        return samples.times([slowed(environment.pace_s, self.pace_s, powers)] * len(samples.rounds))

    def _learn_pace(self) -> None:
        """Find the pace of a file's first suite, and how sorts of ops that are new to it follow the machine."""
        points = {item: merged(found) for item, found in self.samples.items() if found}
        self.result.paces = merged(points.values()).probes
        if self.before is not None and not self.before.pace_s:
            return
        self.pace_s = mean_pace(points.values())
        learned = sensitivities((sort_of(item), samples) for item, samples in points.items())
        pace_s, known = (self.pace_s, {}) if self.before is None else (self.before.pace_s, self.before.sensitivity)
        self.result.environment = replace(self.result.environment, pace_s=pace_s, sensitivity={**learned, **known})

    def _store(self, points: list[tuple[str, Op]], kept: list[Measurement]) -> None:
        self._learn_pace()
        rows = [
            measurement(item, self._clocked(item), suite, paced=self._at_pace(item))
            for suite, item in points if self.samples[item]
        ]  # fmt: skip
        self.result.rows, self.result.fresh = [*kept, *rows], len(rows)
        if self.out is not None and self.result.rows:
            save(self.out, self.result.environment, self.result.rows, self.steps)

    def _tell(self, suite: str, item: Op, share: float) -> None:
        if self.progress is not None:
            spent = time.monotonic() - self.start
            self.progress(f"{suite}: {item.kind}", share, min(self._left(), spent / share - spent))


def free_memory(device: torch.device) -> None:
    """Give back what the allocator holds, if the device still answers."""
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
