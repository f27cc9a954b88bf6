"""What would other hardware buy: a step on scaled hardware beside today's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from longcat_sim.capacity.paths import number_at
from longcat_sim.capacity.samples import decode_figures, fast_figures
from longcat_sim.capacity.screen import Times
from longcat_sim.errors import CapacityError
from longcat_sim.panels.base import Control, Panel, put
from longcat_sim.panels.knots import Knots
from longcat_sim.panels.overlap import overlaps_of
from longcat_sim.specs.base import ParsedFloat
from longcat_sim.specs.scenario import Scenario

KNOBS = (
    ("memory bandwidth", "hardware.memory_bandwidth"),
    ("scale-up bandwidth", "hardware.scale_up.bandwidth"),
    ("scale-out bandwidth", "hardware.scale_out.bandwidth"),
    ("scale-out latency", "hardware.scale_out.latency"),
    ("price", "price.usd_per_gpu_hour"),
)
SHOWN = (
    ("time per token, ms", "tpot_s", 1e3),
    ("USD per million output tokens", "usd_per_million_output_tokens", 1.0),
    ("tokens/s per GPU", "tokens_per_s_per_gpu", 1.0),
)


class WhatIfPanel(Panel):
    """Factors on hardware figures; bars show each result relative to today (1)."""

    def __init__(self, scenario: Scenario, op_times: Times) -> None:
        if scenario.price.usd_per_gpu_hour is None and scenario.price.owned is None:
            scenario = scenario.what_if({"price.usd_per_gpu_hour": scenario.usd_per_gpu_hour})
        self.scenario, self.op_times = scenario, op_times
        self.paths: dict[str, str] = {}
        knobs = [("peak", f"hardware.peak.{dtype}") for dtype in list(scenario.hardware.peak)[:1]]
        for name, path in (*KNOBS, *knobs):
            try:
                if number_at(scenario, path) > 0:
                    self.paths[name] = path
            except CapacityError:
                continue
        self._knots = Knots()
        self.base = fast_figures(scenario, op_times(scenario.hardware))
        overlaps = overlaps_of(scenario)
        controls = [Control(name, f"{name} ×", 1.0, 0.1, 10.0, is_log=True) for name in self.paths]
        controls.append(Control("overlap", "overlap", scenario.deployment.overlap, choices=overlaps))
        super().__init__(controls)

    def changed(self, factors: Mapping[str, float] | None = None) -> Scenario:
        """Return the scenario that the controls describe, some at other factors."""
        factors = factors or {}
        changes: dict[str, Any] = {}
        for name, path in self.paths.items():
            factor = factors.get(name, self.values[name])
            if factor == 1.0:
                continue
            paths = [path]
            if name == "peak":
                paths = [f"hardware.peak.{dtype}" for dtype in self.scenario.hardware.peak]
            changes |= {p: ParsedFloat(number_at(self.scenario, p) * factor) for p in paths}
        if self.values["overlap"] != self.scenario.deployment.overlap:
            changes["deployment.overlap"] = self.values["overlap"]
        return self.scenario.what_if(changes)

    def _build(self) -> Any:
        import plotly.graph_objects as go

        figure = go.Figure()
        names = [name for name, _, _ in SHOWN]
        today = [_short(self.base[key] * scale) for _, key, scale in SHOWN]
        figure.add_bar(x=names, y=[1.0] * len(names), text=today, name="today", marker={"color": "#8a94a3"})
        figure.add_bar(x=names, y=[1.0] * len(names), name="what if", marker={"color": "#2a6f97"})
        figure.update_layout(
            height=380, barmode="group", yaxis={"title": "relative to today"},
            title="What would it buy?", margin={"l": 10, "r": 10, "t": 48, "b": 8},
        )  # fmt: skip
        return figure

    def _step_s(self) -> float:
        """Return a step's seconds, read between solved factors; the price moves none."""

        def solve(factors: Mapping[str, float]) -> Any:
            of = self.changed(factors)
            return np.array(fast_figures(of, self.op_times(of.hardware))["step_s"])

        hardware = {name: float(self.values[name]) for name in self.paths if name != "price"}
        return float(self._knots.along(hardware, self.moved, self.values["overlap"], solve))

    def _update(self) -> None:
        got = decode_figures(self.scenario, self._step_s())
        rent = self.scenario.price.usd_per_gpu_hour
        if rent is not None and "price" in self.paths:
            paid = self.scenario.usd_per_gpu_hour
            got["usd_per_million_output_tokens"] *= 1 + (self.values["price"] - 1) * rent / paid
        put(
            self.figure.data[1], y=[got[key] / self.base[key] for _, key, _ in SHOWN],
            text=[_short(got[key] * scale) for _, key, scale in SHOWN],
        )  # fmt: skip
        self.text = (
            f"{got['tpot_s'] * 1e3:.3g} ms per token (today {self.base['tpot_s'] * 1e3:.3g}), "
            f"{got['usd_per_million_output_tokens']:.3g} USD per million output tokens "
            f"(today {self.base['usd_per_million_output_tokens']:.3g})"
        )


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
