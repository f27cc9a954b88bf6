"""Screen decode deployments: every (device, deployment, batch) through the step model that the simulation uses."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from longcat_sim.capacity.candidates import (
    Rejected,
    Shape,
    batches_of,
    nodes_over,
    reason_of,
    room_of,
    search_of,
    shapes,
    tpot_floor_s,
)
from longcat_sim.capacity.price import usd_per_million_tokens
from longcat_sim.errors import CapacityError, UserError
from longcat_sim.ops.op import FloatArray, OpTimesLike
from longcat_sim.simulation.step import step_seconds_many, step_size
from longcat_sim.specs.hardware import HardwareSpec
from longcat_sim.specs.scenario import Scenario

Times = Callable[[HardwareSpec], OpTimesLike]
"""Op times of a device."""
OBJECTIVES: Mapping[str, int] = {
    "usd_per_million_output_tokens": 1, "tokens_per_s_per_user": -1, "ttft_s": 1, "num_gpus": 1,
}  # fmt: skip
"""Objective -> 1 where less is better, -1 where more is."""
TIE = 1e-6
"""Prices closer than this share are equal."""


def objective_of(scenario: Scenario) -> tuple[str, int]:
    """Return the figure that the search optimises and its sense.

    Under traffic all fleets make the same tokens, so the cheapest is the one whose whole bill is least: the price of
    output tokens alone would favour one that spends more on prompts.
    """
    name = search_of(scenario).objective
    is_fleet = scenario.serve is not None and name == "usd_per_million_output_tokens"
    return (f"{name}_all_in" if is_fleet else name), OBJECTIVES[name]


@dataclass
class Screened:
    """Candidates as columns [N]: ``shape`` is an index into ``shapes``. Every one fits in memory."""

    shapes: list[Shape]
    shape: Any
    columns: dict[str, FloatArray]
    """sequences_per_gpu, step_s, tpot_s, tokens_per_s_per_user, tokens_per_s_per_gpu,
    usd_per_million_output_tokens, num_gpus"""
    looked_at: int
    """Candidates, those included that were put aside."""
    rejected: Rejected
    interpolation_error: float = 0.0
    """Largest relative error half-way between solved batches, measured on a sample of deployments."""
    wall_s: float = 0.0
    room: list[float] = field(default_factory=list)
    """Most sequences per GPU that fit, by shape."""

    def __len__(self) -> int:
        return len(self.shape)

    def scenario(self, at: int) -> Scenario:
        """Return the scenario of a candidate."""
        batch = float(self.columns["sequences_per_gpu"][at])
        return self.shapes[int(self.shape[at])].scenario.what_if({"step.sequences_per_gpu": batch})

    def row(self, at: int) -> dict[str, Any]:
        """Return a candidate's figures, and its deployment in words."""
        shape = self.shapes[int(self.shape[at])]
        figures = {name: float(values[at]) for name, values in self.columns.items()}
        return {"deployment": shape.label, "changes": {**shape.changes}, **figures}


