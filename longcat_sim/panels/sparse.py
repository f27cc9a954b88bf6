"""From which context does top-k attention pay: a decode step, dense beside sparse, while k and the batch move."""

from __future__ import annotations

from typing import Any

import numpy as np

from longcat_sim.capacity.screen import Times
from longcat_sim.errors import CapacityError
from longcat_sim.panels.base import Control, Panel
from longcat_sim.simulation.step import step_seconds_many
from longcat_sim.specs.scenario import Scenario

CONTEXTS = np.geomspace(1024, 131072, 15)


class SparsePanel(Panel):
    """Step time against context with dense and with top-k attention, same layout and routing."""

    def __init__(self, scenario: Scenario, op_times: Times) -> None:
        if scenario.step is None or scenario.step.phase != "decode" or not scenario.model.index_topk:
            raise CapacityError(
                f"{scenario.where}: expected a decode step of a model with an indexer, such as "
                "deepseek-v3.2-h800-decode; give that one"
            )
        self.scenario, self.op_times = scenario, op_times
        self._dense: dict[float, Any] = {}
        super().__init__([
            Control("index_topk", "keys kept (k)", float(scenario.model.index_topk), 128.0, 16384.0, is_log=True),
            Control("sequences_per_gpu", "sequences per GPU", float(scenario.step.sequences_per_gpu), 2.0, 256.0,
                    is_log=True),
        ])  # fmt: skip

    def _build(self) -> Any:
        import plotly.graph_objects as go

        figure = go.Figure()
        for name, color in (("dense", "#8a94a3"), ("top-k", "#2a6f97")):
            figure.add_scatter(x=[], y=[], mode="lines+markers", name=name, line={"color": color}, marker={"size": 5})
        figure.update_layout(
            height=400, margin={"l": 10, "r": 10, "t": 30, "b": 8},
            xaxis={"type": "log", "title": "context, tokens"}, yaxis={"type": "log", "title": "decode step, ms"},
        )  # fmt: skip
        return figure

    def _seconds(self, index_topk: int, sequences: float) -> Any:
        of = self.scenario.what_if({"model.index_topk": index_topk})
        return step_seconds_many(of, self.op_times(of.hardware), sequences, CONTEXTS)

    def _update(self) -> None:
        kept, sequences = round(self.values["index_topk"]), self.values["sequences_per_gpu"]
        if sequences not in self._dense:
            self._dense[sequences] = self._seconds(0, sequences)
        dense, sparse = self._dense[sequences], self._seconds(kept, sequences)
        for trace, seconds in zip(self.figure.data, (dense, sparse), strict=True):
            trace.x, trace.y = CONTEXTS, seconds * 1e3
        gain = dense / sparse
        faster = np.flatnonzero(gain > 1)
        since = f"faster from about {CONTEXTS[faster[0]]:,.0f} tokens" if len(faster) else "never faster here"
        self.text = f"{kept:,} keys kept: {since}; at {CONTEXTS[-1]:,.0f} tokens a step takes 1/{gain[-1]:.2g} of dense"
