"""What hides behind what: a layer's timeline while batch, context, link bandwidth and schedule move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from longcat_sim.capacity.screen import Times
from longcat_sim.errors import UserError
from longcat_sim.figures.timeline import COLORS, GROUPS
from longcat_sim.ops.attention import StepSize
from longcat_sim.ops.graph import step_graph
from longcat_sim.ops.op import FloatArray, OpTimesLike
from longcat_sim.ops.schedules import SCHEDULES
from longcat_sim.panels.base import Control, Panel, put
from longcat_sim.panels.knots import Knots
from longcat_sim.simulation.lanes import LaneEngine, Timeline
from longcat_sim.simulation.load import typical_load
from longcat_sim.simulation.program import build_program
from longcat_sim.simulation.step import check_step, law_of, recorded_trace, slowest_context, step_size
from longcat_sim.specs.base import ParsedFloat
from longcat_sim.specs.scenario import Scenario

LAYERS = 3
"""Layers that are solved; the middle one is shown."""


def overlaps_of(scenario: Scenario) -> tuple[str, ...]:
    """Return the schedules that the model's layers know; the present one first."""
    known = [name for name, layer in SCHEDULES if layer == scenario.model.layer_kind]
    now = scenario.deployment.overlap
    return tuple(dict.fromkeys([now, *known]))


def steady_layers(scenario: Scenario, op_times: OpTimesLike) -> Timeline:
    """Return a few layers of the scenario's step, solved on the busiest rank alone by the event engine.

    Raises:
        UserError: a step that the model or the schedule does not allow.
    """
    size: StepSize = step_size(scenario)
    check_step(scenario, size)
    if size.phase == "decode":
        size = replace(size, context=slowest_context(scenario, size.sequences, size.context))
    model, deployment = scenario.model, scenario.deployment
    load = None
    if model.num_moe_layers:
        domain = scenario.hardware.domain_size
        rows = float(size.rows) * (deployment.tp_size if deployment.ep_size == 1 else 1)
        load = typical_load(
            model, deployment, scenario.routing, np.array([rows]), seed=scenario.seed, domain=domain,
            trace=recorded_trace(scenario),
        )  # fmt: skip
    blocks = step_graph(model, deployment, size, load, 0)
    longest = max((block for block in blocks if block.schedule is not None), key=lambda block: block.count)
    few = replace(longest, count=min(longest.count, LAYERS), first_layer=0)
    program = build_program([few], op_times, draws=1, ranks=1)
    return LaneEngine(program, law_of(scenario, op_times, "max_min")).run()