def screen_steps(
    scenario: Scenario, op_times: Times, *, per_octave: int = 4, error_shapes: int = 3
) -> Screened:  # fmt: skip
    """Return every candidate of the scenario's search that sizes, links and memory allow, with its figures.

    Each deployment's step is solved at ``per_octave`` batches per doubling by ``step_seconds_many`` and is linear in
    the batch between them; the error of that is measured.

    Raises:
        CapacityError: the scenario has no decode step or no search, or nothing is left.
        SpecError: no price for a device.
    """
    began = time.perf_counter()
    step = scenario.step
    if step is None or step.phase != "decode":
        raise CapacityError(
            f"{scenario.where}: step: expected a decode step, such as step: {{phase: decode, sequences_per_gpu: 96, "
            "context_tokens: 5000}}, or traffic (serve:); add it"
        )
    batches = batches_of(scenario)
    kept, rejected = shapes(scenario, weight=len(batches))
    looked_at = sum(rejected.counts.values()) + len(kept) * len(batches)
    parts: list[dict[str, FloatArray]] = []
    index: list[Any] = []
    used: list[Shape] = []
    room: list[float] = []
    errors: list[float] = []
    solved: dict[Any, FloatArray] = {}
    for shape in kept:
        most = room_of(shape.scenario, step.context_tokens)
        fitting = batches[batches <= most]
        rejected.add(
            "memory", f"{shape.label}: at most {int(most)} sequences per GPU of {step.context_tokens:g} tokens fit",
            len(batches) - len(fitting),
        )  # fmt: skip
        parts_at_least = 2 if shape.scenario.deployment.overlap == "tbo" else 1
        allowed = fitting[fitting >= parts_at_least]
        rejected.add(
            "schedule", f"{shape.label}: two micro-batches need 2 sequences per GPU", len(fitting) - len(allowed)
        )
        if not len(allowed):
            continue
        times = op_times(shape.scenario.hardware)
        key = _step_key(shape)
        try:
            if key not in solved:
                solved[key], error = _curve(shape, times, allowed, per_octave, len(errors) < error_shapes)
                errors += [error] if error is not None else []
        except UserError as fault:
            rejected.add(reason_of(fault), f"{shape.label}: {fault.faults[0]}", len(allowed))
            continue
        parts.append(figures_of(shape.scenario, allowed, solved[key]))
        index.append(np.full(len(allowed), len(used)))
        used.append(shape)
        room.append(most)
    if not used:
        raise nothing_left(scenario, rejected)
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Screened(
        used, np.concatenate(index), columns, looked_at, rejected, max(errors, default=0.0),
        time.perf_counter() - began, room,
    )  # fmt: skip


def ranking(screened: Screened, scenario: Scenario) -> FloatArray:
    """Return what the search makes small [N]: the objective, or its negative where more is better.

    ``num_gpus`` are those of one replica, or of the fleet where it must make a rate. The price is then that of the
    whole replicas which make it, spares included, over the tokens asked for; of fleets that cost the same the one with
    most room to both the rate and the level comes first.
    """
    search = search_of(scenario)
    values = screened.columns[search.objective] * OBJECTIVES[search.objective]
    usd = screened.columns["usd_per_million_output_tokens"]
    if search.output_tokens_per_s is None:
        return values * (1 + TIE * usd / usd.max()) if search.objective == "num_gpus" else values
    made = screened.columns["tokens_per_s_per_gpu"] * screened.columns["num_gpus"]
    replicas = np.maximum(1.0, np.ceil(search.output_tokens_per_s / made - 1e-9)) + search.spare_replicas
    if search.objective == "num_gpus":  # of the fleet that makes the rate; of equal ones the cheapest token
        return replicas * screened.columns["num_gpus"] * (1 + TIE * usd / usd.max())
    if search.objective != "usd_per_million_output_tokens":
        return values
    tightest = search.output_tokens_per_s / ((replicas - search.spare_replicas) * made)
    limit_s = tpot_limit_s(scenario)
    if limit_s is not None:
        tightest = np.maximum(tightest, screened.columns["tpot_s"] / limit_s)
    return values * (replicas * made / search.output_tokens_per_s) * (1 + TIE * tightest)


def _step_key(shape: Shape) -> Any:
    """Return what a step depends on: replicas that only have more expert-parallel groups share their steps."""
    deployment = shape.scenario.deployment
    return shape.scenario.hardware.name, deployment.model_copy(update={"num_gpus": deployment.ep_size})


def _curve(
    shape: Shape, times: OpTimesLike, batches: FloatArray, per_octave: int, is_checked: bool
) -> tuple[FloatArray, float | None]:
    """Return step seconds at ``batches``, and the interpolation error where asked for."""
    context = step_size(shape.scenario).context
    nodes = nodes_over(batches, per_octave)
    if len(nodes) >= len(batches):
        return step_seconds_many(shape.scenario, times, batches, context), None
    middles = (nodes[:-1] + nodes[1:]) / 2 if is_checked else np.empty(0)
    solved = step_seconds_many(shape.scenario, times, np.concatenate([nodes, middles]), context)
    at_nodes = solved[: len(nodes)]
    error = None
    if is_checked:
        error = float(np.max(np.abs(np.interp(middles, nodes, at_nodes) / solved[len(nodes) :] - 1)))
    return np.interp(batches, nodes, at_nodes), error


