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
from longcat_sim.ops.op import Op, loop_back, op
from longcat_sim.profiling.kernels import BUILDERS
from longcat_sim.profiling.place import Place
from longcat_sim.profiling.samples import Samples
from longcat_sim.profiling.suites import step_ops
from longcat_sim.profiling.timing import Run, first_line, measurement, steady
from longcat_sim.records.measurement import Measurement
from longcat_sim.specs.model import ModelSpec

COMPUTE = ("gemm", "grouped_gemm", "mla_decode", "norm", "router")
"""Kinds of op of a decode step that run beside others: the largest of each."""
ROUNDS, REPEATS = 3, 3
SIDE_S = {"cuda": 2e-3, "cpu": 8e-3}
"""Seconds that each side's calls take alone, by device."""
MOST_CALLS = 200
EXCHANGE_SMS, EXCHANGE_STEPS = (1, 4, 16), ((32, 4096), (192, 1024))
"""SMs of the exchanges beside which the ops of these decode steps run, those of kinds ``DENSE``."""
DENSE = ("gemm", "bmm", "mla_decode", "norm", "elementwise")
SM_BYTES_PER_S = 48e9
"""What one SM copies on an H100."""
BESIDE_EXCHANGE = 0.6
"""Share of an exchange's time that the calls beside it fill: it is there before them and outlasts them."""
HEAD_START_CYCLES, MOST_CYCLES, LATER_CYCLES = 5_000_000, 320_000_000, 60_000
"""For how long a GPU waits while the host fills both streams: about 2.5 ms, and up to 160 ms where that is too short;
and an op for the exchange before it, 30 us."""


def stream_pairs(spec: ModelSpec, place: Place, dtype: str) -> list[tuple[Op, Op]]:
    """Return (op of a decode step, its neighbour): a pass that fills the memory bus, a product that fills the SMs, and
    on a GPU an exchange that loops back by few SMs.
    """
    large = place.device.type == "cuda"
    found = step_ops(spec, "decode", 64 if large else 8, 1, 4096 if large else 256, dtype)
    largest = [max((o for o in found if o.kind == kind), key=lambda o: o.flop + o.memory_bytes, default=None)
               for kind in COMPUTE]  # fmt: skip
    rows, side = (16384, 4096) if large else (2048, 1024)
    pass_over = op("elementwise", dtype=dtype, rows=rows, width=side, inputs=1)
    product = op("gemm", dtype=dtype, m=rows // 4, n=side, k=side)
    pairs = [(item, beside) for item in largest if item is not None for beside in (pass_over, product)]
    if not large:
        return pairs
    dense = [item for batch, context in EXCHANGE_STEPS for item in step_ops(spec, "decode", batch, 1, context, dtype)]
    rate = SM_BYTES_PER_S * SIDE_S["cuda"]
    exchanges = [
        op("dispatch", dtype=dtype, variant=loop_back(sms), message_bytes=sms * rate, ranks=1) for sms in EXCHANGE_SMS
    ]
    beside_dense = [item for item in dict.fromkeys(dense) if item.kind in DENSE]
    return pairs + [(item, exchange) for item in beside_dense for exchange in exchanges]


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
    pairs = stream_pairs(spec, place, dtype) if pairs is None else pairs
    with steady(place.device), torch.inference_mode():
        for number, (first, second) in enumerate(pairs):
            if time.monotonic() - begin > budget_s:
                if failed is not None:
                    failed["contention"] = f"the time box dropped {len(pairs) - number} of {len(pairs)} pairs"
                break
            try:
                runs = [(BUILDERS[item.kind](item, spec, place).run, item.is_collective) for item in (first, second)]
                found += _pair((first, second), [Side(*run) for run in runs], together, target)
            except RuntimeError as error:  # a kernel that is not there, or no memory: the other pairs may run
                if failed is not None:
                    failed.setdefault(f"contention of {first.kind} {first.dtype}", first_line(error))
    return found


class Side(NamedTuple):
    """What one stream or thread runs again and again; ``urgent``: on a GPU it takes SMs before the other's blocks."""

    run: Run
    urgent: bool = False


def _pair(ops: tuple[Op, Op], sides: list[Side], together: Callable[..., list[float]], target_s: float) -> list:
    calls = []
    for one in sides:
        together([one], [2])  # warm
        share = BESIDE_EXCHANGE if sides[1].urgent and not one.urgent else 1.0
        calls.append(int(np.clip(share * target_s / (together([one], [4])[0] / 4), 1, MOST_CALLS)))
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
    """Return the seconds of each side's calls, on a CUDA stream of its own, from a common start; an urgent side is
    there a little before the other."""
    torch.cuda.synchronize()
    begin = torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(cycles)
    begin.record()
    streams = [_streams()[2 if side.urgent else number] for number, side in enumerate(sides)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in sides]
    starts = [torch.cuda.Event(enable_timing=True) for _ in sides]
    for side, stream, start in zip(sides, streams, starts, strict=True):
        stream.wait_event(begin)
        if not side.urgent and any(other.urgent for other in sides):
            with torch.cuda.stream(stream):
                torch.cuda._sleep(LATER_CYCLES)
        start.record(stream)
    for turn in range(max(calls)):  # in turn, so that neither waits for the other's launches
        for side, count, stream, end in zip(sides, calls, streams, ends, strict=True):
            if turn < count:
                with torch.cuda.stream(stream):
                    side.run()
                    if turn == count - 1:
                        end.record(stream)
    late = begin.query()  # the device began before all was launched
    torch.cuda.synchronize()
    if late and cycles >= MOST_CYCLES:
        raise RuntimeError("the host launches too slowly for a GPU to run both without a gap")
    if late:
        return _on_streams(sides, calls, 4 * cycles)
    return [start.elapsed_time(end) * 1e-3 for start, end in zip(starts, ends, strict=True)]


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
