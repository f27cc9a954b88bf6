"""Means and shares with intervals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence


def half_width(values: Sequence[float], confidence: float = 0.95) -> float:
    """Return half of the mean's t interval over independent repeats; of a single one it is unbounded."""
    count = len(values)
    if count < 2:
        return math.inf
    from scipy.stats import t

    return float(t.ppf((1 + confidence) / 2, count - 1)) * statistics.stdev(values) / math.sqrt(count)


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> dict[str, float | int | None]:
    """Return the mean with its t interval; no interval from a single repeat."""
    mean, half = statistics.fmean(values), half_width(values, confidence)
    low, high = (mean - half, mean + half) if math.isfinite(half) else (None, None)
    return {"mean": mean, "low": low, "high": high, "repeats": len(values)}


def share_interval(right: int, trials: int, confidence: float = 0.95) -> dict[str, float | int]:
    """Return a share with its exact binomial interval. Source: Clopper and Pearson, Biometrika 26 (1934)."""
    from scipy.stats import beta

    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, right, trials - right + 1)) if right else 0.0
    high = float(beta.ppf(1 - tail, right + 1, trials - right)) if right < trials else 1.0
    return {"mean": right / trials, "low": low, "high": high, "right": right, "trials": trials}
