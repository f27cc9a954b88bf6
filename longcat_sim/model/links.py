"""Between ranks: how they meet, how a lost one is named, and a *paced* link of given latency and bandwidth."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch.distributed as dist

RING = 64  # launches remembered per rank; a rank is never so far ahead
EXCHANGE_PRIORITY = -1
"""Of the stream of a GPU's exchange. High: its blocks take SMs as soon as those of a product leave them, else only
between products. As DeepEP and NCCL do."""


@dataclass
class PacedLink:
    """A link that takes latency + bytes / bandwidth from the last rank's launch on, and uses no processor meanwhile.

    The data still travel by the process group; the wait ends when both they and the paced time are there. Launch times
    go through a file mapped by all ranks of one machine, whose monotonic clock they share.
    """

    latency_s: float
    bytes_per_s: float
    num_ranks: int
    path: Path

    def __post_init__(self) -> None:
        shape = (self.num_ranks, RING)
        mode = "r+" if self.path.exists() else "w+"
        self._at = np.memmap(self.path, dtype=np.float64, mode=mode, shape=shape)  # type: ignore[call-overload]

    def launched(self, rank: int, turn: int) -> None:
        """Note that ``rank`` launches its collective number ``turn`` now."""
        self._at[rank, turn % RING] = time.perf_counter()

    def wait(self, turn: int, moved_bytes: int) -> float:
        """Sleep until the paced collective is done and return that time; its data must have arrived."""
        start_s = float(self._at[:, turn % RING].max())
        end_s = start_s + self.latency_s + moved_bytes / self.bytes_per_s
        left = end_s - time.perf_counter()
        if left > 0:
            time.sleep(left)
        return end_s


class Heartbeat:
    """Beats in the store while this rank lives, and finds the ranks that do not."""

    INTERVAL_S = 0.5

    def __init__(self, rank: int, num_ranks: int, host: str, port: int) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        self._store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10))
        self._stop = threading.Event()
        self._store.add(f"beat/{rank}", 1)
        threading.Thread(target=self._beat, args=(host, port), daemon=True).start()

    def _beat(self, host: str, port: int) -> None:
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10))
        while not self._stop.wait(self.INTERVAL_S):
            try:
                store.add(f"beat/{self.rank}", 1)
            except RuntimeError:  # the store is gone: the run is over
                return

    def gone(self) -> list[int]:
        """Return the other ranks without a beat for three intervals; takes as long."""
        others = [rank for rank in range(self.num_ranks) if rank != self.rank]
        before = {rank: self._store.add(f"beat/{rank}", 0) for rank in others}
        time.sleep(3 * self.INTERVAL_S)
        return [rank for rank in others if self._store.add(f"beat/{rank}", 0) == before[rank]]

    def stop(self) -> None:
        """End the beating."""
        self._stop.set()


def connect(
    rank: int, num_ranks: int, host: str, port: int, *, timeout_s: float = 60.0, backend: str = "gloo"
) -> Heartbeat:
    """Join the process group of ``num_ranks`` over the store at ``host:port`` and return this rank's heartbeat."""
    wait = timedelta(seconds=timeout_s)
    store = dist.TCPStore(host, port, is_master=False, timeout=wait)
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=wait)
    return Heartbeat(rank, num_ranks, host, port)
