"""Panels without a kernel: controls, in-place updates, figures that could be wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest

from longcat_sim.calibration import Roofline
from longcat_sim.capacity.screen import screen_steps
from longcat_sim.errors import CapacityError
from longcat_sim.panels.capacity import CapacityPanel
from longcat_sim.panels.cost import CostPanel
from longcat_sim.panels.overlap import OverlapPanel, steady_layers
from longcat_sim.panels.serving import ServingPanel
from longcat_sim.panels.what_if import WhatIfPanel
from longcat_sim.specs.scenario import Scenario, scenario


@pytest.fixture(scope="module")
def base() -> Scenario:
    return scenario(
        {
            "model": "longcat-flash", "hardware": "h800-sxm",
            "deployment": {"num_gpus": 32, "ep_size": 32, "dense_tp_size": 4, "overlap": "sbo"},
            "routing": {"source": "balanced"}, "speculative": {"draft_tokens": 1, "acceptance": [0.8]},
            "step": {"phase": "decode", "sequences_per_gpu": 64, "context_tokens": 4000},
            "search": {"ep_size": [32, 64], "overlap": ["none", "sbo"], "sequences_per_gpu": [8, 256]},
            "price": {"usd_per_gpu_hour": 2.0},
        }
    )  # fmt: skip


def test_cost_panel_scales_with_price_and_marks_the_batch(base: Scenario) -> None:
    panel = CostPanel(base, Roofline)
    figure, line = panel.figure, panel.figure.data[0]
    before, star = np.array(line.y), panel.figure.data[1].y[0]
    panel.set(usd_per_gpu_hour=4.0, utilisation=0.5)
    assert panel.figure is figure
    assert np.array(line.y) == pytest.approx(4 * before)
    assert panel.figure.data[1].y[0] == pytest.approx(4 * star)
    rate = panel.figure.data[1].x[0]
    panel.set(sequences_per_gpu=8.0)
    assert panel.figure.data[1].x[0] > rate  # a smaller batch is faster for its users
    panel.set(acceptance=0.0)
    assert max(line.x) < rate * 2
    with pytest.raises(CapacityError, match=r"utilisation: expected a number in 0\.05\.\.1; got 2"):
        panel.set(utilisation=2.0)
    with pytest.raises(CapacityError, match=r"controls: expected usd_per_gpu_hour, .*; got prize"):
        panel.set(prize=1)


def test_overlap_panel_shows_what_sbo_hides(base: Scenario) -> None:
    panel = OverlapPanel(base, Roofline)

    def layer_us() -> float:
        return max(b + x for trace in panel.figure.data for b, x in zip(trace.base, trace.x, strict=True))

    sbo = layer_us()
    assert "hides behind compute" in panel.text
    assert {y for trace in panel.figure.data for y in trace.y} == {"compute", "communication"}
    panel.set(overlap="none")
    assert layer_us() > 1.1 * sbo
    assert "0% of its" in panel.text
    slow = layer_us()
    panel.set(link_gb_per_s=panel.controls["link_gb_per_s"].high)
    assert layer_us() < slow


def test_a_fault_of_the_scenario_becomes_the_text(base: Scenario) -> None:
    panel = OverlapPanel(base.what_if({"step.sequences_per_gpu": 2}), Roofline)
    panel.scenario = base.what_if({"step.sequences_per_gpu": 1})
    panel.values["sequences_per_gpu"] = 1
    panel.set(overlap="tbo")
    assert "micro-batches" in panel.text


def test_what_if_panel_is_relative_to_today(base: Scenario) -> None:
    panel = WhatIfPanel(base, Roofline)
    assert list(panel.figure.data[1].y) == pytest.approx([1, 1, 1])
    panel.set(price=2.0)
    assert list(panel.figure.data[1].y) == pytest.approx([1, 2, 1])
    panel.set(price=1.0, **{"memory bandwidth": 4.0})
    assert panel.figure.data[1].y[0] < 0.95


def test_capacity_panel_follows_level_and_prices(base: Scenario) -> None:
    screened = screen_steps(base, Roofline)
    panel = CapacityPanel(screened, tpot_limit_s=0.05)
    loose = panel.figure.data[-1].y[0]
    tight = float(screened.columns["tpot_s"].min() * 1e3 * 1.05)
    panel.set(tpot_ms=tight)
    assert panel.figure.data[-1].y[0] > loose
    panel.set(**{"usd_h800-sxm": 4.0}, tpot_ms=50.0)
    assert panel.figure.data[-1].y[0] == pytest.approx(2 * loose)
    panel.set(tpot_ms=panel.controls["tpot_ms"].low)
    assert "nothing is that fast" in panel.text


def test_serving_panel_reads_between_simulated_rates() -> None:
    def run(rate: float) -> dict[str, float]:
        wait = 1 / (10 - rate)
        return {"ttft_s": wait, "ttft_p99_s": 4.6 * wait, "tpot_s": 0.02, "tpot_p99_s": 0.03, "attained": 1.0}

    panel = ServingPanel(
        run, [1, 4, 8], replicas=2, gpus_per_replica=8, usd_per_gpu_hour=2.0, output_tokens=500, ttft_limit_s=1.0
    )
    panel.set(requests_per_s=8.0, replicas=2.0)
    assert panel.figure.data[4].y[0] == pytest.approx(1 / 6)
    assert list(panel.figure.data[0].x) == [2, 8, 16]
    assert f"{2 * 8 * 2.0 / 3600 / (8 * 500) * 1e6:.3g} USD" in panel.text
    panel.set(replicas=4.0)
    assert panel.figure.data[4].y[0] == pytest.approx(np.interp(2, [1, 4, 8], [1 / 9, 1 / 6, 1 / 2]))
    panel.set(requests_per_s=100.0)
    assert "beyond what was simulated" in panel.text
    with pytest.raises(CapacityError, match="at least two rising rates"):
        ServingPanel(run, [4, 1], replicas=1, gpus_per_replica=1, usd_per_gpu_hour=1.0, output_tokens=1)


def test_a_widget_has_a_slider_per_control(base: Scenario) -> None:
    panel = CostPanel(base, Roofline)
    box = panel.widget()
    sliders = box.children[0].children
    assert [slider.description for slider in sliders] == [control.label for control in panel.controls.values()]
    before = panel.figure.data[1].y[0]
    sliders[0].value = 4.0
    assert panel.figure.data[1].y[0] == pytest.approx(2 * before)
    assert "USD per million" in box.children[2].value


def test_a_slider_can_show_the_value_it_starts_at(base: Scenario) -> None:
    """A logarithmic slider shows the step nearest to its value: 5,000 tokens must not read 5,096."""
    for slider in OverlapPanel(base.what_if({"step.context_tokens": 5000}), Roofline).widget().children[0].children:
        if hasattr(slider, "base"):
            steps = (math.log10(slider.value) - slider.min) / slider.step
            assert steps == pytest.approx(round(steps), abs=1e-6), slider.description


def test_between_solved_factors_a_step_is_read_to_half_a_percent(base: Scenario) -> None:
    """The what-if panel solves twelve factors a decade, the cost panel as many contexts; in between it reads."""
    from longcat_sim.capacity.samples import fast_figures

    panel = WhatIfPanel(base, Roofline)
    for name, factor in (("memory bandwidth", 1.15), ("scale-out bandwidth", 0.43), ("scale-out latency", 3.1)):
        panel.set(**{name: factor})
        of = panel.changed()
        exact = fast_figures(of, Roofline(of.hardware))
        assert panel.figure.data[1].y[0] == pytest.approx(exact["tpot_s"] / panel.base["tpot_s"], rel=5e-3), name
    cost = CostPanel(base, Roofline)
    cost.set(context_tokens=6543.0, acceptance=0.6)
    of = base.what_if({"step.context_tokens": 6543, "speculative.acceptance": [0.6]})
    exact = fast_figures(of, Roofline(of.hardware))
    assert f"{exact['usd_per_million_output_tokens']:.3g} USD" in cost.text
    assert cost.figure.data[1].x[0] == pytest.approx(1 / exact["tpot_s"], rel=5e-3)


def test_between_solved_values_a_timeline_is_read_to_two_percent(base: Scenario) -> None:
    panel = OverlapPanel(base, Roofline)
    for moved in ({"sequences_per_gpu": 71.3}, {"context_tokens": 5200.0}, {"link_gb_per_s": 37.0}):
        panel.set(**moved)
        read = sorted(b + x for trace in panel.figure.data for b, x in zip(trace.base, trace.x, strict=True))
        line = steady_layers(panel.changed(), Roofline(panel.changed().hardware))
        shown = [i for i, item in enumerate(line.program.items) if item.layer == 1]
        ends = np.sort(line.end_s[shown, 0] - line.start_s[shown, 0].min()) * 1e6
        assert read == pytest.approx(list(ends), rel=0.02, abs=0.5), moved  # a link that begins to bind is a kink


def test_a_move_sends_only_what_changed(base: Scenario) -> None:
    panel = CostPanel(base, Roofline)
    sent: list[list[int]] = []
    panel.figure._send_update_msg = lambda **message: sent.append(list(message["trace_indexes"]))
    panel.set(sequences_per_gpu=32.0)
    assert sent == [[1]]  # the star; the curve is another batch's business
    panel.set(usd_per_gpu_hour=3.0)
    assert sent == [[1], [0, 1]]
