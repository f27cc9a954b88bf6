"""Time a callable: on a CPU by the clock, on a GPU by events; on both with caches as cold as a step leaves them.

Between two runs of an op a step streams weights through the caches: a norm comes back every few megabytes, a router
every layer. On a CPU that many bytes of weights are multiplied before every sample of a short op, so that neither its
data nor the library's code is nearer than in a step. (Measured: a norm of one row 21 us in a tight loop, about 30 us
in a step; routing and sort 66 us against 160 us.)

A GPU's weights and caches rotate through a pool that its L2 does not hold; activations stay, as a step has just
written them. What a GPU runs is replayed from a CUDA graph, as engines decode: between its kernels is the device's
gap, not the host's launches. Only what waits for the device is launched call by call. Several rounds over all points,
not all repetitions of a point at once: the drift of a shared machine lands on every point alike, and shows as the
spread between rounds.

A shared CPU runs everything slower or faster from one second to the next: neighbours take its caches, its memory, its
clock. So a probe, the same small product again and again, runs between the samples, and each round's times are scaled
to one pace of it. (On 2 shared cores whose neighbours were busy, three rounds of one op repeated to 13 %,
scaled to 6.5 %: products 5.7 and 2.8, absorption 12 and 3.6, MLA 21 and 9; only top-k, which waits for nothing shared,
3.3 and 4.6.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

from longcat_sim.model.heap import freed_memory_kept
from longcat_sim.ops.op import Op
from longcat_sim.records.measurement import UNSTABLE_SPREAD, Measurement

Run = Callable[[], object]
WARM_FROM_S = 2e-3
"""A CPU op that lasts longer than this brings its own cold caches."""
STREAM_POOL_BYTES = 128 << 20
"""Weights to stream before a CPU op: more than a last-level cache holds."""
STREAM_WIDTH = 512
PROBE_SHARE = 0.15
"""Part of the time that goes to the probe."""
PROBE_ROWS, PROBE_WIDTH = 128, 256
"""Sizes of the probe's product, 0.2 ms of an EPYC; a core's cache holds its operands. A stream of weights beside it
took 0.26 or 0.34 ms by what ran before, and told no more."""
GRAPH_S, GRAPH_CALLS = 1e-3, 20
"""A graph holds as many calls as fill this time, and at most so many."""


@dataclass
class Samples:
    """Seconds per call, one list per round."""

    rounds: list[list[float]] = field(default_factory=list)
    paces: list[float] = field(default_factory=list)
    """Seconds of the probe in each round; empty where none ran (a GPU; parts of an op)."""

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
        return Samples(rounds, self.paces)

    def at(self, pace_s: float | None) -> Samples:
        """Return these times on a machine whose probe takes ``pace_s``; as they are where no probe ran."""
        if pace_s is None or not self.paces:
            return self
        rounds = [[sample * pace_s / own for sample in part] for part, own in zip(self.rounds, self.paces, strict=True)]
        return Samples(rounds, [pace_s] * len(rounds))


def merged(samples: Iterable[Samples]) -> Samples:
    """Return the rounds of all."""
    found = list(samples)
    return Samples([part for each in found for part in each.rounds], [pace for each in found for pace in each.paces])


def usual_pace(samples: Iterable[Samples]) -> float | None:
    """Return the median time of the probe over all rounds, None where none ran."""
    paces = merged(samples).paces
    return float(np.median(paces)) if paces else None


def measurement(
    item: Op, samples: Samples, suite: str, alongside: Op | None = None, overlapped: float = 1.0
) -> Measurement:
    """Return what the samples of an op say; each of their rounds is a block."""
    p10, median, p90 = samples.quantiles()
    return Measurement(
        op=item, median_s=median, p10_s=p10, p90_s=p90, count=len(samples.flat), suite=suite,
        stable=samples.spread <= UNSTABLE_SPREAD, alongside=alongside, overlapped=overlapped,
        block_s=tuple(Samples([part]).quantiles()[0] for part in samples.rounds),
    )  # fmt: skip


@contextmanager
def steady(device: torch.device) -> Iterator[None]:
    """Let a CPU compute with one thread, and keep the memory that it frees."""
    if device.type != "cpu":
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with freed_memory_kept():
            yield
    finally:
        torch.set_num_threads(threads)


def first_line(error: Exception) -> str:
    """Return what an exception says, on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


