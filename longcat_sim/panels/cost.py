"""What does a token cost: price against speed while price, utilisation, context and acceptance move."""

from __future__ import annotations

from typing import Any

import numpy as np

from longcat_sim.capacity.candidates import room_of
from longcat_sim.capacity.screen import Times, figures_of
from longcat_sim.errors import CapacityError
from longcat_sim.figures.cost import cost_figure
from longcat_sim.panels.base import Control, Panel, put
from longcat_sim.panels.knots import Knots
from longcat_sim.simulation.step import step_seconds_many
from longcat_sim.specs.deployment import Speculative
from longcat_sim.specs.scenario import Scenario

BATCHES = np.unique(np.round(np.geomspace(1, 512, 28)))


class CostPanel(Panel):
    """USD per million output tokens against tokens/s of a user, by batch; the chosen batch is marked."""

    def __init__(self, scenario: Scenario, op_times: Times) -> None:
        if scenario.step is None or scenario.step.phase != "decode":
            raise CapacityError(f"{scenario.where}: step: expected a decode step for this panel; add one")
        self.scenario, self.op_times = scenario, op_times
        self._knots = Knots()
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
        """Return the curve at the present context and acceptance.

        A step's time is solved at twelve contexts a decade and read between them; drafts are verified
        whether they are accepted or not, so acceptance, price and utilisation do not change it.
        """
        context, of = float(round(self.values["context_tokens"])), self.scenario
        batches = BATCHES[room_of(of, context) >= BATCHES]
        if not len(batches):
            raise CapacityError(f"no sequence of {context:.0f} tokens fits in memory; shorten the context")

        def solve(tokens: float) -> Any:
            return step_seconds_many(of, self.op_times(of.hardware), BATCHES, tokens)

        step_s = self._knots.read("context", context, solve)[: len(batches)]
        per_step = of.speculative.tokens_per_step
        if "acceptance" in self.values:
            accepted = (float(self.values["acceptance"]),) * of.speculative.draft_tokens
            per_step = Speculative(draft_tokens=of.speculative.draft_tokens, acceptance=accepted).tokens_per_step
        made = figures_of(of, batches, step_s * (of.speculative.tokens_per_step / per_step))
        return {**made, "step_s": step_s}

    def _update(self) -> None:
        made = self._curve()
        base = self.scenario.usd_per_gpu_hour / self.scenario.price.utilisation
        factor = self.values["usd_per_gpu_hour"] / self.values["utilisation"] / base
        usd = made["usd_per_million_output_tokens"] * factor
        line, star = self.figure.data
        put(line, x=made["tokens_per_s_per_user"], y=usd, customdata=made["sequences_per_gpu"])
        batches = made["sequences_per_gpu"]
        at = min(max(self.values["sequences_per_gpu"], batches[0]), batches[-1])
        step_s = float(np.interp(at, batches, made["step_s"]))
        rate = float(np.interp(at, batches, made["step_s"] / made["tpot_s"])) / step_s
        chosen = self.values["usd_per_gpu_hour"] / 3600 / self.values["utilisation"] / (at * rate) * 1e6
        put(star, x=[rate], y=[chosen])
        self.text = (
            f"{chosen:.3g} USD per million output tokens at {rate:.3g} tokens/s per user, {at:.0f} sequences per GPU"
            + (f" (memory holds {batches[-1]:.0f} at most)" if at < self.values["sequences_per_gpu"] else "")
        )
