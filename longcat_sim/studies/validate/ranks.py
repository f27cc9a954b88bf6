"""Real ranks: the executable model on gloo ranks of this machine, ``none`` and ``sbo``, predicted and measured.

What goes in: each segment alone and each exchange alone, measured in the same repeats, and what running beside each
other costs, fitted on *other* shapes. What comes out of the lanes: the length of a step under each schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from longcat_sim.ops.op import FloatArray, ResourceShares
from longcat_sim.ops.schedules import COMMUNICATION, schedule
from longcat_sim.simulation.contention import MeasuredLaw, NoContention
from longcat_sim.simulation.lanes import LaneEngine
from longcat_sim.simulation.program import Item, Program
from longcat_sim.specs.model import ModelSpec, model_spec
from longcat_sim.studies.validate.section import Row, Section

QUANTILE = 0.1
"""Block statistic: interruptions by others only ever add time."""
UNSTABLE = 0.05
ATTEMPTS = 3
MODES = ("none", "sbo")


@dataclass(frozen=True)
class Shape:
    """One case: sequences and new tokens per rank, and the link that paces its exchanges (None: gloo's own speed)."""

    batch: int
    queries: int
    pace: float | None = None
    """Paced communication over compute."""

    def __str__(self) -> str:
        link = "gloo" if self.pace is None else f"paced {self.pace:g}x"
        return f"{self.batch}x{self.queries} tokens, {link}"


MODEL = "longcat-cpu-64e"
FIT_SHAPES = (Shape(1, 64), Shape(2, 48))
SHAPES = (
    Shape(1, 48), Shape(1, 80), Shape(2, 40), Shape(1, 48, 0.5), Shape(1, 48, 1.0), Shape(1, 48, 2.0),
    Shape(2, 56, 1.0),
)  # fmt: skip
MORE_RANKS = 4
MORE_RANKS_SHAPES = (Shape(1, 48), Shape(1, 48, 1.0))
"""With more ranks than cores: reported, with a wider limit."""


@dataclass(frozen=True)
class Beside:
    """What running beside each other costs, from the fit shapes: rates, and the time to agree on counts."""

    compute_rate: float
    exchange_rate: float
    plan_s: float


@dataclass(frozen=True)
class Block:
    """One block of repeats of one case: block statistics of every mode, and the parts alone."""

    seconds: Mapping[str, float]
    segments: Mapping[tuple[int, str], FloatArray]
    """(layer, segment) -> seconds alone [ranks]; ``prepare`` is the sorting and gathering before a dispatch."""
    overlapped: Mapping[str, float]
    """Ratios seen under sbo: ``compute`` and ``exchange`` beside each other over alone; ``plan`` in seconds."""


def measure(spec: ModelSpec, shape: Shape, *, repeats: int, num_ranks: int, pace_s: float | None = None) -> Block:
    """Run one block: compute alone, communication alone, and both schedules, interleaved in each repeat."""
    from longcat_sim.model.distributed import run_ranks

    link = None
    if shape.pace is not None and pace_s is not None:
        # each exchange takes latency + bytes / bandwidth; half of it each, so that loads matter
        link = {"latency_s": pace_s / 2, "bytes_per_s": _row_bytes(spec, shape, num_ranks) / (pace_s / 2)}
    run = run_ranks(
        spec, MODES, batch=shape.batch, queries=shape.queries, repeats=repeats, num_ranks=num_ranks, link=link,
        timeout_s=300.0,
    )  # fmt: skip
    seconds = {mode: float(np.quantile(values, QUANTILE)) for mode, values in run.seconds.items()}
    segments = _alone(run, spec.num_layers, num_ranks)
    total = sum(v for key, v in segments.items() if key[1] not in COMMUNICATION)
    scale = seconds["compute"] / float(np.max(total))
    segments = {k: v * scale if k[1] not in COMMUNICATION else v for k, v in segments.items()}
    return Block(seconds, segments, _overlapped(run, segments, spec.num_layers))


def _row_bytes(spec: ModelSpec, shape: Shape, num_ranks: int) -> float:
    """Return the bytes that leave a rank in one exchange, on average."""
    copies = shape.batch * shape.queries * spec.expected_ffn_experts
    return copies * (num_ranks - 1) / num_ranks * spec.hidden_size * 4.0


def _alone(run: Any, layers: int, ranks: int) -> dict[tuple[int, str], FloatArray]:
    """Return the median seconds of each segment and exchange alone; the time between router and experts, when no
    exchange runs, is that of preparing the dispatch."""
    seen: dict[tuple[int, str], list[list[float]]] = {}
    for spans in run.spans["compute"]:
        last: dict[tuple[int, int], float] = {}
        for span in sorted(spans, key=lambda s: (s.rank, s.start_s)):
            if span.name == "experts":
                prepare = span.start_s - last[span.rank, span.layer]
                seen.setdefault((span.layer, "prepare"), [[] for _ in range(ranks)])[span.rank].append(prepare)
            seen.setdefault((span.layer, span.name), [[] for _ in range(ranks)])[span.rank].append(span.duration_s)
            last[span.rank, span.layer] = span.end_s
    for spans in run.spans["communication"]:
        for key, moved_s in _transfers(spans).items():
            for values in seen.setdefault(key, [[] for _ in range(ranks)]):
                values.append(moved_s)
    return {
        key: np.array([float(np.median(values)) for values in by_rank])
        for key, by_rank in seen.items()
        if key[0] < layers
    }


def _transfers(spans: Sequence[Any]) -> dict[tuple[int, str], float]:
    """Return how long each exchange of one repeat moved bytes: from the last rank's start to the last end."""
    edges: dict[tuple[int, str], tuple[float, float]] = {}
    for span in spans:
        if span.name in COMMUNICATION:
            start, end = edges.get((span.layer, span.name), (span.start_s, span.end_s))
            edges[span.layer, span.name] = max(start, span.start_s), max(end, span.end_s)
    return {key: end - start for key, (start, end) in edges.items()}


def _overlapped(run: Any, segments: Mapping[tuple[int, str], FloatArray], layers: int) -> dict[str, float]:
    """Return how much longer compute and exchanges take beside each other, and the time to agree on counts."""
    slow: dict[str, list[float]] = {"compute": [], "exchange": [], "plan": []}
    for spans in run.spans["sbo"]:
        for span in spans:
            if span.layer >= layers:
                continue
            if span.name == "plan":
                slow["plan"].append(span.duration_s - float(segments[span.layer, "prepare"][span.rank]))
            elif span.name in ("ffn0", "mla1_proj"):
                slow["compute"].append(span.duration_s / float(segments[span.layer, span.name][span.rank]))
        for key, moved_s in _transfers(spans).items():
            if key[0] < layers:
                slow["exchange"].append(moved_s / float(segments[key][0]))
    return {name: float(np.median(values)) if values else 1.0 for name, values in slow.items()}


def fit_beside(blocks: Sequence[Block]) -> Beside:
    """Return the cost of running beside each other from blocks of the fit shapes."""
    compute = float(np.median([block.overlapped["compute"] for block in blocks]))
    exchange = float(np.median([block.overlapped["exchange"] for block in blocks]))
    plan = float(np.median([block.overlapped["plan"] for block in blocks]))
    return Beside(min(1.0, 1 / compute), min(1.0, 1 / exchange), max(0.0, plan))


def predict(block: Block, name: str, layers: int, ranks: int, beside: Beside) -> float:
    """Return the predicted seconds of a step under a schedule, from the parts alone."""
    plan = schedule(name, "longcat")
    orders = plan.unrolled(layers)
    lanes = list(orders)
    lane_of = {at: lanes.index(lane) for lane, order in orders.items() for at in order}
    items: list[Item] = []
    seconds: list[FloatArray] = []
    order: list[list[int]] = [[] for _ in lanes]
    number: dict[Any, int] = {}

    def add(kind: str, lane: int, waits: tuple[int, ...], group: int, moves: bool, work: FloatArray) -> int:
        order[lane].append(len(items))
        items.append(Item(kind, kind, kind, 0, 0, "ranks", lane, waits, group, ResourceShares(), "measured", moves))
        seconds.append(work[None, :])
        return len(items) - 1

    waits = plan.waits(layers)
    pending = {lane: list(sequence) for lane, sequence in orders.items()}
    prepared: dict[int, int] = {}
    while any(pending.values()):
        for lane, sequence in pending.items():
            while sequence and all(
                other in number or lane_of[other] == lanes.index(lane) for other in waits[sequence[0]]
            ):
                at = sequence[0]
                layer, segment, _ = at
                if segment == "dispatch" and layer not in prepared:
                    break
                sequence.pop(0)
                needed = [number[o] for o in waits[at] if o in number and lane_of[o] != lane_of[at]]
                moves = segment in COMMUNICATION
                if segment == "dispatch":
                    needed = [prepared[layer]] if lane_of[at] else []
                number[at] = add(
                    segment if moves else "compute", lane_of[at], tuple(sorted(needed)), ranks if moves else 1, moves,
                    block.segments[layer, segment],
                )  # fmt: skip
                if segment == "router":  # the dispatch is sorted, gathered and agreed on by the processor
                    work = block.segments[layer, "prepare"] + beside.plan_s
                    prepared[layer] = add("plan", lane_of[at], (), ranks, False, work)
    law = MeasuredLaw(
        {("compute", kind): beside.compute_rate for kind in COMMUNICATION},
        dict.fromkeys(COMMUNICATION, beside.exchange_rate),
        NoContention(),
    )
    return LaneEngine(Program(items, lanes, order, seconds, 1, ranks), law).run().step_s


@dataclass(frozen=True)
class Case:
    """One shape: measured and predicted seconds by schedule, and how far its blocks lie apart."""

    measured: Mapping[str, float]
    predicted: Mapping[str, float]
    spread: Mapping[str, float]
    """Median deviation of a block from the median block."""
    is_stable: bool

    @property
    def ratio_error(self) -> float:
        """Predicted less measured ratio of ``sbo`` to ``none``."""
        return self.predicted["sbo"] / self.predicted["none"] - self.measured["sbo"] / self.measured["none"]


def run_case(
    spec: ModelSpec, shape: Shape, beside: Beside, per_token_s: float, *, blocks: int, repeats: int, num_ranks: int,
    attempts: int,
) -> Case:  # fmt: skip
    """Measure a shape until its calibrations agree, and predict each block from the parts of the one before it."""
    pace_s = None
    if shape.pace is not None:
        pace_s = shape.pace * per_token_s * shape.batch * shape.queries / (2 * spec.num_layers)
        # a paced link waits without the processor: only its own copies cost, which its time alone holds
        beside = Beside(1.0, 1.0, beside.plan_s)
    taken: list[Block] = []
    is_stable = False
    for _attempt in range(attempts):
        taken = [
            measure(spec, shape, repeats=repeats, num_ranks=num_ranks, pace_s=pace_s) for _ in range(max(2, blocks))
        ]
        calibrations = [block.seconds["compute"] for block in taken]
        is_stable = max(calibrations) / min(calibrations) - 1 <= UNSTABLE
        if is_stable:
            break
    found = {m: float(np.median([block.seconds[m] for block in taken])) for m in MODES}
    return Case(
        measured=found,
        predicted={
            m: float(np.median([predict(block, m, spec.num_layers, num_ranks, beside) for block in taken[:-1]]))
            for m in MODES
        },
        spread={m: float(np.median([abs(block.seconds[m] / found[m] - 1) for block in taken])) for m in MODES},
        is_stable=is_stable,
    )


def _rows(name: str, case: Case, worst: float) -> list[Row]:
    """Return the rows of one case; ``worst`` is the limit of a span where its blocks agree."""
    rows = [
        Row(
            f"{name}: {mode}", "ms", case.predicted[mode] * 1e3, case.measured[mode] * 1e3,
            limit=max(worst, 3 * case.spread[mode]),
            note=f"spread {case.spread[mode]:.1%}" + ("" if case.is_stable else ", unstable"),
        )
        for mode in MODES
    ]  # fmt: skip
    measured = case.measured["sbo"] / case.measured["none"]
    rows.append(
        Row(f"{name}: sbo over none", "", measured + case.ratio_error, measured, error=case.ratio_error, limit=0.08,
            note="error is a difference")
    )  # fmt: skip
    return rows


def run(
    *, model: str = MODEL, shapes: Sequence[Shape] = SHAPES, fit_shapes: Sequence[Shape] = FIT_SHAPES,
    blocks: int = 3, repeats: int = 20, num_ranks: int = 2, attempts: int = ATTEMPTS,
    more_shapes: Sequence[Shape] = MORE_RANKS_SHAPES, progress: Callable[[str], None] | None = None,
) -> Section:  # fmt: skip
    """Return the section: spans and the paired ratio of sbo to none, with the spread between blocks."""
    spec = model_spec(model)
    section = Section("ranks", f"{num_ranks} real gloo ranks of {model}: none and sbo, predicted and measured")
    settings: dict[str, int] = {"blocks": blocks, "repeats": repeats, "attempts": attempts}

    def fitted(ranks: int) -> tuple[Beside, float]:
        found = [measure(spec, shape, repeats=repeats, num_ranks=ranks) for shape in fit_shapes]
        per_token = [b.seconds["compute"] / (s.batch * s.queries) for s, b in zip(fit_shapes, found, strict=True)]
        return fit_beside(found), float(np.median(per_token))

    def tell(what: str) -> None:
        if progress is not None:
            progress(f"ranks: {what}")

    beside, per_token_s = fitted(num_ranks)
    cases = []
    for at, shape in enumerate(shapes, start=1):
        tell(f"case {at} of {len(shapes)}: {shape}")
        cases.append(run_case(spec, shape, beside, per_token_s, num_ranks=num_ranks, **settings))
    for shape, case in zip(shapes, cases, strict=True):
        section.rows += _rows(str(shape), case, 0.12)
    errors = [abs(case.predicted[m] / case.measured[m] - 1) for case in cases for m in MODES]
    spread = float(np.median([case.spread[m] for case in cases for m in MODES]))
    for name, values, limit in (
        ("span", errors, max(0.05, 1.5 * spread)),
        ("sbo over none", [abs(case.ratio_error) for case in cases], 0.03),
    ):
        middle = float(np.median(values))
        section.rows.append(Row(f"median |error| of {name}", "", middle, error=middle, limit=limit))
    section.notes.append(
        f"beside each other (fitted on {', '.join(map(str, fit_shapes))}): compute runs at {beside.compute_rate:.2f}, "
        f"gloo exchanges at {beside.exchange_rate:.2f} of their speed alone; counts take {beside.plan_s * 1e3:.2f} ms"
    )
    unstable = sum(not case.is_stable for case in cases)
    section.notes.append(f"{unstable} of {len(shapes)} cases stayed unstable (calibrations {UNSTABLE:.0%} apart)")
    if more_shapes:
        beside, per_token_s = fitted(MORE_RANKS)
        for shape in more_shapes:
            tell(f"{MORE_RANKS} ranks: {shape}")
            case = run_case(spec, shape, beside, per_token_s, num_ranks=MORE_RANKS, **settings)
            section.rows += _rows(f"{MORE_RANKS} ranks, {shape}", case, 0.15)
    return section