@lru_cache(maxsize=1)
def _pool() -> torch.Tensor:
    return torch.randn(STREAM_POOL_BYTES // (4 * STREAM_WIDTH), STREAM_WIDTH)


class Clock:
    """Times callables on one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush: torch.Tensor | None = None
        self._at = 0
        if device.type == "cpu":
            self._row, self._weights = torch.randn(1, STREAM_WIDTH), _pool()
            self._tile, self._square = torch.randn(PROBE_ROWS, PROBE_WIDTH), torch.randn(PROBE_WIDTH, PROBE_WIDTH)
        if device.type == "cuda":
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(max(size, 1 << 20), dtype=torch.uint8, device=device)
            self._side = torch.cuda.Stream(device)

    def sample(
        self, run: Run, budget_s: float, *, at_least: int = 3, at_most: int = 50, stream_bytes: float = 0.0,
        warm: bool = False,
    ) -> Samples:  # fmt: skip
        """Return one round of seconds per call, as many samples as fit in ``budget_s``.

        On a CPU ``stream_bytes`` of weights pass through the caches before each call, and the probe runs between the
        calls; ``warm``: neither does.
        """
        if self.device.type == "cuda":
            return Samples([self._sample_cuda(run, budget_s, at_least, at_most)])
        run()
        start = time.perf_counter()
        run()
        once = time.perf_counter() - start
        rows = int(stream_bytes / (4 * STREAM_WIDTH)) if once < WARM_FROM_S and not warm else 0
        start = time.perf_counter()
        self._stream(rows)
        whole = (once + time.perf_counter() - start) * (1.0 if warm else 1.0 + PROBE_SHARE)
        samples: list[float] = []
        probes: list[float] = []
        spent = 0.0
        for _ in range(int(np.clip(budget_s / max(whole, 1e-7), at_least, at_most))):
            if not warm:
                self._probe(probes, spent)
            begin = time.perf_counter()
            self._stream(rows)
            start = time.perf_counter()
            run()
            end = time.perf_counter()
            samples.append(end - start)
            spent += end - begin
        if warm:
            return Samples([samples])
        self._probe(probes, spent)
        return Samples([samples], [float(np.median(probes))])

    def _probe(self, probes: list[float], spent: float) -> None:
        """Time the probe until it has had its share of what was spent on samples, at least once in all."""
        if probes and sum(probes) >= PROBE_SHARE * spent:
            return
        torch.mm(self._tile, self._square)  # warm, whatever ran before
        while not probes or sum(probes) < PROBE_SHARE * spent:
            start = time.perf_counter()
            torch.mm(self._tile, self._square)
            probes.append(time.perf_counter() - start)

    def _stream(self, rows: int) -> None:
        """Multiply the next ``rows`` of the pool, as the products of a step do."""
        rows = min(rows, len(self._weights))
        if rows:
            if self._at + rows > len(self._weights):
                self._at = 0
            torch.mm(self._row, self._weights[self._at : self._at + rows].t())
            self._at += rows

    def _sample_cuda(self, run: Run, budget_s: float, at_least: int, at_most: int) -> list[float]:
        """Time by events; L2 is flushed before every sample."""
        if _waits(run):
            self._event(run)
            once, calls = self._event(run), 1
        else:
            once = self._event(self._captured(run, 1).replay)
            calls = int(np.clip(GRAPH_S / once, 1, GRAPH_CALLS))
            run = self._captured(run, calls).replay
            self._event(run)
        count = int(np.clip(budget_s / max(once * calls, 1e-6), at_least, at_most))
        return [self._event(run) / calls for _ in range(count)]

    def _captured(self, run: Run, calls: int) -> torch.cuda.CUDAGraph:
        """Return a graph of ``calls`` calls."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        free, total = torch.cuda.mem_get_info(self.device)
        if free < total / 3:  # what earlier graphs held cannot be given back during a capture
            torch.cuda.empty_cache()
        with torch.cuda.stream(self._side):  # torch.cuda.graph would give all cached memory back each time
            run()
            graph.capture_begin()
            try:
                for _ in range(calls):
                    run()
            finally:
                graph.capture_end()
        torch.cuda.synchronize(self.device)
        return graph

    def _event(self, run: Run) -> float:
        assert self._flush is not None
        self._flush.zero_()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) * 1e-3


def _waits(run: Run) -> bool:
    """Whether a call makes the host wait for the device, so that no graph can hold it.

    Found before a capture, not by one: a capture that fails leaves the library's random generator unusable.
    """
    run()  # builds what only the first call builds
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return False
