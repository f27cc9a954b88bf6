"""Section ``gpu-campaign``: what one campaign on a real H100 measured, beside what is predicted from its ops.

Its measurements lie beside the profile that was fitted to them (``hardware_profiles/h100-sxm-measured``); no time of a
step entered the fit. Steps are replays of a CUDA graph of one full-width layer. The executable model calls a
framework's kernels, so that its profile stands beside the one of the engines' published tables, kind by kind.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from longcat_sim.calibration import OpTimes
from longcat_sim.ops.op import Op, loop_back_sms
from longcat_sim.records.measurement import Measurement, load_measurements
from longcat_sim.specs.hardware import HardwareSpec, load_hardware, profile_folders
from longcat_sim.specs.model import model_spec
from longcat_sim.studies.beside import Beside, ExchangeRates, slowdowns
from longcat_sim.studies.validate import loop_back, own_step
from longcat_sim.studies.validate.section import Row, Section

PROFILE, PUBLISHED = "h100-sxm-measured", "h100-sxm"
STEP_LIMIT = 0.05
BIG_DIFFERENCE, WIDE = 0.15, 4.0
ROOFED = ("gemm", "grouped_gemm", "mla_decode", "attention_prefill", "indexer", "topk", "sparse_mla")
LEGEND = (
    "none: each exchange after the compute before it; sbo: on a second stream, beside the dense part. Paced: time "
    "passes and nothing moves; N SMs copying: the rows are copied by so many SMs, slowed and slowing as measured at "
    "other sizes. That a copy waits behind the product launched with it was found on these rows"
)
REASONS = {
    "gemm fp8": "tables: one scale per 128 values, and the time holds the quantising of the rows; here one per tensor",
    "bmm bf16": "cuBLAS's floor of 6 us is above that of the engine's kernel",
    "mla_decode bf16": "three kernels here, all scores in memory; the engine has one that keeps them on the SMs",
    "attention_prefill bf16": "values padded from 128 to 192 and FlashAttention 2; the engine's kernel is Hopper's own",
    "elementwise bf16": "one fused pass in the engine, a chain of the framework's kernels here (a dozen for rope)",
    "topk fp32": "the library sorts what it selects, and small rows are all launches; the engine has one kernel",
    "sparse_mla bf16": "gather, two products and a softmax here; the engine has one kernel",
    "indexer bf16": "tables are fp8 and one kernel; here all heads' products pass through memory",
}
"""Why a kind differs by more than ``BIG_DIFFERENCE`` from the engine's tables, or by ``WIDE`` between its sizes."""


def run() -> Section:
    """Return the section."""
    section = Section("gpu-campaign", "A campaign on one H100: steps, overlap, contention, roofs, published kernels")
    folder = next((f for f in profile_folders() if (f / f"{PROFILE}.yaml").exists()), None)
    if folder is None or not (folder / f"{PROFILE}.jsonl").exists():
        section.skipped = f"no {PROFILE}.jsonl in hardware_profiles: run `profile --campaign --device cuda` on an H100"
        return section
    found, hardware = load_measurements(folder / f"{PROFILE}.jsonl"), load_hardware(PROFILE)
    times = OpTimes.from_hardware(hardware)
    alone = [row for row in found if not row.is_contention]
    beside = slowdowns(found, times, hardware)
    section.rows += _steps(found.steps, times) + _overlapped(found.steps, times, ExchangeRates(beside))
    section.rows += _contention(beside) + _roofs(alone, hardware)
    section.rows += _published(alone, section.notes)
    libraries = ", ".join(f"{name} {version}" for name, version in found.environment.libraries.items())
    section.notes.insert(0, LEGEND)
    section.notes.append("these reasons are what the kernels are known to do; none was measured apart")
    section.notes.insert(0, f"{found.environment.device}, {found.environment.date[:10]}; {libraries}")
    return section


def _steps(steps: Sequence, times: OpTimes) -> list[Row]:
    plain = [step for step in steps if not step.overlap]
    rows = [row for step in plain for row in own_step.compare(times, model_spec(step.model), [step], "bf16")]
    return [replace(row, limit=STEP_LIMIT, passed=None) for row in rows]


