"""What every verb prints: one JSON document on stdout, everything else on stderr."""

from __future__ import annotations

import json
import math
import sys
from typing import Any


def say(text: str) -> None:
    """Print progress or a remark to stderr."""
    print(text, file=sys.stderr)


def print_json(document: Any) -> None:
    """Print exactly one JSON document on stdout.

    Raises:
        AssertionError: a NaN or an infinity reached a result, which is our bug.
    """
    text = json.dumps(_finite(document, "$"), indent=2, allow_nan=False)
    sys.stdout.write(text + "\n")


def _finite(value: Any, at: str) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(inner, f"{at}.{key}") for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner, f"{at}[{index}]") for index, inner in enumerate(value)]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    if isinstance(value, float):
        assert math.isfinite(value), f"{at} is {value}"
    return value
