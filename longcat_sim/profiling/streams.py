"""Contention on one device: an op beside another on a second stream of a GPU, or on a second thread of a CPU.

Both run again and again; each pair is measured three ways in one round: one alone, the other alone, both at once. A GPU
gets the whole work of both streams before it starts (it waits behind a kernel that only counts cycles), so that no
launch of the host separates them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch

from longcat_sim.model.links import EXCHANGE_PRIORITY
from longcat_sim.ops.op import EXCHANGE_SMS, Op, loop_back, op
from longcat_sim.profiling.kernels import BUILDERS, Place
from longcat_sim.profiling.suites import step_ops
from longcat_sim.profiling.timing import Run, Samples, first_line, measurement
from longcat_sim.records.measurement import Measurement
from longcat_sim.specs.model import ModelSpec

COMPUTE = ("gemm", "grouped_gemm", "mla_decode", "norm", "router")
"""Kinds of op of a decode step that run beside others: the largest of each."""
ROUNDS, REPEATS = 3, 4
SIDE_S = {"cuda": 2e-3, "cpu": 8e-3}
"""Seconds that each side's calls take alone, by device."""
MOST_CALLS = 200
EXCHANGED_BYTES, FEW_SMS = 64 << 20, 4
HEAD_START_CYCLES, MOST_CYCLES = 20_000_000, 320_000_000
"""For how long a GPU waits while the host fills both streams: about 10 ms, and 160 ms where the host is slow."""


def stream_pairs(spec: ModelSpec, place: Place, dtype: str) -> list[tuple[Op, Op]]:
    """Return (op of a decode step, its neighbour): a pass that fills the memory bus, a product that fills the SMs, and
    on a GPU an exchange that loops back by few SMs.
    """
    large = place.device.type == "cuda"
    found = step_ops(spec, "decode", 64 if large else 8, 1, 4096 if large else 256, dtype)
    work = [max((o for o in found if o.kind == kind), key=lambda o: o.flop + o.memory_bytes, default=None)
            for kind in COMPUTE]  # fmt: skip
    rows, side = (16384, 4096) if large else (2048, 1024)
    pass_over = op("elementwise", dtype=dtype, rows=rows, width=side, inputs=1)
    product = op("gemm", dtype=dtype, m=rows // 4, n=side, k=side)
    neighbours = [pass_over, product]
    if large:
        sent = {"message_bytes": EXCHANGED_BYTES, "ranks": 1}
        neighbours += [op("dispatch", dtype=dtype, variant=loop_back(sms), **sent) for sms in (EXCHANGE_SMS, FEW_SMS)]
    return [(item, beside) for item in work if item is not None for beside in neighbours]


def measure_streams(
    spec: ModelSpec, place: Place, dtype: str, *, budget_s: float, pairs: list[tuple[Op, Op]] | None = None,
    failed: dict[str, str] | None = None,
) -> list[Measurement]:  # fmt: skip
    """Return four points per pair: each op alone, and each beside the other; as many pairs as fit in ``budget_s``.

    ``failed`` takes what the library said of pairs that it could not run.
    """
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
            try:
                with torch.inference_mode():
                    sides = [Side(BUILDERS[item.kind](item, spec, place).run, item.is_collective)
                             for item in (first, second)]  # fmt: skip
                    found += _pair((first, second), sides, together, target)
            except RuntimeError as error:  # a kernel that is not there, or no memory: the other pairs may run
                if failed is not None:
                    failed.setdefault(f"contention of {first.kind} {first.dtype}", first_line(error))
    finally:
        torch.set_num_threads(threads)
    return found


class Side(NamedTuple):
    """What one stream or thread runs again and again; ``urgent``: on a GPU it takes SMs before the other's blocks."""

    run: Run
    urgent: bool = False


def _pair(ops: tuple[Op, Op], sides: list[Side], together: Callable[..., list[float]], target_s: float) -> list:
    calls = []
    for one in sides:
        together([one], [2])  # warm
        calls.append(int(np.clip(target_s / (together([one], [4])[0] / 4), 1, MOST_CALLS)))
    alone: list[list[list[float]]] = [[], []]
    beside: list[list[list[float]]] = [[], []]
    for _ in range(ROUNDS):
        parts: list[list[float]] = [[], [], [], []]
        for _ in range(REPEATS):
            for side in (0, 1):
                parts[side].append(together([sides[side]], [calls[side]])[0] / calls[side])
            for side, seconds in enumerate(together(sides, calls)):
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


@lru_cache(maxsize=1)
def _streams() -> tuple[torch.cuda.Stream, ...]:
    """The streams of all pairs, two and an urgent one: what warms up on one (workspace, memory) is there for all."""
    return torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.Stream(priority=EXCHANGE_PRIORITY)


def _on_streams(sides: list[Side], calls: list[int], cycles: int = HEAD_START_CYCLES) -> list[float]:
    """Return the seconds of each side's calls, on a CUDA stream of its own, from a common start."""
    torch.cuda.synchronize()
    begin = torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(cycles)
    begin.record()
    streams = [_streams()[2 if side.urgent else number] for number, side in enumerate(sides)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in sides]
    for stream in streams:
        stream.wait_event(begin)
    for turn in range(max(calls)):  # in turn, so that neither waits for the other's launches
        for side, count, stream, end in zip(sides, calls, streams, ends, strict=True):
            if turn < count:
                with torch.cuda.stream(stream):
                    side.run()
                    if turn == count - 1:
                        end.record(stream)
    late = begin.query()  # the device began before all was launched
    torch.cuda.synchronize()
    if late and cycles < MOST_CYCLES:
        return _on_streams(sides, calls, 4 * cycles)
    return [begin.elapsed_time(end) * 1e-3 for end in ends]


def _on_threads(sides: list[Side], calls: list[int]) -> list[float]:
    """Return the seconds of each side's calls, in a thread of its own, from a common start."""
    gate = threading.Barrier(len(sides))
    seconds = [0.0] * len(sides)
    errors: list[RuntimeError] = []

    def work(side: int) -> None:
        torch.set_num_threads(1)  # a new thread has the library's default: 8 x 128 x 512 takes 12 ms instead of 20 us
        with torch.inference_mode():
            gate.wait()
            start = time.perf_counter()
            try:
                for _ in range(calls[side]):
                    sides[side].run()
            except RuntimeError as error:
                errors.append(error)
            seconds[side] = time.perf_counter() - start

    threads = [threading.Thread(target=work, args=(side,)) for side in range(len(sides))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return seconds
