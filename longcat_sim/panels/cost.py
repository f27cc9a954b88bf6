"""What does a token cost: price against speed while price, utilisation, context and acceptance move."""

from __future__ import annotations

from typing import Any

import numpy as np

from longcat_sim.capacity.candidates import room_of
from longcat_sim.capacity.samples import curve
from longcat_sim.capacity.screen import Times
from longcat_sim.errors import CapacityError
from longcat_sim.figures.cost import cost_figure
from longcat_sim.panels.base import Control, Panel
from longcat_sim.specs.scenario import Scenario

BATCHES = np.unique(np.round(np.geomspace(1, 512, 28)))


class CostPanel(Panel):
    """USD per million output tokens against tokens/s of a user, by batch; the chosen batch is marked."""

    def __init__(self, scenario: Scenario, op_times: Times) -> None:
        if scenario.step is None or scenario.step.phase != "decode":
            raise CapacityError(f"{scenario.where}: step: expected a decode step for this panel; add one")
        self.scenario, self.op_times = scenario, op_times
        self._curves: dict[Any, Any] = {}
        step, speculative = scenario.step, scenario.speculative
        controls = [
            Control("usd_per_gpu_hour", "USD per GPU-hour", scenario.usd_per_gpu_hour, 0.1, 20.0, 0.05),
            Control("utilisation", "utilisation", scenario.price.utilisation, 0.05, 1.0, 0.05),
            Control("sequences_per_gpu", "sequences per GPU", float(step.sequences_per_gpu), 1.0, 512.0, is_log=True),
            Control("context_tokens", "context, tokens", float(step.context_tokens), 128.0, 131072.0, is_log=True),
        ]
        if speculative.acceptance:
            controls.append(Control("acceptance", "draft acceptance", speculative.acceptance[0], 0.0, 1.0, 0.01))
        super().__init__(controls)

    def _build(self) -> Any:
        empty: dict[str, list[float]] = {
            "tokens_per_s_per_user": [], "usd_per_million_output_tokens": [], "sequences_per_gpu": [],
        }  # fmt: skip
        figure = cost_figure({self.scenario.hardware.name: empty})
        figure.add_scatter(
            x=[], y=[], mode="markers", marker={"size": 14, "symbol": "star", "color": "#d1495b"}, name="chosen batch"
        )
        return figure

    def _curve(self) -> Any:
        """Return the curve at the present context and acceptance; price and utilisation only scale it."""
        context = round(self.values["context_tokens"])
        key = (context, self.values.get("acceptance"))
        if key not in self._curves:
            changes: dict[str, Any] = {"step.context_tokens": context}
            if "acceptance" in self.values:
                rate = float(self.values["acceptance"])
                changes["speculative.acceptance"] = [rate] * self.scenario.speculative.draft_tokens
            of = self.scenario.what_if(changes)
            fitting = BATCHES[room_of(of, context) >= BATCHES]
            if not len(fitting):
                raise CapacityError(f"no sequence of {context} tokens fits in memory; shorten the context")
            self._curves[key] = curve(of, self.op_times(of.hardware), fitting)
        return self._curves[key]

    def _update(self) -> None:
        made = self._curve()
        base = self.scenario.usd_per_gpu_hour / self.scenario.price.utilisation
        factor = self.values["usd_per_gpu_hour"] / self.values["utilisation"] / base
        usd = made["usd_per_million_output_tokens"] * factor
        line, star = self.figure.data
        line.x, line.y, line.customdata = made["tokens_per_s_per_user"], usd, made["sequences_per_gpu"]
        batches = made["sequences_per_gpu"]
        at = min(max(self.values["sequences_per_gpu"], batches[0]), batches[-1])
        step_s = float(np.interp(at, batches, made["step_s"]))
        rate = float(np.interp(at, batches, made["step_s"] / made["tpot_s"])) / step_s
        chosen = self.values["usd_per_gpu_hour"] / 3600 / self.values["utilisation"] / (at * rate) * 1e6
        star.x, star.y = [rate], [chosen]
        self.text = (
            f"{chosen:.3g} USD per million output tokens at {rate:.3g} tokens/s per user, {at:.0f} sequences per GPU"
            + (f" (memory holds {batches[-1]:.0f} at most)" if at < self.values["sequences_per_gpu"] else "")
        )
