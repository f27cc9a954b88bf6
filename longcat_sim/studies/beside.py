"""Measured slowdowns of ops side by side, beside what the contention law says of their demands."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from longcat_sim.ops.op import Op, OpTimesLike, ResourceShares, loop_back_sms
from longcat_sim.records.measurement import Measurement
from longcat_sim.simulation.contention import SLOWEST, MaxMin, Running
from longcat_sim.specs.hardware import HardwareSpec

ROWS = frozenset({"m", "rows", "tokens", "batch", "queries", "context"})
"""Sizes that grow with the tokens of a step."""


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


class ExchangeRates:
    """Measured rates of ops and of exchanges that loop back beside each other, between the sizes that were measured."""

    def __init__(self, found: Iterable[Beside]) -> None:
        self._rates: dict[tuple, dict[float, dict[int, list[float]]]] = defaultdict(lambda: defaultdict(dict))
        for one in found:
            exchange = one.neighbour if one.neighbour.is_collective else one.op
            item = one.op if exchange is one.neighbour else one.neighbour
            if exchange.is_collective:
                pair = self._rates[_sort(item)][_work(item)].setdefault(loop_back_sms(exchange), [1.0, 1.0])
                pair[int(one.op is exchange)] = one.measured

    def of(self, item: Op, sms: int) -> tuple[float, float]:
        """Return the rates of an op and of the exchange on ``sms`` SMs beside it; of its kind's other sizes (medians)
        where it was not measured, 1 where none was."""
        alike = self._rates.get(_sort(item))
        if alike is None:
            kind = [rates for sort, rates in self._rates.items() if sort[0] == item.kind]
            pairs = [_between(by_sms, sms) for rates in kind for by_sms in rates.values()]
            op_rate, exchange_rate = np.median(pairs, axis=0) if pairs else (1.0, 1.0)
        else:
            sizes = sorted(alike)
            pairs = [_between(alike[size], sms) for size in sizes]
            op_rate, exchange_rate = (
                np.interp(np.log(_work(item)), np.log(sizes), [pair[side] for pair in pairs]) for side in (0, 1)
            )
        return float(op_rate), float(exchange_rate)


def _sort(item: Op) -> tuple:
    """Return what ops have in common whose rows alone differ."""
    return item.kind, item.variant, *(size for name, size in item.dims.items() if name not in ROWS)


def _work(item: Op) -> float:
    return item.flop or item.memory_bytes


def _between(by_sms: Mapping[int, Sequence[float]], sms: int) -> list[float]:
    known = sorted(by_sms)
    return [float(np.interp(np.log2(sms), np.log2(known), [by_sms[n][side] for n in known])) for side in (0, 1)]


def summary(found: list[Beside]) -> dict[str, float]:
    """Return how many ops ran beside another, their mean rate, and the mean |difference| to the predicted ones."""
    measured, predicted = (np.array([getattr(one, name) for one in found]) for name in ("measured", "predicted"))
    return {
        "ops": len(found), "measured_rate": float(f"{measured.mean():.3g}"),
        "predicted_rate": float(f"{predicted.mean():.3g}"),
        "mean_difference": float(f"{np.abs(predicted - measured).mean():.3g}"),
    }  # fmt: skip