def _overlapped(steps: Sequence, times: OpTimes, rates: ExchangeRates) -> list[Row]:
    rows = []
    for step in steps:
        if step.overlap:
            model, sms, note = model_spec(step.model), step.exchange_sms, ""
            moved = f"{sms} SM{'s' * (sms > 1)} copying" if sms else "paced"
            name = f"{step.sequences} x {step.context - 1}, {moved} {step.exchange_s * 1e6:.0f} us: {step.overlap}"
            predicted = loop_back.predict_s(times, model, step, rates)
            if sms and step.overlap != "none":
                free = loop_back.predict_s(times, model, step, rates, waits=False)
                note = f"without the wait {free / step.median_s - 1:+.1%}"
            rows.append(Row(name, "ms", predicted * 1e3, step.median_s * 1e3, limit=STEP_LIMIT, note=note))
    return rows


def _contention(beside: Sequence[Beside]) -> list[Row]:
    """Return mean rates of each kind of op beside each neighbour, predicted by max-min shares and measured."""
    grouped: dict[tuple[str, str], list[Beside]] = defaultdict(list)
    for one in beside:
        names = [one.op.kind, one.neighbour.kind]
        for side, item in enumerate((one.op, one.neighbour)):
            if item.is_collective:
                sms = loop_back_sms(item)
                names[side] = f"exchange on {sms} SM{'s' * (sms > 1)}"
        grouped[names[0], names[1]].append(one)
    mean = {key: float(np.mean([getattr(one, key) for one in beside])) for key in ("predicted", "measured")}
    apart = float(np.mean([abs(one.predicted - one.measured) for one in beside]))
    rows = [Row("rates side by side, all", "of alone", mean["predicted"], mean["measured"], error=apart,
                note=f"{len(beside)} ops; error is the mean |difference|")]  # fmt: skip
    for (name, neighbour), found in grouped.items():
        predicted, measured = (
            float(np.mean([getattr(one, key) for one in found])) for key in ("predicted", "measured")
        )
        note = f"{len(found)} size{'s' * (len(found) > 1)}; error is a difference"
        rows.append(Row(f"rate of {name} beside {neighbour}", "of alone", predicted, measured,
                        error=predicted - measured, note=note))  # fmt: skip
    return rows


def _roofs(rows: Sequence[Measurement], hardware: HardwareSpec) -> list[Row]:
    """Return the roof of the largest op of each kind beside its time."""
    largest: dict[tuple[str, str], Measurement] = {}
    for row in rows:
        key = row.op.kind, row.op.dtype
        if row.op.kind in ROOFED and (
            key not in largest or _roof_s(row.op, hardware) > _roof_s(largest[key].op, hardware)
        ):
            largest[key] = row
    found = []
    for (kind, dtype), row in largest.items():
        roof = _roof_s(row.op, hardware)
        note = f"{roof * 1e6:.0f} of {row.median_s * 1e6:.0f} us; {row.op}"
        found.append(Row(f"share of the roof: {kind} {dtype}, largest", "ratio", roof / row.median_s, note=note))
    return found


def _roof_s(item: Op, hardware: HardwareSpec) -> float:
    """Return the least time that the data sheet allows: all FLOP at peak, or each operand through memory once."""
    return max(item.flop / hardware.peak_flop_per_s(item.dtype), item.memory_bytes / hardware.memory_bandwidth)


def _published(rows: Sequence[Measurement], notes: list[str]) -> list[Row]:
    """Return, per kind that the engine's tables hold, the median of their fit's time over the measured one."""
    tables = OpTimes.from_hardware(load_hardware(PUBLISHED))
    ratios: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        answer = tables.answer((row.op.kind, row.op.dtype, row.op.variant))
        if answer is not None and answer.law.kind == row.op.kind:
            ratios[f"{row.op.kind} {row.op.dtype}"].append(tables.seconds(row.op) / row.median_s)
    found = []
    for name, each in ratios.items():
        middle = float(np.median(each))
        spread = np.quantile(each, [0.1, 0.9])
        note = f"median of {len(each)} sizes; deciles {spread[0]:.2f} to {spread[1]:.2f}"
        found.append(Row(f"published over measured: {name}", "ratio", middle, note=note))
        if abs(middle - 1) > BIG_DIFFERENCE or spread[1] > WIDE * spread[0]:
            notes.append(f"{name}: {REASONS.get(name, 'not explained')}")
    return found
