"""Gather the study's pieces: means with intervals over windows, needles and seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from longcat_sim.studies.statistics import mean_interval, share_interval

FIGURES = ("kl_nats", "nll_change_nats", "top1_same", "mass", "output_error", "precision", "entropy")


def fidelity(windows: Sequence[dict], indexers: Sequence[dict]) -> list[dict[str, Any]]:
    """Return one row per setting and context: its description and the mean of each figure over the windows."""
    groups: dict[tuple, list[dict]] = {}
    tested = [(w["context_tokens"], w["settings"]) for w in windows]
    tested += [(part["context_tokens"], w["settings"]) for part in indexers for w in part["windows"]]
    for context_tokens, settings in tested:
        for row in settings:
            described = {"context_tokens": context_tokens, **{k: v for k, v in row.items() if k not in FIGURES}}
            groups.setdefault(tuple(described.items()), []).append(row)
    return [
        {**dict(key), **{name: mean_interval([row[name] for row in rows]) for name in FIGURES}}
        for key, rows in groups.items()
    ]


def heads(windows: Sequence[dict]) -> dict[str, Any]:
    """Return entropy and dropped mass of every layer and head, averaged over the windows, and how the bound fared."""
    seen = [w["heads"] for w in windows if "heads" in w]
    by_head: dict[str, list[list[float]]] = {
        name: [
            [math.fsum(values) / len(seen) for values in zip(*layer, strict=True)]
            for layer in zip(*(part[name] for part in seen), strict=True)
        ]
        for name in ("entropy_nats", "dropped")
    }
    x, y = ([v for layer in by_head[name] for v in layer] for name in ("entropy_nats", "dropped"))
    return {
        **by_head,
        "kept": seen[0]["kept"],
        "rows_checked": sum(part["rows_checked"] for part in seen),
        "bound_violations": sum(part["bound_violations"] for part in seen),
        "correlation": _correlation(x, y),
    }


def _correlation(x: Sequence[float], y: Sequence[float]) -> float:
    mean_x, mean_y = math.fsum(x) / len(x), math.fsum(y) / len(y)
    dx, dy = [v - mean_x for v in x], [v - mean_y for v in y]
    scale = math.sqrt(math.fsum(v * v for v in dx) * math.fsum(v * v for v in dy))
    return math.fsum(a * b for a, b in zip(dx, dy, strict=True)) / scale if scale else 0.0


def indexer(study: dict[str, Any]) -> dict[str, Any]:
    """Return the indexers' figures by layer, and their means over layers with intervals over the windows."""
    windows = [w["by_layer"] for w in study["windows"]]
    names = list(windows[0][0])
    return {
        **{k: v for k, v in study.items() if k != "windows"},
        "means": {
            name: mean_interval([math.fsum(row[name] for row in layers) / len(layers) for layers in windows])
            for name in names
        },
        "by_layer": [
            {name: math.fsum(row[name] for row in rows) / len(rows) for name in names}
            for rows in zip(*windows, strict=True)
        ],
    }


def needles(found: Sequence[dict]) -> dict[str, Any]:
    """Return the share of needles found by setting, and its paired difference from dense attention."""
    settings = list(found[0]["right"])
    return {
        "prompt_tokens": max(x["prompt_tokens"] for x in found),
        "settings": {s: share_interval(sum(x["right"][s] for x in found), len(found)) for s in settings},
        "difference_from_dense": {
            s: mean_interval([float(x["right"][s]) - float(x["right"]["dense 1"]) for x in found]) for s in settings
        },
    }


def recall(runs: Sequence[dict]) -> dict[str, Any]:
    """Return accuracy by model, pairs and decode, and paired differences, with intervals over the seeds."""
    models, pairs = list(runs[0]["accuracy"]), list(runs[0]["accuracy"]["base"])
    decodes = list(runs[0]["accuracy"]["base"][pairs[0]])

    def change(of: str, minus: str, name: str, p: str, d: str | None) -> dict[str, Any]:
        def value(run: dict, model: str) -> float:
            found = run[name][model][p]
            return found[d] if d is not None else found

        return mean_interval([value(run, of) - value(run, minus) for run in runs])

    return {
        "seeds": [run["seed"] for run in runs],
        "kept_in_training": runs[0]["kept_in_training"],
        "loss": {m: mean_interval([run["loss"][m] for run in runs]) for m in models},
        "accuracy": {
            m: {p: {d: mean_interval([run["accuracy"][m][p][d] for run in runs]) for d in decodes} for p in pairs}
            for m in models
        },
        "entropy_nats": {m: {p: mean_interval([run["entropy"][m][p] for run in runs]) for p in pairs} for m in models},
        "sft_minus_control": {
            p: {d: change("topk_sft", "dense_control", "accuracy", p, d) for d in decodes} for p in pairs
        },
        "entropy_sft_minus_control": {p: change("topk_sft", "dense_control", "entropy", p, None) for p in pairs},
        "entropy_sft_minus_base": {p: change("topk_sft", "base", "entropy", p, None) for p in pairs},
    }
