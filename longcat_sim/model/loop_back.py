"""``LoopBack``: an expert-parallel layer on one GPU, whose exchanges leave and come back on a stream of their own.

All experts are here, so that dispatch and combine have nowhere to go. Two sorts stand for what exchanges do to a GPU:
``by_few`` copies the rows on a few SMs, as kernels of an exchange do; ``paced`` lets time pass and the rows lie, as
when the network cards move them. The order of the segments and what waits for what is the schedule data that the
simulator follows. The host never waits, so that a CUDA graph can hold the step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longcat_sim.model.few_sms import copy_by_few
from longcat_sim.model.layer import Layer, LayerState, Step
from longcat_sim.model.links import EXCHANGE_PRIORITY
from longcat_sim.model.longcat import LongcatFlash
from longcat_sim.model.moe import gather_rows, row_ends, scatter_rows, sort_rows, zero_experts
from longcat_sim.ops.schedules import schedule

Exchange = Callable[[Tensor], Tensor]
CYCLES_PER_S = 1.98e9
"""SM clock of an H100 under load; what a pace really takes is measured."""


def by_few(sms: int) -> Exchange:
    """Return an exchange that copies the rows with ``sms`` SMs."""

    def move(rows_NH: Tensor) -> Tensor:
        moved = torch.empty_like(rows_NH)
        copy_by_few(rows_NH, moved, sms)
        return moved

    return move


def paced(pace_s: float) -> Exchange:
    """Return an exchange that takes ``pace_s`` and moves nothing: one warp waits."""

    def wait(rows_NH: Tensor) -> Tensor:
        torch.cuda._sleep(int(pace_s * CYCLES_PER_S))
        return rows_NH

    return wait


class LoopBack:
    """Runs ``model`` by a schedule of one part; ``exchange`` takes rows [N, H] and returns them on the other side.

    Put in with ``with LoopBack(...):``.
    """

    def __init__(self, model: LongcatFlash, how: str, exchange: Exchange) -> None:
        self.model, self.exchange = model, exchange
        self.schedule = schedule(how, "longcat")
        self._launches = self.schedule.launches()
        self._side = torch.cuda.Stream(model.device, priority=EXCHANGE_PRIORITY)

    def __enter__(self) -> LoopBack:
        self.model.layer_runner = self.run_layer
        return self

    def __exit__(self, *_: object) -> None:
        self.model.layer_runner = None

    def run_layer(self, layer: Layer, x_TH: Tensor, step: Step) -> Tensor:
        """Return the layer's output [T, H], its segments launched in the schedule's order."""
        state = LayerState(x_TH)
        main = torch.cuda.current_stream()
        self._side.wait_stream(main)
        done: dict[str, torch.cuda.Event] = {}
        for launch in self._launches:
            stream = main if launch.lane == "compute" else self._side
            for needed in launch.waits:
                stream.wait_event(done[needed])
            with torch.cuda.stream(stream):
                self._run(launch.segment, layer, state, step)
            done[launch.segment] = stream.record_event()
        main.wait_stream(self._side)
        return state.x_TH

    def _run(self, segment: str, layer: Layer, state: LayerState, step: Step) -> None:
        """Run one segment on the current stream; the rows are sorted and gathered behind the router."""
        extra, experts = state.extra, self.model.spec.n_routed_experts
        if segment == "router":
            layer.route(state, step)
            state.rows = sort_rows(state.routing, experts)
            extra["ends"] = row_ends(state.rows)
            extra["send"] = gather_rows(state.n0_TH, state.rows)
        elif segment == "dispatch":
            extra["received"] = self.exchange(extra["send"])
        elif segment == "experts":
            extra["result"] = layer.experts.products(extra["received"], extra["ends"])
        elif segment == "combine":
            extra["back"] = self.exchange(extra["result"])
        elif segment == "add":
            state.moe_TH = zero_experts(state.n0_TH, state.routing, experts)
            scatter_rows(extra["back"], state.rows, extra["ends"], state.moe_TH)
            layer.add(state, step)
        else:
            layer.segments[segment](state, step)
