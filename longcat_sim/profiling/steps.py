"""Time whole steps of the executable model: what predictions are compared with, and what no fit sees."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from longcat_sim.model.cache import LatentCache
from longcat_sim.model.longcat import LongcatFlash
from longcat_sim.profiling.timing import Clock, Samples
from longcat_sim.records.measurement import StepMeasurement
from longcat_sim.records.routing import RoutingTrace

Point = tuple[str, int, int]
"""(phase, sequences, context of decode or prompt tokens of prefill)."""
POINTS: tuple[Point, ...] = (
    ("decode", 1, 200), ("decode", 3, 100), ("decode", 4, 600), ("decode", 6, 400), ("decode", 12, 300),
    ("prefill", 1, 48), ("prefill", 1, 200), ("prefill", 2, 160), ("decode", 8, 900), ("prefill", 3, 128),
)  # fmt: skip
"""Between the sizes that the small suites measure."""
ROUNDS = 3


def measure_steps(
    model: LongcatFlash, name: str, points: Sequence[Point] = POINTS, *, budget_s: float = 20.0
) -> list[StepMeasurement]:
    """Return the time of each step, in rounds over all points; the experts' loads are recorded beside."""
    clock = Clock(model.device)
    samples: list[list[list[float]]] = [[] for _ in points]
    threads = torch.get_num_threads()
    if model.device.type == "cpu":
        torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            runs = [(point, *_prepared(model, point)) for point in points]
            for _ in range(ROUNDS):
                for index, (_, run, _) in enumerate(runs):
                    samples[index].append(clock.sample(run, budget_s / (ROUNDS * len(points)), at_least=2, at_most=20))
    finally:
        torch.set_num_threads(threads)
    found = []
    for (phase, sequences, size), rounds, (_, _, load) in zip(points, samples, runs, strict=True):
        p10, median, p90 = Samples(rounds).quantiles()
        decode = phase == "decode"
        found.append(
            StepMeasurement(
                model=name, phase=phase, sequences=sequences, queries=1 if decode else size,
                context=size + 1 if decode else size, median_s=median, p10_s=p10, p90_s=p90,
                count=sum(map(len, rounds)), block_s=tuple(float(np.quantile(part, 0.1)) for part in rounds),
                received=load[0], active=load[1],
            )
        )  # fmt: skip
    return found


def _prepared(model: LongcatFlash, point: Point) -> tuple[Any, tuple[float, float]]:
    """Return the step as a callable that leaves the cache as it was, and (received, active) of its experts."""
    phase, sequences, size = point
    spec = model.spec
    generator = torch.Generator().manual_seed(sequences * 100003 + size)
    tokens = torch.randint(spec.vocab_size, (sequences, size), generator=generator).to(model.device)
    cache = LatentCache(spec, num_sequences=sequences, max_tokens=size + 1, device=model.device, dtype=model.dtype)
    one = tokens[:, :1]
    with torch.inference_mode():
        if phase == "decode":
            for start in range(0, size, 512):
                model.prefill(tokens[:, start : start + 512], cache)

        def run() -> None:
            if phase == "decode":
                model.decode(one, cache)
            else:
                model.prefill(tokens, cache)
            for slot in range(sequences):
                cache.truncate(slot, size if phase == "decode" else 0)

        with model.record_routing() as trace:
            run()
        return run, _load(trace())


def _load(trace: RoutingTrace) -> tuple[float, float]:
    """Return mean copies at FFN experts and mean active experts per layer."""
    ffn = trace.tokens_per_expert()[:, : trace.n_routed_experts]
    return float(ffn.sum(-1).mean()), float((ffn > 0).sum(-1).mean())
