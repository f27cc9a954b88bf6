"""Measured slowdowns of ops side by side, beside what the contention law says of their demands."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from longcat_sim.ops.op import Op, OpTimesLike, ResourceShares, loop_back_sms
from longcat_sim.records.measurement import Measurement
from longcat_sim.simulation.contention import SLOWEST, MaxMin, Running
from longcat_sim.specs.hardware import HardwareSpec


class Beside(NamedTuple):
    """One op beside another: its speed while both run, over its speed alone."""

    op: Op
    neighbour: Op
    measured: float
    predicted: float


def rate_beside(alone_s: float, both_s: float, overlapped: float) -> float:
    """Return the speed of an op while its neighbour runs, over its speed alone.

    Of ``both_s`` the share ``overlapped`` ran at that speed, the rest as fast as alone; ``alone_s`` of work is done.
    """
    return max(SLOWEST, (alone_s / both_s - (1.0 - overlapped)) / overlapped)


def slowdowns(
    rows: Iterable[Measurement], times: OpTimesLike, hardware: HardwareSpec, *, own_cores: bool = False
) -> list[Beside]:
    """Return each pair that was measured within one device, with the rate that max-min fair shares predict.

    ``own_cores``: the two were threads of a CPU, which share its memory but have a core each.
    """
    alone: dict[Op, float] = {}
    found = []
    for row in rows:
        neighbour = row.alongside
        if row.suite != "contention":
            continue
        if neighbour is None:  # of the pair that follows, measured in the same rounds
            alone[row.op] = row.median_s
            continue
        if row.op not in alone:
            continue
        if neighbour not in alone:
            continue
        pair = [_running(item, alone[item], times, hardware, own_cores) for item in (row.op, neighbour)]
        measured = rate_beside(alone[row.op], row.median_s, row.overlapped)
        found.append(Beside(row.op, neighbour, measured, MaxMin().rates(pair)[0]))
    return found


def _running(item: Op, alone_s: float, times: OpTimesLike, hardware: HardwareSpec, own_cores: bool) -> Running:
    if item.is_collective:
        shares = exchange_shares(hardware, item.message_bytes, alone_s, loop_back_sms(item))
        return Running(item.kind, shares, is_collective=True)
    demand = times.demand(item)
    return Running(item.kind, demand._replace(sm=0.0) if own_cores else demand)


def exchange_shares(hardware: HardwareSpec, nbytes: float, alone_s: float, sms: int) -> ResourceShares:
    """Return what a copy of ``nbytes`` by ``sms`` SMs uses of the device: each byte is read and written."""
    rate = 2.0 * nbytes / alone_s / hardware.memory_bandwidth
    return ResourceShares(sm=sms / (hardware.sm_count or sms), memory=min(1.0, rate))


def summary(found: list[Beside]) -> dict[str, float]:
    """Return how many ops ran beside another, their mean rate, and the mean |difference| to the predicted ones."""
    measured, predicted = (np.array([getattr(one, name) for one in found]) for name in ("measured", "predicted"))
    return {
        "ops": len(found), "measured_rate": float(f"{measured.mean():.3g}"),
        "predicted_rate": float(f"{predicted.mean():.3g}"),
        "mean_difference": float(f"{np.abs(predicted - measured).mean():.3g}"),
    }  # fmt: skip
