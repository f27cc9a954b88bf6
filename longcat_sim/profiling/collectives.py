"""Time collectives between ranks, alone and beside compute: gloo processes on a CPU, NCCL under torchrun on GPUs.

``collectives`` and ``contention`` start their own gloo ranks on a CPU; on GPUs they run inside the process group of
``torchrun``. A contention point is measured three ways in one round: the compute alone, the collective alone, both.
"""

from __future__ import annotations

import datetime
import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from longcat_sim.errors import MeasurementError
from longcat_sim.model.heap import keep_freed_memory
from longcat_sim.ops.op import Op, op
from longcat_sim.profiling.kernels import gemm as build_gemm
from longcat_sim.profiling.place import TORCH_DTYPES, Place
from longcat_sim.profiling.samples import Samples
from longcat_sim.profiling.timing import measurement
from longcat_sim.records.measurement import Environment, Measurement, load_measurements, save_measurements
from longcat_sim.specs.model import ModelSpec

KINDS = ("all_to_all", "all_gather", "reduce_scatter", "all_reduce")
SIZES = tuple(4**power for power in range(6, 13))
"""Bytes, 4 KiB to 16 MiB."""
ROUNDS, REPEATS = 3, 8
UNEVEN = 3.0
"""Of an uneven all-to-all: the busiest destination gets this many times the share of the others."""
PAIRS = "contention between ranks"
TIMEOUT_S = 60.0
# torch 2.13 renamed them
_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _start(kind: str, nbytes: int, ranks: int, device: torch.device, variant: str = "") -> Callable[[], Any]:
    """Return a call that starts the collective and gives back its handle."""
    count = max(ranks, nbytes // 4 // ranks * ranks)
    big, small = torch.ones(count, device=device), torch.ones(count // ranks, device=device)
    if kind == "all_to_all":
        out = torch.empty_like(big)
        if variant != "uneven" or ranks == 1:
            return lambda: dist.all_to_all_single(out, big, async_op=True)
        # every rank sends most to rank 0: rank 0 receives UNEVEN shares from each
        shares = np.array([UNEVEN] + [1.0] * (ranks - 1))
        send = np.floor(count * shares / shares.sum()).astype(int)
        send[-1] += count - send.sum()
        receive = [int(send[dist.get_rank()])] * ranks
        target = torch.empty(sum(receive), device=device)
        return lambda: dist.all_to_all_single(target, big, receive, send.tolist(), async_op=True)
    if kind == "all_gather":
        return lambda: _gather(big, small, async_op=True)
    if kind == "reduce_scatter":
        return lambda: _scatter(small, big, async_op=True)
    return lambda: dist.all_reduce(big, async_op=True)


def collective_ops(ranks: int) -> list[Op]:
    """Return the collectives that the suite times."""
    ops = [op(kind, dtype="fp32", message_bytes=size, ranks=ranks) for kind in KINDS for size in SIZES]
    return ops + [op("all_to_all", dtype="fp32", variant="uneven", message_bytes=size, ranks=ranks) for size in SIZES]


def contention_pairs(ranks: int, dtype: str) -> list[tuple[Op, Op]]:
    """Return (compute, collective) pairs: small and large of each."""
    side = 1024 if dtype == "fp32" else 4096
    computes = [op("gemm", dtype=dtype, m=m, n=side, k=side) for m in (1, 64, 256)]
    collectives = [op("all_to_all", dtype="fp32", message_bytes=size, ranks=ranks) for size in (4**9, 4**11)]
    return [(compute, collective) for compute in computes for collective in collectives]


def _settle(device: torch.device) -> None:
    """Wait for the device; on a GPU the end of a call, or of a collective's ``wait``, is not that of its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(run: Callable[[], Any], device: torch.device) -> float:
    """Return the seconds from a barrier to the slowest rank's end."""
    dist.barrier()
    _settle(device)
    start = time.perf_counter()
    run()
    _settle(device)
    spent = torch.tensor([time.perf_counter() - start], device=device)
    dist.all_reduce(spent, op=dist.ReduceOp.MAX)
    return float(spent)


def _since(begin: float, device: torch.device) -> float:
    """Return the seconds until the compute stream is done; what NCCL does on its own stream may go on."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return time.perf_counter() - begin


def _watch(handle: Any, begin: float, device: torch.device) -> Callable[[], float]:
    """Return what waits for a collective and gives the seconds from ``begin`` to its own end."""
    if device.type == "cuda":  # a stream that waits for nothing else
        side, done = torch.cuda.Stream(device), torch.cuda.Event(blocking=True)
        with torch.cuda.stream(side):
            handle.wait()
            done.record(side)
    found: list[float] = []

    def wait() -> None:
        if device.type == "cuda":
            done.synchronize()
        else:
            handle.wait()
        found.append(time.perf_counter() - begin)

    watcher = threading.Thread(target=wait)
    watcher.start()

    def ended() -> float:
        watcher.join()
        return found[0]

    return ended


def _measure_alone(item: Op, device: torch.device) -> Measurement:
    start = _start(item.kind, int(item["message_bytes"]), int(item["ranks"]), device, item.variant)
    rounds = []
    for _ in range(ROUNDS):
        _timed(lambda: start().wait(), device)
        rounds.append([_timed(lambda: start().wait(), device) for _ in range(REPEATS)])
    return measurement(item, Samples(rounds), "collectives")


def _measure_pair(compute: Op, collective: Op, spec: ModelSpec, place: Place) -> list[Measurement]:
    """Return four points: each alone, and each beside the other with the share of its time that overlapped."""
    run = build_gemm(compute, spec, place).run
    start = _start(collective.kind, int(collective["message_bytes"]), int(collective["ranks"]), place.device)
    device = place.device
    _timed(lambda: start().wait(), device)  # the first call sets up connections
    once = _timed(lambda: start().wait(), device)
    calls = max(1, round(once / max(_timed(run, device), 1e-6)))
    alone_c: list[list[float]] = []
    alone_x: list[list[float]] = []
    both_c: list[list[float]] = []
    both_x: list[list[float]] = []
    for _ in range(ROUNDS):
        parts: tuple[list[float], ...] = ([], [], [], [])
        for _ in range(REPEATS):
            parts[0].append(_timed(lambda: [run() for _ in range(calls)], device) / calls)
            parts[1].append(_timed(lambda: start().wait(), device))
            dist.barrier()
            _settle(device)
            begin = time.perf_counter()
            ended = _watch(start(), begin, device)
            for _ in range(calls):
                run()
            parts[2].append(_since(begin, device) / calls)
            parts[3].append(ended())
        for store, part in zip((alone_c, alone_x, both_c, both_x), parts, strict=True):
            store.append(part)
    # both began together
    compute_s, both_s = calls * float(np.median(both_c)), float(np.median(both_x))
    return [
        measurement(compute, Samples(alone_c), PAIRS),
        measurement(collective, Samples(alone_x), PAIRS),
        measurement(compute, Samples(both_c), PAIRS, collective, min(1.0, both_s / compute_s)),
        measurement(collective, Samples(both_x), PAIRS, compute, min(1.0, compute_s / both_s)),
    ]


def run_suites(
    suites: list[str], spec: ModelSpec, device: torch.device, dtype: str, budget_s: float
) -> list[Measurement]:
    """Return the suites' points, measured by this rank of an initialised process group; all ranks must call it.

    The time box is kept by rank 0, so that all ranks stop at the same point.
    """
    ranks, begin = dist.get_world_size(), time.monotonic()
    work: list[Op | tuple[Op, Op]] = []
    if "collectives" in suites:
        work += collective_ops(ranks)
    if "contention" in suites:
        work += contention_pairs(ranks, dtype)
    found: list[Measurement] = []
    place = Place(device, TORCH_DTYPES[dtype])
    for item in work:
        go = torch.tensor([float(time.monotonic() - begin < budget_s)], device=device)
        dist.broadcast(go, 0)
        if not bool(go):
            break
        if isinstance(item, Op):
            found.append(_measure_alone(item, device))
        else:
            compute, collective = item
            found += _measure_pair(compute, collective, spec, place)
    return found


def join_group(device: torch.device) -> torch.device:
    """Join the ranks that ``torchrun`` started, if it did; return this rank's device.

    NCCL between GPUs, one a rank; gloo between CPUs.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or dist.is_initialized():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=TIMEOUT_S))
    return device


