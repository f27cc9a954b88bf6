"""A real H800 trace: from durations, streams and order, with the dependencies of the exchange rebuilt, predict when
every kernel of an overlapped forward and backward pair starts.

The trace (deepseek-ai/profile-data train.json) is a DualPipe pair of 4 MoE layers. Two streams compute, one exchanges.
Dependencies are a fact of the model: attention before dispatch before experts before combine, forward and backward.
"""

from __future__ import annotations

import csv
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longcat_sim.calibration.collectives import KERNEL_GAP_S
from longcat_sim.ops.op import ResourceShares
from longcat_sim.records.span import Span, busy_s
from longcat_sim.simulation.contention import NoContention
from longcat_sim.simulation.lanes import LaneEngine
from longcat_sim.simulation.program import Item, Program
from longcat_sim.studies.validate.section import Row, Section

COMPUTE, SIDE, EXCHANGE = "7", "23", "27"
LANES = {COMPUTE: "compute", SIDE: "compute 2", EXCHANGE: "communication"}
TRUNCATION_S = 0.5e-6
"""Durations in the trace are cut to whole microseconds: half a microsecond is missing on average."""
FULL_GRID = 112
"""Blocks of a persistent product: one per SM that the exchange leaves (132 - 20)."""


@dataclass(frozen=True)
class Kernel:
    """One kernel of the trace."""

    name: str
    stream: str
    start_s: float
    duration_s: float
    order: int
    grid: int


def shared_folder() -> Path | None:
    """Return the folder of real inputs: $LONGCAT_SIM_SHARED, or ``shared`` beside the checkout; None without one."""
    named = os.environ.get("LONGCAT_SIM_SHARED")
    folder = Path(named) if named else Path(__file__).resolve().parents[4] / "shared"
    return folder if folder.is_dir() else None


