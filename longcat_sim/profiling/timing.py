"""Time a callable: on a CPU by the clock, on a GPU by events; on both with caches as cold as a step leaves them.

Between two runs of an op a step streams weights through the caches: a norm comes back every few megabytes, a router
every layer. On a CPU that many bytes of weights are multiplied before every sample of a short op, so that neither its
data nor the library's code is nearer than in a step. (Measured: a norm of one row 21 us in a tight loop, about 30 us
in a step; routing and sort 66 us against 160 us.)

A GPU's weights and caches rotate through a pool that its L2 does not hold; activations stay, as a step has just
written them. What a GPU runs is replayed from a CUDA graph, as engines decode: between its kernels is the device's
gap, not the host's launches. Only what waits for the device is launched call by call. Several rounds over all points,
not all repetitions of a point at once: the drift of a shared machine lands on every point alike, and shows as the
spread between rounds; probes between the samples tell how much of it is the machine's (``profiling.pace``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import numpy as np
import torch

from longcat_sim.model.heap import freed_memory_kept
from longcat_sim.ops.op import Op
from longcat_sim.profiling.pace import Probes
from longcat_sim.profiling.samples import Samples
from longcat_sim.records.measurement import UNSTABLE_SPREAD, Measurement

Run = Callable[[], object]
WARM_FROM_S = 2e-3
"""A CPU op that lasts longer than this brings its own cold caches."""
STREAM_POOL_BYTES = 128 << 20
"""Weights to stream before a CPU op: more than a last-level cache holds."""
STREAM_WIDTH = 512
PROBE_SHARE = 0.2
"""Time that goes to probes, over that of the samples. Assumed."""
GRAPH_S, GRAPH_CALLS = 1e-3, 20
"""A graph holds as many calls as fill this time, and at most so many."""


def measurement(
    item: Op, samples: Samples, suite: str, alongside: Op | None = None, overlapped: float = 1.0,
    paced: Samples | None = None,
) -> Measurement:  # fmt: skip
    """Return what the samples of an op say; each of their rounds is a block.

    The median is that of ``paced``, the samples at one pace, where there are such: a slow minute is in half of the
    samples. The other percentiles stay as the clock has them (the 10th is of quiet moments anyway), or reach to it.
    """
    p10, median, p90 = samples.quantiles()
    if paced is not None:
        median = paced.quantiles()[1]
    return Measurement(
        op=item, median_s=median, p10_s=min(p10, median), p90_s=max(p90, median), count=len(samples.flat), suite=suite,
        stable=(paced or samples).spread <= UNSTABLE_SPREAD, alongside=alongside, overlapped=overlapped,
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
            self._probes = Probes()
        if device.type == "cuda":
            size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
            self._flush = torch.empty(max(size, 1 << 20), dtype=torch.uint8, device=device)
            self._side = torch.cuda.Stream(device)

    def sample(
        self, run: Run, budget_s: float, *, at_least: int = 3, at_most: int = 50, stream_bytes: float = 0.0,
        warm: bool = False,
    ) -> Samples:  # fmt: skip
        """Return one round of seconds per call, as many samples as fit in ``budget_s``.

        On a CPU ``stream_bytes`` of weights pass through the caches before each call, and probes run between the
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
        probes: list[tuple[float, ...]] = []
        sampling = probing = 0.0
        for _ in range(int(np.clip(budget_s / max(whole, 1e-7), at_least, at_most))):
            begin = time.perf_counter()
            self._stream(rows)
            start = time.perf_counter()
            run()
            end = time.perf_counter()
            samples.append(end - start)
            sampling += end - begin
            while not warm and (not probes or probing < PROBE_SHARE * sampling):
                begin = time.perf_counter()
                probes.append(self._probes.take())
                probing += time.perf_counter() - begin
        return Samples([samples], [tuple(np.median(probes, axis=0).tolist())] if probes else [])

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
