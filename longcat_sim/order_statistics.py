"""The largest of several: what a barrier waits for."""

from __future__ import annotations

from typing import Any


def largest_quantile(count: Any) -> Any:
    """Return the quantile at which the expected largest of ``count`` draws of one distribution lies; arrays too.

    Source: G. Blom, Statistical Estimates and Transformed Beta-Variables (1958), eq. 6.10.
    """
    return (count - 0.375) / (count + 0.25)
