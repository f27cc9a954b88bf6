"""``run_campaign``: every suite on one device in a fixed time, by value, each written when it is done.

On a GPU: full-size LongCat-Flash shapes first, then DeepSeek-V3's, then a full-width layer as a whole. On a CPU the
same command runs at small sizes. An interrupted run keeps what it has; the next one goes on from there.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch

from longcat_sim.model.longcat import LongcatFlash
from longcat_sim.ops.op import Op
from longcat_sim.profiling.collectives import profile_collectives, run_suites
from longcat_sim.profiling.profile import Profiled, Progress, pick_device, profile
from longcat_sim.profiling.steps import POINTS, measure_steps
from longcat_sim.profiling.suites import FULL, SMALL
from longcat_sim.records.measurement import StepMeasurement, load_measurements, save_measurements
from longcat_sim.specs.model import model_spec

GPU_PLAN: tuple[tuple[str, str, float], ...] = (
    ("decode", "longcat-flash", 0.20),
    ("experts", "longcat-1layer-32e", 0.15),
    ("prefill", "longcat-flash", 0.10),
    ("small-ops", "longcat-flash", 0.10),
    ("sparse", "longcat-flash", 0.05),
    ("decode", "deepseek-v3", 0.12),
    ("prefill", "deepseek-v3", 0.05),
    ("model-step", "longcat-1layer-32e", 0.15),
    ("contention", "longcat-1layer-32e", 0.08),
)
"""(suite, model, share of the time), in order of value."""
CPU_PLAN: tuple[tuple[str, str, float], ...] = (
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
    plan: tuple[tuple[str, str, float], ...] | None = None,
) -> Profiled:
    """Measure all suites within ``budget_s``, write ``out`` after each, and return what was measured.

    Time that a suite leaves over goes to the later ones.

    Raises:
        MeasurementError: an unknown device, or ``out`` holds another device's measurements.
    """
    place = pick_device(device)
    plan = plan or (GPU_PLAN if place.type == "cuda" else CPU_PLAN)
    grid = FULL if place.type == "cuda" else SMALL
    begin = time.monotonic()
    steps: list[StepMeasurement] = []
    dropped: list[tuple[str, Op]] = []
    missed: list[str] = []
    if Path(out).exists():
        steps = list(load_measurements(out).steps)
    result: Profiled | None = None
    for index, (suite, name, share) in enumerate(plan):
        left = budget_s - (time.monotonic() - begin)
        ahead = sum(part for _, _, part in plan[index:])
        box = max(0.0, left) * share / ahead
        if suite == "model-step":
            fresh = _steps(name, place, box) if left > 0 else []
            steps += fresh
            missed += [] if fresh else [suite]
        elif suite in ("collectives", "contention"):
            rows = _between_ranks(suite, name, place, box) if left > 0 and result is not None else []
            if result is not None:
                result.rows += rows
            missed += [] if rows else [suite]
        else:
            found = profile([suite], place, name, box, grid=grid, resume=out, progress=progress)
            dropped += found.dropped
            kept = [row for row in result.rows if row not in found.rows] if result else []
            result, found.rows = found, [*kept, *found.rows]
        if result is not None:
            save_measurements(out, result.environment, result.rows, steps)
    assert result is not None
    result.dropped, result.dropped_suites, result.wall_s = dropped, missed, time.monotonic() - begin
    return result


def _steps(name: str, device: torch.device, budget_s: float) -> list[StepMeasurement]:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = LongcatFlash(model_spec(name), device=device, dtype=dtype, seed=0)
    return measure_steps(model, name, GPU_STEPS if device.type == "cuda" else POINTS[:5], budget_s=budget_s)


def _between_ranks(suite: str, name: str, device: torch.device, budget_s: float) -> list:
    """Measure between gloo ranks on a CPU; on GPUs inside torchrun's group, or not at all on a single one."""
    if device.type == "cpu":
        return profile_collectives([suite], model_spec(name), budget_s=budget_s)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return run_suites([suite], model_spec(name), device, "bf16", budget_s)
    return []
