"""Contention on one device: an op beside another on a second stream of a GPU, or on a second thread of a CPU.

Both run again and again; each pair is measured three ways in one round: one alone, the other alone, both at once. A GPU
gets the whole work of both streams before it starts (it waits behind a kernel that only counts cycles), so that no
launch of the host separates them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import torch

from longcat_sim.ops.op import Op, op
from longcat_sim.profiling.kernels import BUILDERS, Place
from longcat_sim.profiling.suites import step_ops
from longcat_sim.profiling.timing import Run, Samples, measurement
from longcat_sim.records.measurement import Measurement
from longcat_sim.specs.model import ModelSpec

COMPUTE = ("gemm", "grouped_gemm", "mla_decode", "norm", "router")
"""Kinds of op of a decode step that run beside others: the largest of each."""
ROUNDS, REPEATS = 3, 4
SIDE_S = {"cuda": 2e-3, "cpu": 8e-3}
"""Seconds that each side's calls take alone, by device."""
MOST_CALLS = 200
HEAD_START_CYCLES = 20_000_000
"""For how long a GPU waits while the host fills both streams: about 10 ms."""


def stream_pairs(spec: ModelSpec, place: Place, dtype: str) -> list[tuple[Op, Op]]:
    """Return (op of a decode step, its neighbour): a pass that fills the memory bus, and a product that fills the SMs.

    Passes stand for copies and for the kernels of an exchange, which move bytes and compute nothing.
    """
    large = place.device.type == "cuda"
    found = step_ops(spec, "decode", 64 if large else 8, 1, 4096 if large else 256, dtype)
    work = [max((o for o in found if o.kind == kind), key=lambda o: o.flop + o.memory_bytes, default=None)
            for kind in COMPUTE]  # fmt: skip
    rows, side = (16384, 4096) if large else (2048, 1024)
    pass_over = op("elementwise", dtype=dtype, rows=rows, width=side, inputs=1)
    product = op("gemm", dtype=dtype, m=rows // 4, n=side, k=side)
    return [(item, beside) for item in work if item is not None for beside in (pass_over, product)]


def measure_streams(
    spec: ModelSpec, place: Place, dtype: str, *, budget_s: float, pairs: list[tuple[Op, Op]] | None = None
) -> list[Measurement]:
    """Return four points per pair: each op alone, and each beside the other; as many pairs as fit in ``budget_s``."""
    begin = time.monotonic()
    together = _on_streams if place.device.type == "cuda" else _on_threads
    target = SIDE_S[place.device.type]
    found: list[Measurement] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for first, second in stream_pairs(spec, place, dtype) if pairs is None else pairs:
            if time.monotonic() - begin > budget_s:
                break
            with torch.inference_mode():
                runs = [BUILDERS[item.kind](item, spec, place).run for item in (first, second)]
                found += _pair((first, second), runs, together, target)
    finally:
        torch.set_num_threads(threads)
    return found


def _pair(ops: tuple[Op, Op], runs: list[Run], together: Callable[..., list[float]], target_s: float) -> list:
    calls = []
    for run in runs:
        together([run], [2])  # warm
        calls.append(int(np.clip(target_s / (together([run], [4])[0] / 4), 1, MOST_CALLS)))
    alone: list[list[list[float]]] = [[], []]
    beside: list[list[list[float]]] = [[], []]
    for _ in range(ROUNDS):
        parts: list[list[float]] = [[], [], [], []]
        for _ in range(REPEATS):
            for side in (0, 1):
                parts[side].append(together([runs[side]], [calls[side]])[0] / calls[side])
            for side, seconds in enumerate(together(runs, calls)):
                parts[2 + side].append(seconds / calls[side])
        for side in (0, 1):
            alone[side].append(parts[side])
            beside[side].append(parts[2 + side])
    both = [calls[side] * float(np.median(beside[side])) for side in (0, 1)]
    rows = [measurement(ops[side], Samples(alone[side]), "contention") for side in (0, 1)]
    for side in (0, 1):  # both began together
        overlapped = min(1.0, both[1 - side] / both[side])
        rows.append(measurement(ops[side], Samples(beside[side]), "contention", ops[1 - side], overlapped))
    return rows


def _on_streams(runs: list[Run], calls: list[int]) -> list[float]:
    """Return the seconds of each run's calls, on a CUDA stream of its own, from a common start."""
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in runs]
    begin = torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(HEAD_START_CYCLES)
    begin.record()
    ends = []
    for run, count, stream in zip(runs, calls, streams, strict=True):
        stream.wait_event(begin)
        with torch.cuda.stream(stream):
            for _ in range(count):
                run()
            end = torch.cuda.Event(enable_timing=True)
            end.record(stream)
            ends.append(end)
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) * 1e-3 for end in ends]


def _on_threads(runs: list[Run], calls: list[int]) -> list[float]:
    """Return the seconds of each run's calls, in a thread of its own, from a common start."""
    gate = threading.Barrier(len(runs))
    seconds = [0.0] * len(runs)

    def work(side: int) -> None:
        with torch.inference_mode():
            gate.wait()
            start = time.perf_counter()
            for _ in range(calls[side]):
                runs[side]()
            seconds[side] = time.perf_counter() - start

    threads = [threading.Thread(target=work, args=(side,)) for side in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return seconds
