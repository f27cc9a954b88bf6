"""``Claim``: one published claim beside what a small run shows, with its interval; and means over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from longcat_sim.studies.statistics import half_width

Verdict = Literal["shown at this scale", "refuted at this scale", "undecided at this scale", "not testable here"]


class Interval(NamedTuple):
    """A mean over seeds and its 95 % confidence interval (Student's t)."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def over_seeds(values: Sequence[float]) -> Interval:
    """Return mean and 95 % interval of one figure per seed; of a single seed the interval is unbounded."""
    mean, half = statistics.fmean(values), half_width(values)
    return Interval(mean, mean - half, mean + half)


@dataclass(frozen=True)
class Claim:
    """One line of the table."""

    name: str
    published: str
    here: str
    verdict: Verdict
    detail: str = ""

    def to_json(self) -> dict[str, str]:
        """Return the line as a JSON object."""
        return {
            "claim": self.name,
            "published": self.published,
            "here": self.here,
            "verdict": self.verdict,
            "detail": self.detail,
        }


def verdict(shown: bool, refuted: bool) -> Verdict:
    """Return the verdict of a test; undecided where the interval allows both."""
    if shown:
        return "shown at this scale"
    return "refuted at this scale" if refuted else "undecided at this scale"


def table(claims: Sequence[Claim]) -> str:
    """Return the claims as lines of text."""
    return "\n".join(
        f"[{c.verdict}] {c.name}\n    published: {c.published}\n    here: {c.here}"
        + (f"\n    {c.detail}" if c.detail else "")
        for c in claims
    )


def finite(value: Any) -> Any:
    """Return a JSON document with infinities and NaN as null."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
