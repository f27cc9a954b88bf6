"""How ops that run at once on one GPU slow each other: the share law that lanes apply.

A law gets the ops that run at once and returns their rates (1: as fast as alone). It is pure, so rates are memoised by
the set of running ops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from longcat_sim.ops.op import ResourceShares

SLOWEST = 0.01
"""Least rate of an op: blocks of one kernel that fills the device leave gaps for another (assumed)."""


class Running(NamedTuple):
    """What a law knows of a running op."""

    kind: str
    shares: ResourceShares
    is_collective: bool = False


class ContentionLaw(Protocol):
    """Rates of ops that run at once."""

    def rates(self, running: Sequence[Running]) -> tuple[float, ...]:
        """Return the rate of each op, 0..1 of its speed alone."""
        ...


@dataclass(frozen=True)
class NoContention:
    """Ops never slow each other: the law that other tools assume."""

    def rates(self, running: Sequence[Running]) -> tuple[float, ...]:
        """Return 1 for every op."""
        return (1.0,) * len(running)


@dataclass(frozen=True)
class MaxMin:
    """Each resource is shared max-min fairly; an op runs at the rate of its scarcest resource.

    An op that one resource holds back asks for less of the others, so shares are settled in rounds. Thread blocks of a
    collective stay on their SMs until it ends, so a collective keeps the SMs that it asked for.

    Measured on an H100 (``validate --section gpu-campaign``): products beside an exchange on 1, 4, 16 SMs run at 0.93,
    0.82, 0.65 of their speed (this law: 1.0, 0.95, 0.59), the exchange beside them at 0.75, 0.67, 0.58 (this law: 1.0).
    Its few SMs ask for little memory, but each waits longer for it; published training traces say 0.57 and 0.77 too
    (``calibration.collectives.OVERLAP_RATES``). Two kernels that both fill all SMs share one GPU's worth, whatever they
    are bound by: the rates of such pairs add up to 1.0 (a product and a pass).

    Source: max-min fairness, Bertsekas and Gallager, Data Networks, section 6.5.2; that collectives keep their SMs:
    the 20 and 112 of 132 SMs of deepseek-ai/profile-data train.json.
    """

    rounds: int = 8

    def rates(self, running: Sequence[Running]) -> tuple[float, ...]:
        """Return the rate of each op."""
        if len(running) == 1:
            return (1.0,)
        count, resources = len(running), range(len(ResourceShares._fields))
        limits = [[1.0] * count for _ in resources]
        for _ in range(self.rounds):
            before = [list(limit) for limit in limits]
            for resource in resources:
                wants = [op.shares[resource] for op in running]
                if sum(wants) <= 1.0 + 1e-12:
                    continue
                # held back elsewhere, an op asks for less here; but a collective keeps the SMs that it holds
                first = [op.is_collective and resource == 0 for op in running]
                asks = [
                    want if held else want * min(limits[other][i] for other in resources if other != resource)
                    for i, (want, held) in enumerate(zip(wants, first, strict=True))
                ]
                given = _max_min(asks, first)
                limits[resource] = [
                    1.0 if got >= ask - 1e-12 else got / want for want, ask, got in zip(wants, asks, given, strict=True)
                ]
            if before == limits:
                break
        return tuple(max(SLOWEST, min(limits[resource][i] for resource in resources)) for i in range(count))


def _max_min(asks: Sequence[float], first: Sequence[bool]) -> list[float]:
    """Return the share of each op: those in ``first`` get theirs, the rest is divided max-min fairly."""
    given = [ask if held else 0.0 for ask, held in zip(asks, first, strict=True)]
    total = sum(given)
    if total > 1.0:
        return [g / total for g in given]
    left = 1.0 - total
    rest = sorted((i for i, held in enumerate(first) if not held), key=lambda i: asks[i])
    for at, i in enumerate(rest):
        given[i] = min(asks[i], left / (len(rest) - at))
        left -= given[i]
    return given


@dataclass(frozen=True)
class MeasuredLaw:
    """Measured rates of pairs of kinds, with another law for what was not measured.

    ``pairs`` maps (kind, other kind) to the rate of the first while the second runs; ``collective_rates`` maps a
    collective's kind to its rate beside any compute.
    """

    pairs: Mapping[tuple[str, str], float] = field(default_factory=dict, hash=False)
    collective_rates: Mapping[str, float] = field(default_factory=dict, hash=False)
    otherwise: ContentionLaw = field(default_factory=MaxMin)

    def rates(self, running: Sequence[Running]) -> tuple[float, ...]:
        """Return the rate of each op: the slowest of what was measured beside any other, else the other law's."""
        if len(running) == 1:
            return (1.0,)
        found = list(self.otherwise.rates(running))
        for i, op in enumerate(running):
            others = [other for j, other in enumerate(running) if j != i]
            measured = [self.pairs[op.kind, other.kind] for other in others if (op.kind, other.kind) in self.pairs]
            if op.kind in self.collective_rates and any(not other.is_collective for other in others):
                measured.append(self.collective_rates[op.kind])
            if measured:
                found[i] = min(measured)
        return tuple(found)


def contention_law(name: str | ContentionLaw) -> ContentionLaw:
    """Return a law by name (``max_min`` or ``off``) or the given law."""
    if not isinstance(name, str):
        return name
    laws: dict[str, ContentionLaw] = {"max_min": MaxMin(), "off": NoContention()}
    if name not in laws:
        raise ValueError(f"contention: expected one of {', '.join(laws)}; got {name!r}; choose one of these")
    return laws[name]