def is_grouped() -> bool:
    """Whether this process is a rank among others."""
    return dist.is_available() and dist.is_initialized()


def is_first() -> bool:
    """Whether this process is the one that writes: the first rank, or no rank at all."""
    return not is_grouped() or dist.get_rank() == 0


def leave_group() -> None:
    """Part from the other ranks."""
    if is_grouped():
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _rank(rank: int, ranks: int, port: int, out: str, suites: list[str], spec: ModelSpec, budget_s: float) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    keep_freed_memory()
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=TIMEOUT_S))
    try:
        with torch.inference_mode():
            rows = run_suites(suites, spec, torch.device("cpu"), "fp32", budget_s)
        if rank == 0:
            save_measurements(out, Environment(device="ranks", kind="cpu"), rows)
    finally:
        dist.destroy_process_group()


def profile_collectives(
    suites: list[str], spec: ModelSpec, *, ranks: int = 2, budget_s: float = 20.0
) -> list[Measurement]:
    """Return collectives and contention points, measured between ``ranks`` gloo processes on this CPU.

    Raises:
        MeasurementError: fewer than two ranks, or a rank that died.
    """
    if ranks < 2:
        raise MeasurementError(f"ranks: expected 2 or more; got {ranks}; a collective needs somebody to talk to")
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "rows.jsonl")
        try:
            mp.spawn(_rank, (ranks, _free_port(), out, suites, spec, budget_s), nprocs=ranks, join=True)
        except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
            raise MeasurementError(f"collectives: expected {ranks} gloo ranks on this machine; {error}") from None

        return list(load_measurements(out))