class OverlapPanel(Panel):
    """The timeline of one layer in steady state: one bar trace per group of ops, moved in place."""

    def __init__(self, scenario: Scenario, op_times: Times) -> None:
        self.scenario, self.op_times = scenario, op_times
        self._knots = Knots()
        self._bars: dict[str, list[tuple[str, str, str]]] = {}
        """Schedule -> (group, lane, name) of each op of a layer"""
        step = scenario.step
        controls = []
        if step is not None and step.phase == "decode":
            controls += [
                Control(
                    "sequences_per_gpu", "sequences per GPU", float(step.sequences_per_gpu), 2.0, 512.0, is_log=True
                ),
                Control("context_tokens", "context, tokens", float(step.context_tokens), 128.0, 131072.0, is_log=True),
            ]
        link = scenario.hardware.scale_out or scenario.hardware.scale_up
        if link is not None:
            gb = link.bandwidth / 1e9
            controls.append(Control("link_gb_per_s", "link, GB/s per GPU", gb, gb / 10, gb * 10, is_log=True))
        controls.append(Control("overlap", "schedule", scenario.deployment.overlap, choices=overlaps_of(scenario)))
        super().__init__(controls)

    def changed(self, values: Mapping[str, float] | None = None) -> Scenario:
        """Return the scenario that the controls describe, some at other values."""
        now = {**self.values, **(values or {})}
        changes: dict[str, Any] = {"deployment.overlap": now["overlap"]}
        for name in ("sequences_per_gpu", "context_tokens"):
            if name in now:
                changes[f"step.{name}"] = now[name]
        if "link_gb_per_s" in now and now["link_gb_per_s"] != self.controls["link_gb_per_s"].value:
            name = "scale_out" if self.scenario.hardware.scale_out is not None else "scale_up"
            changes[f"hardware.{name}.bandwidth"] = ParsedFloat(now["link_gb_per_s"] * 1e9)
        return self.scenario.what_if(changes)

    def _build(self) -> Any:
        import plotly.graph_objects as go

        figure = go.Figure()
        for group, color in COLORS.items():
            figure.add_bar(
                base=[], x=[], y=[], orientation="h", name=group,
                marker={"color": color, "line": {"width": 0.5, "color": "white"}},
                hovertemplate="%{customdata}<br>%{base:.1f} µs, %{x:.1f} µs long<extra></extra>",
            )  # fmt: skip
        figure.update_layout(
            barmode="overlay", bargap=0.35, xaxis_title="time, µs", height=300,
            legend={"orientation": "h", "y": -0.3}, margin={"l": 10, "r": 10, "t": 48, "b": 8},
            yaxis={"categoryorder": "array", "categoryarray": ["communication", "compute"], "automargin": True},
        )  # fmt: skip
        return figure

    def _layer(self) -> FloatArray:
        """Return (end, duration) in us of the middle layer's ops [2, ops], read between solved values of a slider."""
        overlap, sliders = self.values["overlap"], [name for name in self.values if name != "overlap"]

        def solve(factors: Mapping[str, float]) -> FloatArray:
            of = self.changed({name: factor * self.controls[name].value for name, factor in factors.items()})
            line = steady_layers(of, self.op_times(of.hardware))
            items = line.program.items
            middle = max(item.layer for item in items) // 2
            shown = [i for i, item in enumerate(items) if item.layer == middle]
            self._bars[overlap] = [
                (GROUPS.get(items[i].kind, "small op"), line.program.lanes[items[i].lane], items[i].name) for i in shown
            ]
            start, end = line.start_s[shown, 0] * 1e6, line.end_s[shown, 0] * 1e6
            return np.stack([end - start.min(), end - start])

        factors = {name: self.values[name] / self.controls[name].value for name in sliders}
        try:
            return self._knots.along(factors, self.moved, overlap, solve)
        except UserError:  # a place beyond the slider's end may be impossible where the value is not
            return solve(factors)

    def _update(self) -> None:
        ends, durations = self._layer()
        rows: dict[str, list[tuple[float, float, str, str]]] = {group: [] for group in COLORS}
        for (group, lane, name), end, duration in zip(
            self._bars[self.values["overlap"]], ends.tolist(), durations.tolist(), strict=True
        ):
            rows[group].append((end - duration, duration, lane, name))
        for trace in self.figure.data:
            bars = rows[trace.name]
            base, x, y, names = ([bar[at] for bar in bars] for at in range(4))
            put(trace, base=base, x=x, y=y, customdata=names)
        exchange = [bar for bar in rows["exchange"] if bar[2] != "compute"]
        hidden = _hidden_us([bar for group in rows.values() for bar in group if bar[2] == "compute"], exchange)
        total = sum(bar[1] for bar in rows["exchange"])
        self.text = f"one layer takes {ends.max():.0f} µs under {self.values['overlap']}"
        if total > 0:
            self.text += f"; {hidden / total:.0%} of its {total:.0f} µs of exchange hides behind compute"


def _hidden_us(compute: list[tuple[float, float, str, str]], exchange: list[tuple[float, float, str, str]]) -> float:
    """Return how long exchange and compute run at once; ops of one lane do not overlap each other."""
    return sum(
        max(0.0, min(a[0] + a[1], b[0] + b[1]) - max(a[0], b[0])) for a in compute for b in exchange
    )  # fmt: skip
