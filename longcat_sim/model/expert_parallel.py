"""Expert parallelism for real: each rank holds a range of experts, tokens travel by uneven all-to-all.

The order of a layer's segments, and what waits for what, is the schedule data that the simulator follows too
(``ops.schedules``); dispatch and combine are asynchronous collectives. Shape letters: see ``layers.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from longcat_sim.errors import ModelError
from longcat_sim.model.layer import Layer, LayerState, Step
from longcat_sim.model.links import PacedLink
from longcat_sim.model.longcat import LongcatFlash
from longcat_sim.model.moe import Rows, sort_rows, zero_experts
from longcat_sim.ops.schedules import COMMUNICATION, Schedule, schedule
from longcat_sim.records.span import Span

Mode = Literal["full", "compute", "communication"]


def expert_range(n_routed_experts: int, rank: int, num_ranks: int) -> range:
    """Return the experts of ``rank``: equal runs in order.

    Raises:
        ModelError: ``num_ranks`` does not divide the experts.
    """
    if num_ranks < 1 or n_routed_experts % num_ranks:
        good = [n for n in range(1, n_routed_experts + 1) if n_routed_experts % n == 0]
        raise ModelError(
            f"ep_size must divide n_routed_experts: {n_routed_experts} % {num_ranks} = "
            f"{n_routed_experts % num_ranks if num_ranks > 0 else 'undefined'}; try one of {', '.join(map(str, good))}"
        )
    each = n_routed_experts // num_ranks
    return range(rank * each, (rank + 1) * each)


@dataclass
class Exchange:
    """What one layer's exchange moved: kept so that its parts can be run again alone."""

    sent: list[int]
    """Rows to each rank."""
    received: list[int]
    """Rows from each rank."""
    rows: Rows
    expert_order_N: Tensor
    """Order of the received rows by expert."""
    expert_counts: list[int]
    payload: Tensor | None = None


@dataclass
class Pending:
    """An all-to-all under way."""

    output: Tensor
    layer: int
    name: str
    lane: str
    start_s: float
    moved_bytes: int
    turn: int
    work: Any = None
    done_s: list[float] = field(default_factory=list)


