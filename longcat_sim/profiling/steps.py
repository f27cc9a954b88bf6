"""Time whole steps of the executable model: what predictions are compared with, and what no fit sees.

A CPU's step holds the host's work before it (positions, places in the cache); a GPU's is replayed from a CUDA graph,
as engines do, with that work done before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from longcat_sim.model.cache import LatentCache
from longcat_sim.model.layer import Step
from longcat_sim.model.longcat import ABSORBED, LongcatFlash
from longcat_sim.profiling.pace import at_pace, mean_pace, sensitivity
from longcat_sim.profiling.samples import Samples, merged
from longcat_sim.profiling.timing import Clock, Run, first_line, steady
from longcat_sim.records.measurement import StepMeasurement
from longcat_sim.records.routing import RoutingTrace

Point = tuple[str, int, int]
"""(phase, sequences, context of decode or prompt tokens of prefill)."""
POINTS: tuple[Point, ...] = (
    ("decode", 1, 200), ("decode", 3, 100), ("decode", 4, 600), ("decode", 6, 400), ("decode", 12, 300),
    ("prefill", 1, 48), ("prefill", 1, 200), ("prefill", 2, 160), ("decode", 8, 900), ("prefill", 3, 128),
)  # fmt: skip
"""Between the sizes that the small suites measure."""


class Exchanged(NamedTuple):
    """A decode step of one layer whose exchanges loop back: ``sms`` copy the rows, or ``pace_s`` pass."""

    sequences: int
    context: int
    sms: int = 0
    pace_s: float = 0.0


EXCHANGED = (
    *(Exchanged(128, 1000, pace_s=pace_s) for pace_s in (100e-6, 250e-6, 500e-6)),
    Exchanged(64, 2000, pace_s=200e-6), Exchanged(256, 500, pace_s=300e-6), Exchanged(256, 500, pace_s=800e-6),
    Exchanged(24, 4000, pace_s=150e-6),
    *(Exchanged(128, 1000, sms) for sms in (1, 2, 4, 16)),
    *(Exchanged(64, 2000, sms) for sms in (1, 4)), *(Exchanged(256, 500, sms) for sms in (2, 8)),
)  # fmt: skip
"""From exchanges that take a tenth of the dense part beside them to some that take longer."""
ROUNDS = 3
STEP = "step"
"""The sort of all steps: they follow the machine alike."""


def measure_steps(
    model: LongcatFlash, name: str, points: Sequence[Point] = POINTS, *, budget_s: float = 20.0
) -> list[StepMeasurement]:
    """Return the time of each step, in rounds over all points; the experts' loads are recorded beside.

    On a CPU rounds are scaled to the mean pace of all of them, which every step names.
    """
    with torch.inference_mode(), steady(model.device):
        runs = [_prepared(model, point) for point in points]
        rounds = _sampled(model.device, [run for run, _ in runs], budget_s)
    return [
        _step(name, point, samples, load) for point, samples, (_, load) in zip(points, rounds, runs, strict=True)
    ]  # fmt: skip


def measure_exchanges(
    model: LongcatFlash, name: str, points: Sequence[Exchanged] = EXCHANGED, *, budget_s: float = 20.0,
    failed: dict[str, str] | None = None,
) -> list[StepMeasurement]:  # fmt: skip
    """Return decode steps of a GPU whose exchanges loop back, under ``none`` and ``sbo``, without the output
    projection; the exchange's own time is measured in the same rounds.

    ``failed`` takes what the library said of points that it could not run.

    Raises:
        RuntimeError: no Triton here.
    """
    try:
        import longcat_sim.model.loop_back  # noqa: F401
    except ImportError as error:
        raise RuntimeError(f"exchanges by few SMs need Triton: {error}") from None
    found: list[StepMeasurement] = []
    with torch.inference_mode():
        for point in points:
            try:
                found += _exchanged(model, name, point, budget_s / len(points))
            except RuntimeError as error:  # no memory for this one: the others may run
                if failed is not None:
                    failed.setdefault(f"overlap of {point.sequences} sequences", first_line(error))
    return found


def _exchanged(model: LongcatFlash, name: str, point: Exchanged, budget_s: float) -> list[StepMeasurement]:
    from longcat_sim.model.loop_back import LoopBack, by_few, paced

    tokens, planned, load = _planned(model, ("decode", point.sequences, point.context))
    step = planned()
    rows = torch.randn(point.sequences * model.spec.moe_topk, model.spec.hidden_size, device=model.device)
    rows = rows.to(model.dtype)
    exchange = by_few(point.sms) if point.sms else paced(point.pace_s)
    loops = [LoopBack(model, mode, exchange) for mode in ("none", "sbo")]
    runs: list[Run] = [partial(exchange, rows)]
    runs += [partial(_through, loop, model, tokens, step) for loop in loops]
    alone, *both = _sampled(model.device, runs, budget_s)
    _, exchange_s, _ = alone.quantiles()
    return [
        replace(
            _step(name, ("decode", point.sequences, point.context), samples, load), overlap=loop.schedule.name,
            exchange_s=exchange_s, exchange_bytes=float(rows.nbytes), exchange_sms=point.sms,
        )
        for loop, samples in zip(loops, both, strict=True)
    ]  # fmt: skip


def _through(loop: Any, model: LongcatFlash, tokens: torch.Tensor, step: Step) -> None:
    with loop:
        model.run_layers(tokens, step)


def _sampled(device: torch.device, runs: Sequence[Run], budget_s: float) -> list[Samples]:
    """Return the rounds of each run at one pace, which they name; all runs once in each round."""
    clock = Clock(device)
    rounds: list[list[Samples]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for index, run in enumerate(runs):
            rounds[index].append(clock.sample(run, budget_s / (ROUNDS * len(runs)), at_least=2, at_most=20))
    found = [merged(parts) for parts in rounds]
    pace_s, powers = mean_pace(found), {STEP: sensitivity(found)}
    return [replace(at_pace(samples, pace_s, powers, STEP), probes=[pace_s] if pace_s else []) for samples in found]


def _step(name: str, point: Point, samples: Samples, load: tuple[float, float]) -> StepMeasurement:
    phase, sequences, size = point
    p10, median, p90 = samples.quantiles()
    decode = phase == "decode"
    return StepMeasurement(
        model=name, phase="decode" if decode else "prefill", sequences=sequences, queries=1 if decode else size,
        context=size + 1 if decode else size, median_s=median, p10_s=p10, p90_s=p90,
        count=len(samples.flat), block_s=tuple(float(np.quantile(part, 0.1)) for part in samples.rounds),
        received=load[0], active=load[1], pace_s=samples.probes[0] if samples.probes else (),
    )  # fmt: skip


def _prepared(model: LongcatFlash, point: Point) -> tuple[Run, tuple[float, float]]:
    """Return the whole step as a callable that leaves the cache as it was, and (received, active) of its experts."""
    tokens, planned, load = _planned(model, point)

    def compute(step: Step) -> None:
        hidden_TH = model.run_layers(tokens, step)
        last_TH = hidden_TH if point[0] == "decode" else hidden_TH.view(*tokens.shape, -1)[:, -1]
        model.head(last_TH).float().argmax(-1)

    if model.device.type == "cpu":
        return lambda: compute(planned()), load
    return partial(compute, planned()), load


def _planned(model: LongcatFlash, point: Point) -> tuple[torch.Tensor, Callable[[], Step], tuple[float, float]]:
    """Return the new tokens, what plans the step (and leaves the cache as it was), and its experts' load."""
    phase, sequences, size = point
    generator = torch.Generator().manual_seed(sequences * 100003 + size)
    tokens = torch.randint(model.spec.vocab_size, (sequences, size), generator=generator).to(model.device)
    place: dict[str, Any] = {"device": model.device, "dtype": model.dtype}
    cache = LatentCache(model.spec, num_sequences=sequences, max_tokens=size + 1, **place)
    variant, before = None, 0
    if phase == "decode":
        tokens, variant, before = tokens[:, :1], ABSORBED, size
        cache.pool.normal_(0.0, 0.1)
        cache.lengths = [size] * sequences

    def planned() -> Step:
        step = model.step(len(tokens), tokens.shape[1], cache, None, variant)
        for slot in range(sequences):
            cache.truncate(slot, before)
        return step

    with model.record_routing() as trace:
        model.run_layers(tokens, planned())
    return tokens, planned, _load(trace())


def _load(trace: RoutingTrace) -> tuple[float, float]:
    """Return mean copies at FFN experts and mean active experts per layer."""
    ffn = trace.tokens_per_expert()[:, : trace.n_routed_experts]
    return float(ffn.sum(-1).mean()), float((ffn > 0).sum(-1).mean())
