"""What sparse attention saves at which context: the simulated step, dense beside sparse, and where they cross.

Both are the same scenario but for the indexer: same layout, same routing draws, same draws of the calibration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from longcat_sim.calibration import OpTimes
from longcat_sim.errors import SpecError
from longcat_sim.simulation.step import simulate_draws, step_memory, step_size
from longcat_sim.specs.scenario import Scenario
from longcat_sim.studies.simulate import step_figures

CONTEXTS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
INDEXER = {"index_topk": 2048, "index_n_heads": 64, "index_head_dim": 128}
"""Sizes of DeepSeek-V3.2-Exp's indexer, lent to a model without one. Source: its config.json."""


def price_against_context(scenario: Scenario, contexts: Sequence[int] = CONTEXTS) -> dict[str, Any]:
    """Return step seconds and price of the scenario with and without its indexer at each context, and the crossover.

    A model without an indexer is lent DeepSeek-V3.2's. Contexts that do not fit in device memory are priced too and
    say so. The crossover is the context from which sparse is faster, interpolated in log of context and ratio; None
    where it does not happen in the range; ``is_below_range`` where sparse is faster from the start.

    Raises:
        SpecError: no step, not MLA, or contexts that do not rise.
    """
    if scenario.step is None or not scenario.model.is_mla:
        raise SpecError(f"{scenario.where}: expected a step of a model with MLA, such as deepseek-v3.2-h800-decode")
    if list(contexts) != sorted(set(contexts)) or len(contexts) < 2 or contexts[0] < 1:
        raise SpecError(f"contexts: expected two or more rising numbers, such as {CONTEXTS}; got {tuple(contexts)}")
    own = scenario.model.index_topk > 0
    indexer = {} if own else {f"model.{key}": value for key, value in INDEXER.items()}
    op_times = OpTimes.from_hardware(scenario.hardware)
    rows, ratios = [], []
    for context in contexts:
        key = "step.context_tokens" if scenario.step.phase == "decode" else "step.prompt_tokens"
        row: dict[str, Any] = {"context_tokens": context}
        step = {}
        for name, changes in (("dense", {"model.index_topk": 0}), ("sparse", indexer)):
            changed = scenario.what_if({**changes, key: context})
            draws = simulate_draws(changed, op_times, seed=scenario.seed)
            step[name] = draws.step_s
            row[f"{name}_s"] = float(np.median(draws.step_s))
            row[f"{name}_interval_s"] = [float(x) for x in np.quantile(draws.step_s, (0.05, 0.95))]
            found = step_memory(changed)
            row[f"{name}_memory_bytes_per_gpu"] = float(found.total_bytes)
            row["fits"] = row.get("fits", True) and found.fits
            for figure, values in step_figures(changed, draws).items():
                if figure.startswith("usd_per_million"):
                    row[f"{name}_{figure}"] = float(np.median(values))
        ratio = step["dense"] / step["sparse"]
        ratios.append(ratio)
        row["dense_over_sparse"] = float(np.median(ratio))
        row["dense_over_sparse_interval"] = [float(x) for x in np.quantile(ratio, (0.05, 0.95))]
        rows.append(row)
    each = [crossover(contexts, [float(r[i]) for r in ratios]) for i in range(len(ratios[0]))]
    inside = sorted(x for x in each if x is not None)
    return {
        "scenario": scenario.name,
        "model": scenario.model.name,
        "hardware": scenario.hardware.name,
        "sequences_per_gpu": float(step_size(scenario).sequences),
        "index_topk": scenario.model.index_topk or INDEXER["index_topk"],
        "is_indexer_lent": not own,
        "rows": rows,
        "crossover_tokens": crossover(contexts, [row["dense_over_sparse"] for row in rows]),
        "crossover_interval_tokens": [float(x) for x in np.quantile(inside, (0.05, 0.95))] if inside else None,
        "is_below_range": rows[0]["dense_over_sparse"] > 1,
    }


def crossover(contexts: Sequence[int], ratios: Sequence[float]) -> float | None:
    """Return the context from which dense over sparse stays above 1, or None if it never or always is."""
    above = [ratio > 1 for ratio in ratios]
    if all(above) or not above[-1]:
        return None
    last_below = max(i for i, is_above in enumerate(above) if not is_above)
    x0, x1 = math.log(contexts[last_below]), math.log(contexts[last_below + 1])
    y0, y1 = math.log(ratios[last_below]), math.log(ratios[last_below + 1])
    return math.exp(x0 + (x1 - x0) * (0 - y0) / (y1 - y0))