class ExpertParallel:
    """Runs ``model``, which holds this rank's experts, by a schedule; put in with ``with ExpertParallel(...):``."""

    def __init__(
        self,
        model: LongcatFlash,
        how: str | Schedule = "sbo",
        *,
        group: Any = None,
        link: PacedLink | None = None,
        who_is_gone: Callable[[], list[int]] | None = None,
    ) -> None:
        """Check that the schedule can be run and that the model holds this rank's experts.

        Raises:
            ScheduleError: an unknown schedule, one in parts, or one with a cycle or a missing segment.
            ModelError: ranks that do not divide the experts, or other experts held.
        """
        self.model, self.group, self.link = model, group, link
        self.rank, self.num_ranks = dist.get_rank(group), dist.get_world_size(group)
        self.who_is_gone = who_is_gone
        needed = expert_range(model.spec.n_routed_experts, self.rank, self.num_ranks)
        if model.held_experts != needed:
            raise ModelError(
                f"rank {self.rank}: expected a model that holds experts {needed.start}..{needed.stop - 1}; got "
                f"{model.held_experts.start}..{model.held_experts.stop - 1}; build it with experts=expert_range(...)"
            )
        self.mode: Mode = "full"
        self.spans: list[Span] = []
        self.moved: dict[str, list[int]] = {"dispatch": [], "combine": []}
        """Bytes per exchange: dispatch, sent by this rank; combine, received by it (its own rows included)."""
        self.off_rank: dict[str, list[int]] = {"dispatch": [], "combine": []}
        """The same without the rows that stay on this rank."""
        self._kept: dict[int, Exchange] = {}
        self._turn = 0
        self.follow(how)

    def follow(self, how: str | Schedule) -> None:
        """Change the schedule."""
        self.schedule = schedule(how, "longcat") if isinstance(how, str) else how
        self._launches = self.schedule.launches()
        self._lane = {launch.segment: launch.lane for launch in self._launches}

    def __enter__(self) -> ExpertParallel:
        self.model.layer_runner = self.run_layer
        return self

    def __exit__(self, *_: object) -> None:
        self.model.layer_runner = None

    def clear(self) -> None:
        """Forget spans and byte counts."""
        self.spans, self.moved, self.off_rank = [], {"dispatch": [], "combine": []}, {"dispatch": [], "combine": []}

    def run_layer(self, layer: Layer, x_TH: Tensor, step: Step) -> Tensor:
        """Return the layer's output [T, H], its segments launched in the schedule's order."""
        state, pending = LayerState(x_TH), dict[str, Pending]()
        only_talk = self.mode == "communication"
        for segment, _, waits in self._launches:
            for needed in waits:
                if needed in pending:
                    self._finish(pending.pop(needed))
            start_s = time.perf_counter()
            if segment == "dispatch":
                self._dispatch(layer, state, pending)
            elif segment == "combine":
                self._combine(layer, state, pending)
            elif only_talk:
                continue
            elif segment == "experts":
                self._experts(layer, state)
            elif segment == "add":
                self._add(layer, state)
            else:
                layer.segments[segment](state, step)
            if segment not in COMMUNICATION:
                self._span(segment, layer.index, start_s, time.perf_counter())
        for left in pending.values():
            self._finish(left)
        return state.x_TH

    # --- segments ----------------------------------------------------------------------------------------------

    def _dispatch(self, layer: Layer, state: LayerState, pending: dict[str, Pending]) -> None:
        """Sort and gather the rows, agree on counts (span ``plan``, on the processor), and let the rows go."""
        start_s = time.perf_counter()
        kept = self._kept.get(layer.index)
        if self.mode == "communication":
            assert kept is not None
            state.extra["exchange"], state.extra["send"] = kept, kept.payload
        else:
            rows = sort_rows(state.routing, self.model.spec.n_routed_experts)
            if self.mode == "full":
                kept = self._plan(rows, state.n0_TH.device)
                self._kept[layer.index] = kept
            assert kept is not None
            state.extra["exchange"] = kept
            state.extra["send"] = state.n0_TH.index_select(0, rows.token_N[: sum(kept.sent)])
        width = state.extra["send"].shape[1]
        received = state.extra["send"].new_empty(sum(kept.received), width)
        state.extra["received"] = received
        if self.mode == "compute":
            received.normal_()
            return
        kept.payload = state.extra["send"]
        if self.mode == "full":
            self.spans.append(Span("plan", "compute", start_s, time.perf_counter(), self.rank, layer.index))
        pending["dispatch"] = self._launch(
            "dispatch", layer.index, received, state.extra["send"], kept.received, kept.sent
        )

    def _plan(self, rows: Rows, device: torch.device) -> Exchange:
        """Exchange the counts of rows per expert and return who sends what."""
        counts = rows.counts if isinstance(rows.counts, list) else rows.counts.tolist()
        mine = torch.tensor(counts, device=device).view(self.num_ranks, -1)
        theirs = torch.empty_like(mine)
        self._guard("dispatch (counts)", lambda: dist.all_to_all_single(theirs, mine, group=self.group))
        local = theirs.shape[1]
        expert_N = torch.arange(local, device=device).repeat(self.num_ranks).repeat_interleave(theirs.view(-1))
        return Exchange(
            mine.sum(1).tolist(),
            theirs.sum(1).tolist(),
            rows,
            expert_N.argsort(stable=True),
            theirs.sum(0).tolist(),
        )

    def _experts(self, layer: Layer, state: LayerState) -> None:
        kept: Exchange = state.extra["exchange"]
        received = state.extra["received"]
        ones = torch.ones(len(received), device=received.device)
        counts: Any = kept.expert_counts
        if received.device.type != "cpu":
            counts = torch.tensor(counts, device=received.device)
        rows = Rows(kept.expert_order_N, ones, counts)
        state.extra["result"] = layer.experts(received, rows, torch.zeros_like(received))

    def _combine(self, layer: Layer, state: LayerState, pending: dict[str, Pending]) -> None:
        kept: Exchange = state.extra["exchange"]
        result = state.extra["received"] if self.mode == "communication" else state.extra["result"]
        back = result.new_empty(sum(kept.sent), result.shape[1])
        state.extra["back"] = back
        if self.mode == "compute":
            back.zero_()
            return
        pending["combine"] = self._launch("combine", layer.index, back, result, kept.sent, kept.received)

    def _add(self, layer: Layer, state: LayerState) -> None:
        kept: Exchange = state.extra["exchange"]
        total = sum(kept.sent)
        back = state.extra["back"]
        state.moe_TH = zero_experts(state.n0_TH, state.routing, self.model.spec.n_routed_experts)
        state.moe_TH.index_add_(
            0, kept.rows.token_N[:total], back.mul_(kept.rows.weight_N[:total, None].to(back.dtype))
        )
        state.x_TH = state.h_TH + state.moe_TH

    # --- collectives -------------------------------------------------------------------------------------------

    def _launch(
        self, name: str, layer: int, output: Tensor, data: Tensor, out_rows: list[int], in_rows: list[int]
    ) -> Pending:
        row = data.shape[1] * data.element_size()
        counted = in_rows if name == "dispatch" else out_rows
        self.moved[name].append(sum(counted) * row)
        self.off_rank[name].append((sum(counted) - counted[self.rank]) * row)
        self._turn += 1
        turn = self._turn
        start_s = time.perf_counter()
        if self.link is not None:
            self.link.launched(self.rank, turn)
        away = max(sum(in_rows) - in_rows[self.rank], sum(out_rows) - out_rows[self.rank])
        pending = Pending(output, layer, name, self._lane[name], start_s, away * row, turn)

        def start() -> None:
            pending.work = dist.all_to_all_single(output, data, out_rows, in_rows, group=self.group, async_op=True)

        self._guard(name, start)
        if output.device.type == "cpu":
            pending.work.get_future().then(lambda _: pending.done_s.append(time.perf_counter()))
        return pending

    def _finish(self, pending: Pending) -> None:
        self._guard(pending.name, pending.work.wait)
        end_s = pending.done_s[0] if pending.done_s else time.perf_counter()
        if self.link is not None:
            end_s = max(end_s, self.link.wait(pending.turn, pending.moved_bytes))
        self._span(pending.name, pending.layer, pending.start_s, end_s)

    def _span(self, name: str, layer: int, start_s: float, end_s: float) -> None:
        """Record a span; host times, which on a GPU are those of the launch."""
        self.spans.append(Span(name, self._lane[name], start_s, end_s, self.rank, layer))

    def _guard(self, what: str, call: Callable[[], Any]) -> None:
        """Run a collective; say which ranks are gone when it fails."""
        try:
            call()
        except RuntimeError as error:
            gone = self.who_is_gone() if self.who_is_gone is not None else []
            names = ", ".join(f"rank {rank}" for rank in gone) or "unknown which (no heartbeat)"
            raise ModelError(
                f"rank {self.rank}: {what}: expected all {self.num_ranks} ranks to take part; gone: {names}; "
                f"restart the run ({str(error).splitlines()[0][:160]})"
            ) from error
