"""Means and shares with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> dict[str, float | int | None]:
    """Return the mean with a t interval over independent repeats; no interval from a single one."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return {"mean": mean, "low": None, "high": None, "repeats": count}
    from scipy.stats import t

    spread = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (count - 1) / count)
    half = float(t.ppf((1 + confidence) / 2, count - 1)) * spread
    return {"mean": mean, "low": mean - half, "high": mean + half, "repeats": count}


def share_interval(right: int, trials: int, confidence: float = 0.95) -> dict[str, float | int]:
    """Return a share with its exact binomial interval. Source: Clopper and Pearson, Biometrika 26 (1934)."""
    from scipy.stats import beta

    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, right, trials - right + 1)) if right else 0.0
    high = float(beta.ppf(1 - tail, right + 1, trials - right)) if right < trials else 1.0
    return {"mean": right / trials, "low": low, "high": high, "right": right, "trials": trials}