def read_kernels(path: Path) -> list[Kernel]:
    """Return the kernels in launch order."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [
            Kernel(
                row["kernel"].rpartition("::")[2] or "empty", row["stream"], int(row["start_us"]) * 1e-6,
                int(row["duration_us"]) * 1e-6, int(row["launch_order"]), int(row["grid_blocks"]),
            )
            for row in csv.DictReader(file)
        ]  # fmt: skip
    return sorted(rows, key=lambda kernel: kernel.order)


def dependencies(kernels: list[Kernel]) -> dict[int, list[int]]:
    """Return what kernels wait for on other streams, by index in launch order, from names and order alone.

    Exchanges come in four kinds: (cast, notify, dispatch) is the gradient of combine and follows attention's input
    gradient; (layout, notify, dispatch) is dispatch and follows attention; the (notify, combine) right behind it is
    the gradient of dispatch and follows the experts' input gradient; any other is combine and follows the experts.
    """
    waits: dict[int, list[int]] = {}
    compute = [i for i, kernel in enumerate(kernels) if kernel.stream == COMPUTE]
    groups: list[list[int]] = []
    for i, kernel in enumerate(kernels):
        if kernel.stream == EXCHANGE:
            starts = kernel.name in ("get_dispatch_layout", "per_token_cast_to_fp8_with_channels")
            if not groups or starts or kernels[groups[-1][-1]].name in ("dispatch", "combine"):
                groups.append([])
            groups[-1].append(i)
    last: dict[str, int] = {}
    behind = ""
    for group in groups:
        before = [i for i in compute if i < group[0]]
        names = [kernels[i].name for i in group]
        since = [i for i in before if i > last.get("any", -1)]
        if names[0] == "get_dispatch_layout":
            kind = "dispatch"
            gradient = next(i for i in since if kernels[i].name == "cast_back_impl")  # experts' input gradient begins
            waits[group[0]] = [i for i in before if i < gradient][-1:]
            waits.setdefault(gradient, []).append(last["combine gradient"])
        elif names[0] == "per_token_cast_to_fp8_with_channels":
            kind = "combine gradient"
            trailing = len(before)  # weight gradients, a run of products at the end, are not waited for
            while trailing and kernels[before[trailing - 1]].name == "device_kernel":
                trailing -= 1
            waits[group[0]] = before[trailing - 1 : trailing] if trailing else []
        elif behind == "dispatch":
            kind = "dispatch gradient"
            waits[group[0]] = before[-1:]
        else:
            kind = "combine"
            reduced = [i for i in since if kernels[i].name == "reduce_fused_impl"][-1]
            tail = [i for i in since if reduced < i <= reduced + 6]
            end = [i for i in tail if kernels[i].name == "per_token_cast_to_fp8_with_channels"][-1]
            waits[group[0]] = [end]
            first = next(i for i in compute if i > end)
            waits.setdefault(first, []).append(last["dispatch gradient"])
            counted = [i for i in since if kernels[i].name == "clean_and_count_expert"]
            waits.setdefault(counted[-1], []).append(last["dispatch"])
            following = [i for i in compute if i > group[-1]]
            if following:
                waits.setdefault(following[0], []).append(group[-1])
        last[kind], behind = group[-1], kind
        last["any"] = group[-1]
    side = [i for i, kernel in enumerate(kernels) if kernel.stream == SIDE]
    for i in side:  # forks from the main stream two launches before, and is joined when the next one follows it
        main = [j for j in compute if j < i]
        waits.setdefault(i, []).append(main[-2] if i - 1 == main[-1] else main[-1])
        after = next((j for j in compute if j > i), None)
        if after is not None and kernels[after].grid != FULL_GRID:
            waits.setdefault(after, []).append(i)
    return waits


def predict(kernels: list[Kernel], rounds: int = 4) -> tuple[np.ndarray, Program]:
    """Return the predicted starts [kernels] and the program.

    Products that fill all SMs cannot run beside each other while an exchange holds the others: where one would, it
    waits for the full-grid kernel launched before it. Whether an exchange runs is known from the round before.
    """
    base = dependencies(kernels)
    lanes = list(LANES.values())
    order = [[i for i, kernel in enumerate(kernels) if kernel.stream == stream] for stream in LANES]
    extra: dict[int, list[int]] = {}
    heavy = [i for i, k in enumerate(kernels) if k.grid == FULL_GRID and k.name == "device_kernel"]
    exchange = [i for i, k in enumerate(kernels) if k.name in ("dispatch", "combine")]
    start = np.zeros(len(kernels))
    for _ in range(rounds):
        items, seconds = [], []
        for i, kernel in enumerate(kernels):
            waits = tuple(sorted({*base.get(i, ()), *extra.get(i, ())}))
            moves = kernel.stream == EXCHANGE
            items.append(
                Item(
                    kernel.name, "kernel", "trace", 0, 0, "trace", list(LANES).index(kernel.stream), waits, 1,
                    ResourceShares(), "measured", moves,
                )
            )  # fmt: skip
            seconds.append(np.asarray(kernel.duration_s + TRUNCATION_S + KERNEL_GAP_S))
        program = Program(items, lanes, order, seconds)
        line = LaneEngine(program, NoContention()).run()
        start = line.start_s[:, 0]
        end = line.end_s[:, 0]
        busy = [(start[i], end[i]) for i in exchange]
        extra = {}
        for i in heavy:
            if kernels[i].stream == SIDE or any(kernels[j].stream == SIDE for j in heavy if i - 3 <= j < i):
                before = [j for j in heavy if j < i]
                if before and kernels[before[-1]].stream != kernels[i].stream:
                    held = any(a <= start[i] < b for a, b in busy)
                    if held and before[-1] not in base.get(i, ()):
                        extra[i] = [before[-1]]
    return start, program


def run(folder: Path | None = None, **_: Any) -> Section:
    """Return the section; skipped where the trace is absent."""
    section = Section("h800_trace", "H800 trace: starts of 963 kernels of an overlapped forward and backward pair")
    shared = folder or shared_folder()
    path = shared / "data" / "overlap" / "deepseek_train_kernels.csv" if shared else None
    if path is None or not path.exists():
        section.skipped = (
            "no trace here: set LONGCAT_SIM_SHARED to a folder that holds data/overlap/deepseek_train_kernels.csv, the "
            "kernels of deepseek-ai/profile-data's train.json (README, validation)"
        )
        return section
    kernels = read_kernels(path)
    start, _program = predict(kernels)
    measured = np.array([kernel.start_s for kernel in kernels])
    durations = np.array([kernel.duration_s for kernel in kernels])
    error = start - measured
    span, predicted = (measured + durations).max(), (start + durations).max()
    middle = float(np.median(np.abs(error)))
    section.rows += [
        Row("median |start error|", "ms", middle * 1e3, error=middle / 1e-3, limit=1.0, note="error in ms, limit 1 ms"),
        Row("90th percentile |start error|", "ms", float(np.quantile(np.abs(error), 0.9)) * 1e3),
        Row("span", "ms", predicted * 1e3, span * 1e3, limit=0.01),
    ]
    spans = [Span(k.name, LANES[k.stream], k.start_s, k.start_s + k.duration_s) for k in kernels]
    compute = busy_s([s for s in spans if s.lane != "communication"])
    exchange = busy_s([s for s in spans if s.lane == "communication"])
    section.rows.append(Row("baseline: max(compute, communication)", "ms", max(compute, exchange) * 1e3, span * 1e3))
    section.rows.append(Row("baseline: union of busy time", "ms", busy_s(spans) * 1e3, span * 1e3))
    section.notes.append(
        "durations are those of the trace, so contention is inside them; what is predicted is order and waiting. The "
        f"idle time between kernels ({KERNEL_GAP_S * 1e6:g} us) is a mean over gaps of this very trace, so the span is "
        "not independent of it; the starts within the step are"
    )
    return section
