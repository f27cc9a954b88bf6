"""Data-parallel ranks that share experts: every step of one waits for all, and idle ranks run along empty."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from longcat_sim.simulation.serving.published_loads import BalancerRules, Load, PublishedLoads
from longcat_sim.simulation.serving.replica import IDLE, Replica
from longcat_sim.simulation.serving.request import NEVER

if TYPE_CHECKING:
    from longcat_sim.simulation.serving.cluster import Cluster


class Lockstep:
    """Lets its members decide together at common boundaries and gives their steps one common time."""

    def __init__(self, cluster: Cluster, members: Sequence[Replica], rules: BalancerRules) -> None:
        self.cluster = cluster
        self.members = list(members)
        self.loads = PublishedLoads(len(members), rules)
        self.times: Any = members[0].times
        self.is_async = members[0].is_async
        self.shapes: dict[Replica, tuple[list[int], Sequence[tuple[int, int]]]] = {}
        self.ends = -1
        self.started = 0
        self.steps = 0
        self.is_composing = False
        for member in members:
            assert member.is_detailed
            member.group = self

    def offer(self, member: Replica, chunks: Sequence[tuple[int, int]]) -> int:
        """Take the shape of a member's next step; its time is not known until all have decided."""
        self.shapes[member] = (member.contexts(), list(chunks))
        return 0

    def compose_soon(self) -> None:
        """Let all members decide at this instant, or at the end of the step that is under way."""
        now: int = self.cluster.env._now  # type: ignore[assignment]
        if self.is_composing or now < self.ends:
            return
        self.is_composing = True
        self.cluster.at(now, (5 << 40) + self.members[0].order, self._compose)

    def _compose(self, _: Any) -> None:
        now: int = self.cluster.env._now  # type: ignore[assignment]
        self.is_composing = False
        self.shapes.clear()
        has_ended = self.ends == now
        joined = self.started if has_ended else now
        if has_ended and not self.is_async:  # a rank reports before it decides what comes next
            self._report(now, joined)
        for member in self.members:
            member.cutoff = joined if self.is_async else now
            if member.phase == IDLE and member.is_up:
                member.compose(now)
        if self.is_async:  # what comes next was decided while the last step ran
            self._report(now, joined)
        self.steps += 1
        if self.loads.rules.counts_arrivals:
            self._report(now, now)
        if not self.shapes:
            members = [m for m in self.members if m.waiting]
            if members and has_ended:  # nothing was left to run: the decision is taken now
                for member in members:
                    member.ghosts = member.ghost_blocks = 0
                self.ends = -1
                self.compose_soon()
            return
        duration = self.times.group_step_ns([self.shapes.get(member, ((), ())) for member in self.members])
        self.started, self.ends = now, now + duration
        for member in self.shapes:
            member.set_duration(duration, now)

    def _report(self, now: int, joined: int) -> None:
        """Let every member report what waits there since ``joined`` or was thrown out of its batch, and what runs."""
        for member in self.members:
            waiting = sum(request.queued <= joined or request.scheduled != NEVER for request in member.waiting)
            self.loads.report(now, self.steps, member.index, Load(waiting, member.num_running, member.cache_use))
