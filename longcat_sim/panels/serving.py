"""Serving under load: TTFT, TPOT and price while the rate and the number of replicas move."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from longcat_sim.errors import CapacityError
from longcat_sim.panels.base import Control, Panel, put

Run = Callable[[float], Mapping[str, Any]]
"""Arrival rate of one replica (1/s) -> ttft_s, ttft_p99_s, tpot_s, tpot_p99_s, attained."""
SERIES = (("ttft_s", "TTFT mean, s"), ("ttft_p99_s", "TTFT p99, s"), ("tpot_s", "TPOT mean, s"),
          ("tpot_p99_s", "TPOT p99, s"))  # fmt: skip


class ServingPanel(Panel):
    """Simulated latency against load; the slider reads between the simulated rates.

    Every point is one simulated run of ``run``, made when the panel is; a fleet of n replicas at rate r is read at r/n
    per replica, as a router that keeps them equally loaded would have it.
    """

    def __init__(
        self, run: Run, rates: Sequence[float], *, replicas: int, gpus_per_replica: int, usd_per_gpu_hour: float,
        output_tokens: float, ttft_limit_s: float | None = None, tpot_limit_s: float | None = None,
        max_replicas: int = 32,
    ) -> None:  # fmt: skip
        if len(rates) < 2 or list(rates) != sorted(set(rates)):
            raise CapacityError(f"rates: expected at least two rising rates, such as [1, 2, 4]; got {list(rates)}")
        self.rates = np.asarray(rates, dtype=float)
        rows = [run(float(rate)) for rate in rates]
        self.simulated = {
            name: np.array([np.nan if row[name] is None else float(row[name]) for row in rows])
            for name in (*(name for name, _ in SERIES), "attained")
        }
        self.usd_per_hour, self.output_tokens = gpus_per_replica * usd_per_gpu_hour, output_tokens
        self.limits = {"ttft": ttft_limit_s, "tpot": tpot_limit_s}
        top = float(self.rates[-1])
        controls = [
            Control("requests_per_s", "requests/s", top * replicas / 2, top / 100, top * max_replicas, is_log=True),
            Control("replicas", "replicas", float(replicas), 1.0, float(max_replicas), 1.0),
        ]
        super().__init__(controls)

    def _build(self) -> Any:
        from plotly.subplots import make_subplots

        figure = make_subplots(rows=1, cols=2, subplot_titles=("time to first token", "time per output token"))
        for column, (mean, tail) in enumerate((("ttft_s", "ttft_p99_s"), ("tpot_s", "tpot_p99_s")), 1):
            for name, dash in ((mean, "solid"), (tail, "dot")):
                figure.add_scatter(
                    x=[], y=[], mode="lines+markers", row=1, col=column,
                    name=dict(SERIES)[name].split(",")[0], line={"dash": dash, "color": "#2a6f97"},
                )  # fmt: skip
        for column in (1, 2):
            figure.add_scatter(
                x=[], y=[], mode="markers", marker={"size": 14, "symbol": "star", "color": "#d1495b"}, name="now",
                row=1, col=column, showlegend=column == 1,
            )  # fmt: skip
        for column, (name, scale) in enumerate((("ttft", 1.0), ("tpot", 1e3)), 1):
            limit = self.limits[name]
            if limit is not None:
                figure.add_hline(y=limit * scale, line_dash="dash", line_color="#d1495b", row=1, col=column)
        figure.update_xaxes(title_text="requests/s of the fleet")
        figure.update_yaxes(title_text="s", row=1, col=1, rangemode="tozero")
        figure.update_yaxes(title_text="ms", row=1, col=2, rangemode="tozero")
        figure.update_layout(height=400, margin={"l": 10, "r": 10, "t": 48, "b": 8})
        return figure

    def _update(self) -> None:
        count = max(1, round(self.values["replicas"]))
        rate = self.values["requests_per_s"]
        each = rate / count
        for trace, (name, _) in zip(self.figure.data[:4], SERIES, strict=True):
            scale = 1e3 if name.startswith("tpot") else 1.0
            put(trace, x=self.rates * count, y=self.simulated[name] * scale)
        at = {name: float(np.interp(each, self.rates, values)) for name, values in self.simulated.items()}
        beyond = each > self.rates[-1]
        marks = ((self.figure.data[4], at["ttft_s"]), (self.figure.data[5], at["tpot_s"] * 1e3))
        for trace, value in marks:
            put(trace, x=[] if beyond else [rate], y=[] if beyond else [value])
        usd = self.usd_per_hour * count / 3600 / (rate * self.output_tokens) * 1e6
        if beyond:
            self.text = f"{each:.3g} requests/s per replica is beyond what was simulated ({self.rates[-1]:.3g})"
        else:
            self.text = (
                f"TTFT {at['ttft_s']:.3g} s, TPOT {at['tpot_s'] * 1e3:.3g} ms, {at['attained']:.0%} within the level, "
                f"{usd:.3g} USD per million output tokens"
            )
