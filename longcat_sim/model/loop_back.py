"""``LoopBack``: an expert-parallel layer on one GPU, whose exchanges leave and come back on a stream of their own.

All experts are here, so that dispatch and combine move rows to where they are: a copy by few SMs, as the kernels of a
real exchange are; the fewer SMs, the longer it takes. The order of the segments and what waits for what is the schedule
data that the simulator follows. The host never waits, so that a CUDA graph can hold the step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longcat_sim.model.few_sms import copy_by_few
from longcat_sim.model.layer import Layer, LayerState, Step
from longcat_sim.model.links import EXCHANGE_PRIORITY
from longcat_sim.model.longcat import LongcatFlash
from longcat_sim.model.moe import gather_rows, row_ends, scatter_rows, sort_rows, zero_experts
from longcat_sim.ops.schedules import schedule


class LoopBack:
    """Runs ``model`` by a schedule of one part, exchanges on ``sms`` SMs; put in with ``with LoopBack(...):``.

    ``moves=False`` leaves the exchanges' copies out: the compute alone, of the same rows.
    """

    def __init__(self, model: LongcatFlash, how: str, sms: int, *, moves: bool = True) -> None:
        self.model, self.sms, self.moves = model, sms, moves
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
            extra["received"] = self._moved(extra["send"])
        elif segment == "experts":
            extra["result"] = layer.experts.products(extra["received"], extra["ends"])
        elif segment == "combine":
            extra["back"] = self._moved(extra["result"])
        elif segment == "add":
            state.moe_TH = zero_experts(state.n0_TH, state.routing, experts)
            scatter_rows(extra["back"], state.rows, extra["ends"], state.moe_TH)
            layer.add(state, step)
        else:
            layer.segments[segment](state, step)

    def _moved(self, rows_NH: Tensor) -> Tensor:
        if not self.moves:
            return rows_NH
        moved = torch.empty_like(rows_NH)
        copy_by_few(rows_NH, moved, self.sms)
        return moved
