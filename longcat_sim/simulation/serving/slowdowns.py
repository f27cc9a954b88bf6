"""Slow replicas and a slow KV link: of several slowdowns at once the worst counts; all wait for the slowest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from longcat_sim.simulation.serving.clock import FAULT
from longcat_sim.simulation.serving.replica import DECODE, Replica

if TYPE_CHECKING:
    from longcat_sim.simulation.serving.cluster import Cluster


class Slowdowns:
    """Factors in force, by replica; None stands for the KV link between the pools."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.factors: dict[Replica | None, list[float]] = {}

    def of(self, which: Replica | None) -> float:
        """Return the factor on the step times of a replica, or on the transfer times of the link."""
        return max(self.factors.get(which, ()), default=1.0)

    def add(self, which: Replica | None, slowdown: float, end: int | None) -> None:
        """Slow the steps, or the transfers, that start from now on until ``end`` (None: for ever)."""
        self.factors.setdefault(which, []).append(slowdown)
        self._changed(which)

        def over(_: Any) -> None:
            self.factors[which].remove(slowdown)
            self._changed(which)

        if end is not None:
            self.cluster.at(end, FAULT, over)

    def _changed(self, which: Replica | None) -> None:
        if which is not None:
            which.slowdown = self.of(which)
            if which.phase == DECODE:
                which.poke(self.cluster.env._now)  # type: ignore[arg-type]
