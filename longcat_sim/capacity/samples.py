"""Samples of a step's figures: calibration, routing and model error, each by its own index."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from longcat_sim.capacity.price import usd_per_million_tokens
from longcat_sim.capacity.uncertainty import Discrepancy, Sample, probability
from longcat_sim.ops.graph import step_graph
from longcat_sim.ops.op import TAG_ORDER, FloatArray, OpTimesLike
from longcat_sim.simulation.program import build_program
from longcat_sim.simulation.step import loads, simulate_draws, simulate_step, step_seconds_many, step_size
from longcat_sim.specs.scenario import Scenario

STEP_SOURCES = ("calibration", "routing", "discrepancy")


def decode_figures(scenario: Scenario, step_s: float) -> dict[str, float]:
    """Return the figures of one decode step that takes ``step_s``; on the basis ``decode_gpus``."""
    tpot = step_s / scenario.speculative.tokens_per_step
    rate = float(step_size(scenario).sequences) / tpot
    usd = usd_per_million_tokens(scenario.usd_per_gpu_hour, rate, scenario.price.utilisation)
    return {
        "step_s": step_s, "tpot_s": tpot, "tokens_per_s_per_user": 1 / tpot, "tokens_per_s_per_gpu": rate,
        "usd_per_million_output_tokens": usd, "num_gpus": float(scenario.deployment.num_gpus),
    }  # fmt: skip


def fast_figures(scenario: Scenario, op_times: OpTimesLike) -> dict[str, float]:
    """Return a decode step's figures by the vectorised step model: what sliders and tornadoes evaluate."""
    size = step_size(scenario)
    seconds = float(step_seconds_many(scenario, op_times, size.sequences, size.context))
    return decode_figures(scenario, seconds)


def simulated_figures(scenario: Scenario, op_times: OpTimesLike, *, seed: int = 0) -> dict[str, float]:
    """Return a decode step's figures, simulated event by event on all ranks, and how far they lean on what sources."""
    step = simulate_step(scenario, op_times, seed=seed)
    figures = decode_figures(scenario, step.step_s)
    figures["exposed_communication_s"] = step.exposed_communication_s
    figures["memory_bytes_per_gpu"] = step.memory.total_bytes
    for tag in TAG_ORDER:
        figures[f"{tag}_share"] = float(step.tags.get(tag, 0.0))
    return figures


def step_sample(scenario: Scenario, op_times: Any, discrepancy: Discrepancy | None = None) -> Sample:
    """Return the sample function of a decode step: indices of calibration, routing and discrepancy -> figures.

    Calibration 0 is the fit itself; routing i is the i-th draw of loads on all ranks.
    """
    known = discrepancy or Discrepancy(seed=scenario.seed)

    def sample(indices: Mapping[str, int]) -> dict[str, float]:
        at = indices.get("calibration", 0)
        times = op_times.draw(at) if at and hasattr(op_times, "draw") else op_times
        seed = scenario.seed + 1000 * indices.get("routing", 0)
        seconds = float(simulate_draws(scenario, times, 1, seed=seed).step_s[0])
        return decode_figures(scenario, seconds * known.factor(indices.get("discrepancy", 0)))

    return sample


def assess(
    scenario: Scenario, op_times: Any, limit_s: float | None = None, *, draws: int = 32, quantile: float = 0.5
) -> dict[str, float]:
    """Return a decode step's figures over ``draws`` of calibration, routing and model error at once: the median of
    each, with ``_p5`` and ``_p95``; the ``probability`` of at most ``limit_s`` per token, and the time per token that
    is kept with probability ``quantile``. With one draw there is a point: no interval and no probability."""
    found = simulate_draws(scenario, op_times, draws, seed=scenario.seed)
    rows = [decode_figures(scenario, float(seconds)) for seconds in found.step_s]
    figures: dict[str, float] = {}
    for name in rows[0]:
        low, middle, high = np.quantile([row[name] for row in rows], (0.05, 0.5, 0.95))
        figures[name] = float(middle)
        if draws > 1:
            figures |= {f"{name}_p5": float(low), f"{name}_p95": float(high)}
    if limit_s is not None:
        tpot = [row["tpot_s"] for row in rows]
        if draws > 1:
            figures["probability"] = probability(tpot, limit_s)
        figures["tpot_s_at_probability"] = float(np.quantile(tpot, quantile))
    return figures


def kinds_of(scenario: Scenario, op_times: OpTimesLike) -> dict[str, tuple[str, float]]:
    """Return the op kinds of a step: their worst tag, and their seconds alone on one rank, longest first."""
    size = step_size(scenario)
    blocks = step_graph(
        scenario.model, scenario.deployment, size, loads(scenario, size, draws=1, seed=scenario.seed),
        scenario.speculative.draft_tokens,
    )  # fmt: skip
    program = build_program(blocks, op_times, draws=1, ranks=max(1, scenario.deployment.ep_size))
    found: dict[str, tuple[str, float]] = {}
    for item, seconds in zip(program.items, program.seconds, strict=True):
        tag, spent = found.get(item.kind, ("measured", 0.0))
        found[item.kind] = (max(tag, item.tag, key=TAG_ORDER.index), spent + float(np.mean(seconds)))
    return dict(sorted(found.items(), key=lambda row: -row[1][1]))


def figure_by_times(scenario: Scenario, name: str) -> Callable[[OpTimesLike], float]:
    """Return a figure of the scenario's step as a function of op times alone."""
    return lambda op_times: fast_figures(scenario, op_times)[name]


def curve(scenario: Scenario, op_times: OpTimesLike, batches: FloatArray) -> dict[str, FloatArray]:
    """Return a deployment's figures over batches [N]."""
    from longcat_sim.capacity.screen import figures_of

    size = step_size(scenario)
    return figures_of(scenario, batches, step_seconds_many(scenario, op_times, batches, size.context))
