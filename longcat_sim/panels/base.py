"""``Panel``: controls, a FigureWidget that is updated in place, and a sentence; ``set`` is all that a slider does."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from longcat_sim.errors import CapacityError, UserError

GRID = {"gridcolor": "#e6eaef", "zerolinecolor": "#e6eaef", "linecolor": "#e6eaef", "automargin": True}
TEMPLATE = {
    "layout": {
        "paper_bgcolor": "white", "plot_bgcolor": "white", "font": {"color": "#2a3f5f"}, "hovermode": "closest",
        "xaxis": GRID, "yaxis": GRID,
    }
}  # fmt: skip
"""The looks of plotly_white without its entries for fifty kinds of trace: a browser reads the template at each move."""


LOG_STEP = 0.02
"""Step of a logarithmic slider, in decades."""


def put(trace: Any, **values: Any) -> None:
    """Set properties of a trace. If none of them changed, nothing is sent; else all are: a browser drops the y of a
    trace that it was first given with an empty x."""
    if any(not _is_same(trace[name], value) for name, value in values.items()):
        for name, value in values.items():
            trace[name] = value


def _is_same(now: Any, value: Any) -> bool:
    if now is None:
        return value is None
    return len(now) == len(value) and bool(np.all(np.asarray(now) == np.asarray(value)))


def log_range(value: float, low: float, high: float) -> tuple[float, float]:
    """Return the decimal logarithms of a slider's ends, whole steps from ``value``: a slider shows its nearest step."""
    at = math.log10(value)
    below = math.floor((at - math.log10(low)) / LOG_STEP + 1e-9)
    above = math.floor((math.log10(high) - at) / LOG_STEP + 1e-9)
    return at - below * LOG_STEP, at + above * LOG_STEP


@dataclass(frozen=True)
class Control:
    """A slider (``low`` to ``high`` by ``step``, logarithmic on demand) or, with ``choices``, a menu."""

    name: str
    label: str
    value: Any
    low: float = 0.0
    high: float = 1.0
    step: float = 0.01
    is_log: bool = False
    choices: tuple[Any, ...] = ()

    def check(self, value: Any) -> Any:
        """Return ``value`` if the control can take it.

        Raises:
            CapacityError: outside the range or not among the choices.
        """
        if self.choices:
            if value not in self.choices:
                raise CapacityError(f"{self.name}: expected one of {', '.join(map(str, self.choices))}; got {value!r}")
            return value
        if not isinstance(value, int | float) or not self.low <= value <= self.high:
            raise CapacityError(f"{self.name}: expected a number in {self.low:g}..{self.high:g}; got {value!r}")
        return value


class Panel(ABC):
    """A figure with controls. Sub-classes build ``self.figure`` in ``_build`` and change it in ``_update``."""

    title = ""

    def __init__(self, controls: Sequence[Control]) -> None:
        import plotly.graph_objects as go

        self.controls = {control.name: control for control in controls}
        self.values: dict[str, Any] = {control.name: control.value for control in controls}
        self.moved: tuple[str, ...] = ()
        """What the last ``set`` moved."""
        self.text = ""
        self.last_update_s = 0.0
        """Seconds that the last ``set`` took."""
        built = self._build()
        built.layout.template = TEMPLATE
        self.figure: Any = go.FigureWidget(built)
        self._output: Any = None
        self.set()

    @abstractmethod
    def _build(self) -> Any:
        """Return the figure with all its traces, empty or not."""

    @abstractmethod
    def _update(self) -> None:
        """Put the figures of ``self.values`` into the traces and ``self.text``."""

    def set(self, **values: Any) -> Panel:
        """Move controls and update the figure in place; a fault of the scenario becomes the text.

        Raises:
            CapacityError: an unknown control, or a value that it cannot take.
        """
        unknown = [name for name in values if name not in self.controls]
        if unknown:
            raise CapacityError(f"controls: expected {', '.join(self.controls)}; got {', '.join(unknown)}")
        self.values.update({name: self.controls[name].check(value) for name, value in values.items()})
        self.moved = tuple(values)
        began = time.perf_counter()
        try:
            with self.figure.batch_update():
                self._update()
        except UserError as error:
            self.text = "; ".join(error.faults)
        self.last_update_s = time.perf_counter() - began
        if self._output is not None:
            self._output.value = self._html()
        return self

    def _html(self) -> str:
        import html

        return f"<p style='font: 15px system-ui; margin: 4px 8px'>{html.escape(self.text)}</p>"

    def widget(self) -> Any:
        """Return controls, figure and sentence as one ipywidgets box."""
        import ipywidgets as w

        self._output = w.HTML(self._html())
        sliders = []
        for control in self.controls.values():
            common: Mapping[str, Any] = {
                "description": control.label, "style": {"description_width": "180px"},
                "layout": w.Layout(width="460px"),
            }  # fmt: skip
            value = self.values[control.name]
            if control.choices:
                made: Any = w.Dropdown(options=list(control.choices), value=value, **common)
            elif control.is_log:
                low, high = log_range(value, control.low, control.high)
                made = w.FloatLogSlider(value=value, min=low, max=high, step=LOG_STEP, readout_format=".4g", **common)
            else:
                made = w.FloatSlider(
                    value=value, min=control.low, max=control.high, step=control.step, readout_format=".4g", **common
                )
            made.observe(lambda change, name=control.name: self._moved(name, change["new"]), names="value")
            sliders.append(made)
        return w.VBox([w.VBox(sliders), self.figure, self._output])

    def _moved(self, name: str, value: Any) -> None:
        control = self.controls[name]
        if not control.choices:  # a logarithmic slider may end a rounding error outside
            value = min(max(value, control.low), control.high)
        self.set(**{name: value})

    def _repr_mimebundle_(self, **kwargs: Any) -> Any:
        return self.widget()._repr_mimebundle_(**kwargs)