def figures_of(scenario: Scenario, batches: FloatArray, step_s: FloatArray) -> dict[str, FloatArray]:
    """Return the figures of decode steps of one deployment [N]; on the basis ``decode_gpus``."""
    per_step = scenario.speculative.tokens_per_step
    tpot = step_s / per_step
    rate = batches / tpot
    usd = usd_per_million_tokens(scenario.usd_per_gpu_hour, 1.0, scenario.price.utilisation) / rate
    return {
        "sequences_per_gpu": np.asarray(batches, dtype=float), "step_s": step_s, "tpot_s": tpot,
        "tokens_per_s_per_user": 1 / tpot, "tokens_per_s_per_gpu": rate, "usd_per_million_output_tokens": usd,
        "num_gpus": np.full(len(batches), float(scenario.deployment.num_gpus)),
    }  # fmt: skip


def tpot_limit_s(scenario: Scenario) -> float | None:
    """Return the service level on the time per output token: the search's, else the strictest class's."""
    search = search_of(scenario)
    if search.tpot is not None:
        return search.tpot
    levels = [level.tpot for level in scenario.serve.slo if level.tpot is not None] if scenario.serve else []
    return min(levels, default=None)


def check_reachable(scenario: Scenario, kept: list[Shape], limit_s: float | None) -> None:
    """Raise CapacityError if the service level lies below the physical limit of every deployment; says the limit."""
    if limit_s is None or not kept:
        return
    floors = [(tpot_floor_s(shape.scenario), shape.label) for shape in kept]
    floor, label = min(floors)
    if limit_s < floor:
        where = "serve.slo" if scenario.serve else "search"
        raise CapacityError(
            f"{scenario.where}: {where}.tpot: expected at least {floor * 1e3:.3g} ms, the time that {label} needs to "
            "read the weights of a step and cross its links at their data-sheet speed; got "
            f"{limit_s * 1e3:.3g} ms; loosen the level, draft more tokens, or search faster devices"
        )


def nothing_left(scenario: Scenario, rejected: Rejected) -> CapacityError:
    """Return the error of a search without a candidate: counts by reason, with an example of each."""
    reasons = [
        f"{count} by {reason}" + (f" ({rejected.examples[reason]})" if reason in rejected.examples else "")
        for reason, count in sorted(rejected.counts.items(), key=lambda item: -item[1])
    ]
    return CapacityError(
        f"{scenario.where}: search: expected at least one deployment that fits; all were put aside: "
        f"{'; '.join(reasons)}; allow more GPUs, larger ep_size, smaller batches or other devices"
    )


def pareto(columns: Mapping[str, FloatArray], senses: Mapping[str, int], among: Any = None) -> list[int]:
    """Return the candidates that no other beats in every figure of ``senses`` (1: less is better, -1: more), best in
    the first figure first.

    Sorted by the first figure, a candidate stays if no earlier one is at least as good in all the others; with two
    figures that is one running minimum.
    """
    indices = np.arange(len(next(iter(columns.values())))) if among is None else np.flatnonzero(among)
    table = np.stack([columns[name][indices] * sense for name, sense in senses.items()], axis=1)
    order = np.lexsort(table.T[::-1])
    kept: list[int] = []
    if table.shape[1] == 2:
        best = np.inf
        for at in order:
            if table[at, 1] < best:
                best = table[at, 1]
                kept.append(int(indices[at]))
        return kept
    front = np.empty((0, table.shape[1] - 1))
    for at in order:
        if not len(front) or not np.any(np.all(front <= table[at, 1:], axis=1)):
            kept.append(int(indices[at]))
            front = np.vstack([front[np.any(front < table[at, 1:], axis=1)], table[at, 1:]])
    return kept
