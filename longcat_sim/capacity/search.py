"""Choose: screen all candidates, simulate the survivors, take the best that keeps the service level, and say why."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np

from longcat_sim.capacity.answer import CapacityResult, Survivor
from longcat_sim.capacity.candidates import search_of
from longcat_sim.capacity.reasons import binding, fleet_rate, why
from longcat_sim.capacity.screen import (
    OBJECTIVES,
    Screened,
    Times,
    check_reachable,
    pareto,
    ranking,
    screen_steps,
    tpot_limit_s,
)
from longcat_sim.capacity.sweep import Evaluate, Progress, sweep
from longcat_sim.capacity.uncertainty import check_draws
from longcat_sim.errors import CapacityError
from longcat_sim.specs.scenario import Scenario

MARGINS = (1.0, 0.9, 0.95, 0.8, 0.85)
"""Shares of the service level at which a deployment's best batch is simulated: a probability needs room."""
PARETO = {"usd_per_million_output_tokens": 1, "tokens_per_s_per_user": -1}


def survivors_of(screened: Screened, scenario: Scenario, limit_s: float | None) -> list[int]:
    """Return the candidates to simulate: the best deployments' best batches at several distances from the level, then
    points of the Pareto front.

    Raises:
        CapacityError: no candidate keeps the level; says what is closest.
    """
    search = search_of(scenario)
    values = ranking(screened, scenario)
    tpot = screened.columns["tpot_s"]
    feasible = np.ones(len(tpot), dtype=bool) if limit_s is None else tpot <= limit_s
    if not feasible.any():
        raise closest(screened, scenario, limit_s)
    chosen: dict[int, None] = {}
    by_shape = _best_of_shapes(screened, values, feasible)
    leading = by_shape[: max(1, search.survivors // len(MARGINS))]
    for margin in MARGINS if limit_s is not None else MARGINS[:1]:
        for first in leading:
            mine = (screened.shape == screened.shape[first]) & feasible
            if limit_s is not None:
                mine &= tpot <= margin * limit_s
            at = np.flatnonzero(mine)
            if len(at):
                chosen.setdefault(int(at[np.argmin(values[at])]))
    front = pareto(screened.columns, PARETO, feasible)
    spread = [front[i] for i in np.unique(np.linspace(0, len(front) - 1, search.survivors).round().astype(int))]
    for at in [*by_shape[: search.survivors], *spread]:
        if len(chosen) >= search.survivors:
            break
        chosen.setdefault(int(at))
    return list(chosen)[: search.survivors]


def _best_of_shapes(screened: Screened, values: Any, feasible: Any) -> list[int]:
    """Return the best feasible candidate of each deployment, best deployment first."""
    best: dict[int, int] = {}
    for at in np.flatnonzero(feasible):
        shape = int(screened.shape[at])
        if shape not in best or values[at] < values[best[shape]]:
            best[shape] = int(at)
    return sorted(best.values(), key=lambda at: values[at])


def closest(screened: Screened, scenario: Scenario, limit_s: float | None) -> CapacityError:
    """Return the error of a search in which nothing keeps the service level."""
    at = int(np.argmin(screened.columns["tpot_s"]))
    row = screened.row(at)
    counts = ", ".join(f"{count} {reason}" for reason, count in screened.rejected.counts.items())
    return CapacityError(
        f"{scenario.where}: search.tpot: expected a deployment within {1e3 * (limit_s or 0):.4g} ms per token; the "
        f"closest of {len(screened)} is {row['deployment']} with {row['sequences_per_gpu']:g} sequences per GPU at "
        f"{row['tpot_s'] * 1e3:.4g} ms, {row['tpot_s'] / (limit_s or 1) - 1:.0%} over; allow smaller batches, a "
        "larger ep_size or draft tokens, or loosen the level" + (f" (put aside before: {counts})" if counts else "")
    )


def search_steps(
    scenario: Scenario,
    op_times: Times,
    evaluate: Evaluate,
    assess: Evaluate,
    executor: Executor | None = None,
    *,
    store: str | Path | None = None,
    progress: Progress | None = None,
) -> CapacityResult:
    """Answer which deployment decodes best: all candidates screened, the survivors simulated by ``evaluate``.

    ``evaluate`` gives tpot_s, usd_per_million_output_tokens and tokens_per_s_per_user of one simulated step;
    ``assess``, asked of the leading ones in turn, the same over all draws, each with ``_p5`` and ``_p95``, and the
    ``probability`` of keeping the level.

    Raises:
        CapacityError: nothing fits, or nothing keeps the level (says what is closest, or the physical limit).
    """
    search, limit_s = search_of(scenario), tpot_limit_s(scenario)
    if search.objective == "ttft_s":
        raise CapacityError(
            f"{scenario.where}: search.objective: ttft_s needs traffic; got a decode step; give serve: or another "
            "objective"
        )
    if limit_s is not None:
        check_draws(scenario.draws, search.probability, scenario.where)
    screened = screen_steps(scenario, op_times)
    check_reachable(scenario, screened.shapes, limit_s)
    at = survivors_of(screened, scenario, limit_s)
    began = time.perf_counter()
    points = sweep([screened.scenario(i) for i in at], evaluate, executor, store=store, progress=progress)
    rows = [Survivor(i, screened.row(i), p.figures, p.faults) for i, p in zip(at, points, strict=True)]
    winner, spread = choose(rows, screened, evaluate, assess, scenario, limit_s)
    kept = None if limit_s is None else screened.columns["tpot_s"] * spread <= limit_s
    spent = time.perf_counter() - began
    front = pareto(screened.columns, PARETO, kept)
    shown = [front[i] for i in np.unique(np.linspace(0, len(front) - 1, 60).round().astype(int))]
    return CapacityResult(
        scenario, winner, rows, [screened.row(i) for i in shown],
        binding(screened, winner, scenario, op_times, limit_s),
        why(screened, winner, scenario, kept), dict(screened.rejected.counts),
        fleet_rate(winner, scenario, screened.scenario(winner.at)),
        screened.looked_at, len(screened), screened.wall_s, spent, screened.interpolation_error,
        kendall(rows, search.objective), _notes(rows, scenario), screened,
    )  # fmt: skip


MOST_ASSESSED = 16
"""Leading candidates whose probability is found before the search gives up."""


def choose(
    rows: list[Survivor], screened: Screened, evaluate: Evaluate, assess: Evaluate, scenario: Scenario,
    limit_s: float | None,
) -> tuple[Survivor, Any]:  # fmt: skip
    """Return the best candidate that keeps the level with the probability asked for: simulated and assessed; and how
    far below the level each candidate must be for that (a factor on its time per token, [N]).

    The best is assessed first. If its chance is too low, its spread tells how far below the level the next one must
    be on that device, and the best of those comes next; what has not been simulated yet is, and joins ``rows``.

    Raises:
        CapacityError: none of those tried does; says the most likely one.
    """
    search = search_of(scenario)
    good = [row for row in rows if row.figures is not None]
    if not good:
        raise CapacityError(list(dict.fromkeys(fault for row in rows for fault in row.faults))[:10])
    if limit_s is None:
        values = ranking(screened, scenario)
        sense = OBJECTIVES[search.objective]
        is_ranked = search.output_tokens_per_s is not None or search.objective == "num_gpus"
        best = min(good, key=lambda row: values[row.at] if is_ranked else row.figure(search.objective) * sense)
        best.figures = {**(best.figures or {}), **assess(screened.scenario(best.at))}
        return best, 1.0
    values = ranking(screened, scenario)
    devices = np.array([shape.scenario.hardware.name for shape in screened.shapes])[screened.shape]
    spread = np.ones(len(values))
    open_ = np.ones(len(values), dtype=bool)
    tried: list[tuple[float, Survivor]] = []
    while len(tried) < MOST_ASSESSED:
        within = np.flatnonzero(open_ & (screened.columns["tpot_s"] * spread <= limit_s))
        if not len(within):
            break
        at = int(within[np.argmin(values[within])])
        open_[at] = False
        row = next((row for row in rows if row.at == at), None) or _simulated(screened, at, evaluate, rows)
        if row.figures is None:
            continue
        assessed = assess(screened.scenario(at))
        row.figures = {**row.figures, **assessed}
        chance = float(assessed.get("probability", assessed["tpot_s_at_probability"] <= limit_s))
        mine = devices == devices[at]
        if chance >= search.probability and assessed["tpot_s_at_probability"] <= limit_s:
            needed = max(float(spread[at]), float(assessed["tpot_s_at_probability"]) / screened.columns["tpot_s"][at])
            known = np.isin(devices, [devices[other.at] for _, other in tried])
            return row, np.where(mine | ~known, min(needed, limit_s / screened.columns["tpot_s"][at]), spread)
        tried.append((chance, row))
        needed = float(assessed["tpot_s_at_probability"]) / screened.columns["tpot_s"][at]
        spread[mine] = max(float(spread[mine][0]) * 1.01, needed)
    most = max(tried, key=lambda pair: pair[0], default=None)
    shown = "none could be simulated"
    if most is not None:
        chance, row = most
        shown = (
            f"the most likely of the {len(tried)} tried is {row.screened['deployment']} with "
            f"{row.screened['sequences_per_gpu']:g} sequences per GPU, at {row.figure('tpot_s') * 1e3:.4g} ms with "
            f"probability {chance:.2f}"
        )
    raise CapacityError(
        f"{scenario.where}: search.probability: expected a deployment within {limit_s * 1e3:.4g} ms with probability "
        f"{search.probability}; {shown}; loosen one of the two, or measure more (calibrate) to narrow the interval"
    )


def _simulated(screened: Screened, at: int, evaluate: Evaluate, rows: list[Survivor]) -> Survivor:
    """Simulate one more candidate and add it to ``rows``."""
    point = sweep([screened.scenario(at)], evaluate)[0]
    rows.append(Survivor(at, screened.row(at), point.figures, point.faults))
    return rows[-1]


def kendall(rows: Sequence[Survivor], name: str) -> float | None:
    """Return Kendall's tau between screened and simulated figures of what was simulated; None below three."""
    good = [row for row in rows if row.figures is not None and row.figures.get(name) is not None]
    if len(good) < 3:
        return None
    from scipy.stats import kendalltau

    found = float(kendalltau([row.screened[name] for row in good], [row.figure(name) for row in good]).statistic)
    return found if np.isfinite(found) else None


def _notes(rows: Sequence[Survivor], scenario: Scenario) -> list[str]:
    notes = []
    failed = [row for row in rows if row.figures is None]
    if failed:
        notes.append(f"{len(failed)} survivors could not be simulated, such as {failed[0].faults[0]}")
    leaning: dict[str, float] = {}
    for row in rows:
        got = row.figures or {}
        share = got.get("datasheet_share", 0.0) + got.get("extrapolated_share", 0.0)
        device = row.screened["changes"].get("hardware", scenario.hardware.name)
        leaning[device] = max(share, leaning.get(device, 0.0))
    for device, share in leaning.items():
        if share > 0.2:
            notes.append(
                f"{device}: up to {share:.0%} of a step's op time was not measured there, but carried over from other "
                "devices or sizes, or read off the data sheet: its intervals are wide, and its place may change"
            )
    search = search_of(scenario)
    if len(search.hardware) > 1 and scenario.price.usd_per_gpu_hour is not None:
        notes.append(
            "price.usd_per_gpu_hour is one price for all devices; give price.hardware_usd_per_gpu_hour instead, and "
            "--set price.usd_per_gpu_hour=null"
        )
    return notes
