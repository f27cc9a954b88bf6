"""Capacity planning: all screened candidates while the service level and the prices move."""

from __future__ import annotations

from typing import Any

import numpy as np

from longcat_sim.capacity.screen import Screened, pareto
from longcat_sim.figures.prediction import PALETTE
from longcat_sim.panels.base import Control, Panel, put

MAX_POINTS = 800


class CapacityPanel(Panel):
    """Price against speed of every candidate; the front and the cheapest within the level follow the sliders."""

    def __init__(self, screened: Screened, *, tpot_limit_s: float | None = None, max_gpus: int | None = None) -> None:
        self.screened = screened
        self.devices = np.array([shape.scenario.hardware.name for shape in screened.shapes])[screened.shape]
        first = {shape.scenario.hardware.name: shape.scenario.usd_per_gpu_hour for shape in reversed(screened.shapes)}
        self.prices = dict(sorted(first.items()))
        tpot = screened.columns["tpot_s"] * 1e3
        limit = (tpot_limit_s or float(np.median(screened.columns["tpot_s"]))) * 1e3
        gpus = sorted({int(n) for n in screened.columns["num_gpus"]})
        top = max_gpus if max_gpus in gpus else gpus[-1]
        low, high = float(tpot.min()) * 0.9, float(tpot.max()) * 1.1
        controls = [
            Control("tpot_ms", "at most ms per token", min(max(limit, low), high), low, high, is_log=True),
            Control("num_gpus", "GPUs of a replica, at most", top, choices=tuple(gpus)),
        ]
        controls += [
            Control(f"usd_{name}", f"USD/h of {name}", price, min(0.1, price), max(20.0, price), 0.05)
            for name, price in self.prices.items()
        ]
        self.sample = np.linspace(0, len(screened) - 1, min(MAX_POINTS, len(screened))).astype(int)
        super().__init__(controls)

    def _build(self) -> Any:
        import plotly.graph_objects as go

        figure = go.Figure()
        for name, color in zip(self.prices, PALETTE * 4, strict=False):
            figure.add_scatter(
                x=[], y=[], mode="markers", marker={"size": 4, "color": color, "opacity": 0.4}, name=name
            )
        figure.add_scatter(x=[], y=[], mode="lines", line={"color": "#1d2733", "width": 2}, name="front")
        figure.add_scatter(
            x=[], y=[], mode="markers", marker={"size": 15, "symbol": "star", "color": "#d1495b"}, name="cheapest"
        )
        figure.update_layout(
            height=440, margin={"l": 10, "r": 10, "t": 30, "b": 8},
            xaxis={"title": "output tokens/s of one user", "type": "log"},
            yaxis={"title": "USD per million output tokens", "type": "log"},
        )  # fmt: skip
        return figure

    def usd(self) -> Any:
        """Return every candidate's price at the sliders' prices per GPU-hour [N]."""
        factor = np.ones(len(self.devices))
        for name, price in self.prices.items():
            factor[self.devices == name] = self.values[f"usd_{name}"] / price
        return self.screened.columns["usd_per_million_output_tokens"] * factor

    def _update(self) -> None:
        speed, usd = self.screened.columns["tokens_per_s_per_user"], self.usd()
        for trace, name in zip(self.figure.data, self.prices, strict=False):
            at = self.sample[self.devices[self.sample] == name]
            put(trace, x=speed[at], y=usd[at])
        within = self.screened.columns["tpot_s"] * 1e3 <= self.values["tpot_ms"]
        within &= self.screened.columns["num_gpus"] <= self.values["num_gpus"]
        line, star = self.figure.data[-2:]
        if not within.any():
            for trace in (line, star):
                put(trace, x=[], y=[])
            fastest = self.screened.row(int(np.argmin(self.screened.columns["tpot_s"])))
            self.text = (
                f"nothing is that fast; the fastest is {fastest['deployment']}, {fastest['tpot_s'] * 1e3:.3g} ms"
            )
            return
        front = pareto({"usd": usd, "speed": speed}, {"usd": 1, "speed": -1}, within)
        put(line, x=speed[front], y=usd[front])
        best = front[0]
        put(star, x=[speed[best]], y=[usd[best]])
        row = self.screened.row(best)
        self.text = (
            f"{row['deployment']}, {row['sequences_per_gpu']:g} sequences per GPU: {usd[best]:.3g} USD per million "
            f"output tokens at {row['tpot_s'] * 1e3:.3g} ms per token"
        )
