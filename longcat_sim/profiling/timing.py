"""Time a callable: on a CPU by the clock, in samples long enough for it; on a GPU by events, with a cold L2.

A GPU op that is shorter than its launch is replayed from a CUDA graph. Several rounds over all points, not all
repetitions of a point at once: the drift of a shared machine then lands on every point alike, and shows as the spread
between rounds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

Run = Callable[[], object]
SAMPLE_S = 200e-6
"""A CPU sample lasts at least this long; shorter ops are repeated inside it."""
GRAPH_BELOW_S = 100e-6
GRAPH_CALLS = 20


@dataclass
class Samples:
    """Seconds per call, one list per round."""

    rounds: list[list[float]] = field(default_factory=list)

    @property
    def flat(self) -> list[float]:
        """All samples."""
        return [sample for part in self.rounds for sample in part]

    def quantiles(self) -> tuple[float, float, float]:
        """Return p10, median and p90."""
        p10, median, p90 = np.quantile(self.flat, [0.1, 0.5, 0.9])
        return float(p10), float(median), float(p90)

    @property
    def spread(self) -> float:
        """(p90 - p10) / median."""
        p10, median, p90 = self.quantiles()
        return (p90 - p10) / median

    def minus(self, other: Samples) -> Samples:
        """Return these times less the median of ``other`` in the same round, a tenth of them at least."""
        rounds = []
        for mine, theirs in zip(self.rounds, other.rounds, strict=True):
            less = float(np.median(theirs))
            rounds.append([max(sample - less, 0.1 * sample) for sample in mine])
        return Samples(rounds)


class Clock:
    """Times callables on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(max(size, 1 << 20), dtype=torch.uint8, device=device)

    def sample(self, run: Run, budget_s: float, *, at_least: int = 3, at_most: int = 50) -> list[float]:
        """Return seconds per call, as many samples as fit in ``budget_s``."""
        if self.device.type == "cuda":
            return self._sample_cuda(run, budget_s, at_least, at_most)
        run()
        start = time.perf_counter()
        run()
        once = time.perf_counter() - start
        calls = max(1, int(np.ceil(SAMPLE_S / max(once, 1e-7))))
        count = int(np.clip(budget_s / max(once * calls, 1e-7), at_least, at_most))
        samples = []
        for _ in range(count):
            start = time.perf_counter()
            for _ in range(calls):
                run()
            samples.append((time.perf_counter() - start) / calls)
        return samples

    def _sample_cuda(self, run: Run, budget_s: float, at_least: int, at_most: int) -> list[float]:
        """Time by events; L2 is flushed before every sample."""
        for _ in range(3):
            run()
        torch.cuda.synchronize(self.device)
        once = self._event(run)
        calls = 1
        if once < GRAPH_BELOW_S:
            graph = _captured(run)
            if graph is not None:
                run, calls = graph.replay, GRAPH_CALLS
        count = int(np.clip(budget_s / max(once * calls * 3, 1e-6), at_least, at_most))
        return [self._event(run) / calls for _ in range(count)]

    def _event(self, run: Run) -> float:
        assert self._flush is not None
        self._flush.zero_()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e-3


def _captured(run: Run) -> torch.cuda.CUDAGraph | None:
    """Return a graph of ``GRAPH_CALLS`` calls, or None where the op cannot be captured (it waits for the device)."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(graph):
            for _ in range(GRAPH_CALLS):
                run()
        return graph
    except RuntimeError:
        torch.cuda.synchronize()
        return None
