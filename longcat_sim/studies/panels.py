"""Panels of a scenario, with calibrated op times and the serving engine behind them: what notebooks show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from longcat_sim.capacity.candidates import search_of
from longcat_sim.capacity.op_times import op_times_of
from longcat_sim.capacity.screen import screen_steps, tpot_limit_s
from longcat_sim.capacity.screen_serving import curve
from longcat_sim.capacity.traffic import Traffic
from longcat_sim.errors import CapacityError
from longcat_sim.panels.capacity import CapacityPanel
from longcat_sim.panels.cost import CostPanel
from longcat_sim.panels.overlap import OverlapPanel
from longcat_sim.panels.serving import ServingPanel
from longcat_sim.panels.what_if import WhatIfPanel
from longcat_sim.specs.base import ParsedFloat
from longcat_sim.specs.scenario import Scenario


def overlap_panel(scenario: Scenario) -> OverlapPanel:
    """Return a layer's timeline with sliders."""
    return OverlapPanel(scenario, op_times_of)


def cost_panel(scenario: Scenario) -> CostPanel:
    """Return price against speed with sliders."""
    return CostPanel(scenario, op_times_of)


def what_if_panel(scenario: Scenario) -> WhatIfPanel:
    """Return hardware factors with sliders."""
    return WhatIfPanel(scenario, op_times_of)


def capacity_panel(scenario: Scenario) -> CapacityPanel:
    """Return the scenario's search, screened, with sliders for level and prices."""
    screened = screen_steps(scenario, op_times_of)
    return CapacityPanel(screened, tpot_limit_s=tpot_limit_s(scenario), max_gpus=search_of(scenario).max_gpus)


def serving_panel(scenario: Scenario, *, points: int = 8, requests: int = 600) -> ServingPanel:
    """Return latency against load: one replica simulated at ``points`` rates up to what the fluid model lets it carry.

    Raises:
        CapacityError: a scenario without shared replicas and a synthetic workload with a rate.
    """
    from longcat_sim.capacity.candidates import Shape
    from longcat_sim.studies.engines import StepFunction
    from longcat_sim.studies.fleet_figures import simulate_fleet, ttft_and_tpot_limits

    serve = scenario.serve
    if serve is None or serve.is_disaggregated or serve.workload.arrivals is None:
        raise CapacityError(
            f"{scenario.where}: serve: expected shared replicas (serve.replicas) and a synthetic workload with a rate "
            "for this panel; give another scenario, or set serve.prefill and serve.decode to null"
        )
    traffic = Traffic.of(scenario)
    one = curve(Shape(scenario, {}), StepFunction(scenario, op_times_of(scenario.hardware)), traffic)
    top = float(one.requests_per_s(traffic.output_tokens, scenario.speculative.tokens_per_step, shared=True).max())

    def run(rate: float) -> Mapping[str, Any]:
        of = scenario.what_if({"serve.replicas": 1, "serve.workload.arrivals.rate": ParsedFloat(rate)})
        return simulate_fleet(of, most_requests=requests)

    ttft, tpot = ttft_and_tpot_limits(scenario)
    return ServingPanel(
        run, [float(rate) for rate in np.linspace(0.1, 0.95, points) * top], replicas=serve.replicas,
        gpus_per_replica=scenario.deployment.num_gpus, usd_per_gpu_hour=scenario.usd_per_gpu_hour,
        output_tokens=traffic.output_tokens, ttft_limit_s=ttft, tpot_limit_s=tpot,
    )  # fmt: skip
