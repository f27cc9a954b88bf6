"""``run_campaign``: every suite on one device in a fixed time, by value, each written when it is done.

On a GPU: full-size LongCat-Flash shapes first, then DeepSeek-V3's, then a full-width layer as a whole. On a CPU the
same command runs at small sizes. An interrupted run keeps what it has; the next one goes on from there.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from pathlib import Path

import torch

from longcat_sim.errors import MeasurementError
from longcat_sim.model.longcat import LongcatFlash
from longcat_sim.ops.op import Op
from longcat_sim.profiling.collectives import (
    is_first,
    is_grouped,
    join_group,
    leave_group,
    profile_collectives,
    run_suites,
)
from longcat_sim.profiling.environment import here
from longcat_sim.profiling.place import TORCH_DTYPES, Place
from longcat_sim.profiling.profile import (
    CPU_DTYPE,
    CUDA_DTYPE,
    Profiled,
    Progress,
    check_same_device,
    check_suites,
    free_memory,
    pick_device,
    profile,
)
from longcat_sim.profiling.steps import POINTS, measure_exchanges, measure_steps
from longcat_sim.profiling.streams import measure_streams
from longcat_sim.profiling.suites import ALL_SUITES, FULL, SMALL, Grid
from longcat_sim.profiling.timing import first_line, steady
from longcat_sim.records.measurement import Measurement, StepMeasurement, load_measurements, save_measurements
from longcat_sim.specs.model import model_spec

Plan = tuple[tuple[str, str, float], ...]
GPU_PLAN: Plan = (
    ("decode", "longcat-flash", 0.22),
    ("experts", "longcat-1layer-32e", 0.10),
    ("prefill", "longcat-flash", 0.06),
    ("small-ops", "longcat-1layer-32e", 0.12),
    ("model-step", "longcat-1layer-32e", 0.08),
    ("overlap", "longcat-1layer-32e", 0.08),
    ("contention", "longcat-1layer-32e", 0.10),
    ("sparse", "longcat-flash", 0.08),
    ("small-ops", "longcat-flash", 0.04),
    ("decode", "deepseek-v3", 0.16),
    ("prefill", "deepseek-v3", 0.04),
)
"""(suite, model, weight of its share of the time), in order of value."""
CPU_PLAN: Plan = (
    ("decode", "longcat-cpu-64e", 0.30),
    ("experts", "longcat-cpu-64e", 0.15),
    ("prefill", "longcat-cpu-64e", 0.05),
    ("small-ops", "longcat-cpu-64e", 0.20),
    ("sparse", "longcat-cpu-64e", 0.05),
    ("model-step", "longcat-cpu-64e", 0.15),
    ("collectives", "longcat-cpu-64e", 0.05),
    ("contention", "longcat-cpu-64e", 0.05),
)
GPU_STEPS = (
    ("decode", 1, 1000), ("decode", 16, 1000), ("decode", 64, 2000), ("decode", 128, 1000), ("decode", 24, 4000),
    ("prefill", 1, 300), ("prefill", 1, 1500), ("prefill", 2, 1000), ("prefill", 1, 4000), ("decode", 96, 500),
)  # fmt: skip


def run_campaign(
    out: str | Path,
    *,
    device: str = "auto",
    budget_s: float = 480.0,
    progress: Progress | None = None,
    plan: Plan | None = None,
    grid: Grid | None = None,
) -> Profiled:
    """Measure all suites of a plan within ``budget_s``, write ``out`` after each, and return what was measured.

    Time that a suite leaves over goes to the later ones. Between ranks that ``torchrun`` started, collectives and
    contention are NCCL's or gloo's, and the first rank writes.

    Raises:
        MeasurementError: an unknown suite or device, or ``out`` holds another device's measurements.
    """
    place = join_group(pick_device(device))
    try:
        with steady(place):
            return _Campaign(Path(out), place, progress, grid).run(plan, budget_s)
    finally:
        leave_group()


class _Campaign:
    """One call of ``run_campaign``: what is known so far, and how each suite adds to it."""

    def __init__(self, out: Path, place: torch.device, progress: Progress | None, grid: Grid | None) -> None:
        self.out, self.place, self.progress = out, place, progress
        self.on_gpu = place.type == "cuda"
        self.grid = grid or (FULL if self.on_gpu else SMALL)
        self.result = Profiled(here(place))
        self.rows: dict[Op, Measurement] = {}
        self.pairs: list[Measurement] = []
        """Of contention, in the order in which they were measured: each pair with its own times alone."""
        self.steps: list[StepMeasurement] = []
        if out.exists():
            before = load_measurements(out)
            check_same_device(out, before.environment, self.result.environment)
            self._add(before)
            self.steps, self.result.skipped = list(before.steps), before.skipped
            self.result.environment = self.result.environment.at_pace_of(before.environment)
        self.known = len(self._all()) + len(self.steps)

    def run(self, plan: Plan | None, budget_s: float) -> Profiled:
        """Measure the plan's suites in turn."""
        plan = plan or (GPU_PLAN if self.on_gpu else CPU_PLAN)
        check_suites([suite for suite, _, _ in plan], ALL_SUITES)
        begin = time.monotonic()
        for index, (suite, name, share) in enumerate(plan):
            left = budget_s - (time.monotonic() - begin)
            box = max(0.0, left) * share / sum(part for _, _, part in plan[index:])
            measure = {
                "model-step": self._steps, "overlap": self._steps, "collectives": self._ranks,
                "contention": self._ranks,
            }.get(suite, self._ops)  # fmt: skip
            try:
                measure(suite, name, box)
            except (RuntimeError, MeasurementError) as error:  # out of memory, or what this place cannot do
                self.result.failed.setdefault(suite, first_line(error))
                free_memory(self.place)
            self.result.rows = self._all()
            self.result.fresh = max(0, len(self.result.rows) + len(self.steps) - self.known)
            if is_first() and (self.result.rows or self.steps):
                save_measurements(self.out, self.result.environment, self.result.rows, self.steps)
        self.result.wall_s = time.monotonic() - begin
        return self.result

    def _all(self) -> list[Measurement]:
        return [*self.rows.values(), *self.pairs]

    def _add(self, rows: Iterable[Measurement]) -> None:
        """Take rows in: an op alone replaces what was known of it, pairs replace all of the same suite."""
        rows = list(rows)
        self.rows |= {row.op: row for row in rows if not row.is_contention}
        fresh = [row for row in rows if row.is_contention]
        suites = {row.suite for row in fresh}
        self.pairs = [row for row in self.pairs if row.suite not in suites] + fresh

    def _ops(self, suite: str, name: str, box_s: float) -> None:
        found = profile([suite], self.place, name, box_s, grid=self.grid, resume=self.out, progress=self.progress)
        self._add(found.rows)
        self.result.environment = self.result.environment.at_pace_of(found.environment)
        self.result.paces = [*self.result.paces, *found.paces]
        self.result.dropped += found.dropped
        self.result.failed |= found.failed

    def _steps(self, suite: str, name: str, box_s: float) -> None:
        exchanged = suite == "overlap"
        if any(step.model == name and bool(step.overlap) == exchanged for step in self.steps):
            return
        if box_s <= 0:
            self.result.dropped_suites.append(suite)
            return
        if exchanged and not self.on_gpu:
            raise MeasurementError("needs a GPU with two streams")
        dtype = torch.bfloat16 if self.on_gpu else torch.float32
        model = LongcatFlash(model_spec(name), device=self.place, dtype=dtype, seed=0)
        if exchanged:
            self.steps += measure_exchanges(model, name, budget_s=box_s, failed=self.result.failed)
        else:
            self.steps += measure_steps(model, name, GPU_STEPS if self.on_gpu else POINTS[:5], budget_s=box_s)

    def _ranks(self, suite: str, name: str, box_s: float) -> None:
        """Measure between the ranks that there are, or gloo ranks of its own on a CPU; contention within the device."""
        spec, dtype = model_spec(name), CUDA_DTYPE if self.on_gpu else CPU_DTYPE
        found: list[Measurement] = []
        inside = suite == "contention"
        if box_s > 0 and inside and not is_grouped():
            place = Place(self.place, TORCH_DTYPES[dtype])
            half = box_s / (1 if self.on_gpu else 2)
            found += measure_streams(spec, place, dtype, budget_s=half, failed=self.result.failed)
            self._add(found)
        if is_grouped():  # the first rank's clock decides for all
            found += run_suites([suite], spec, self.place, dtype, max(box_s, 0.0))
        elif box_s > 0 and not self.on_gpu:
            found += profile_collectives([suite], spec, budget_s=box_s / (2 if inside else 1))
        self._add(found)
        if not found:
            self.result.dropped_suites.append(suite)
