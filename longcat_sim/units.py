"""Parse and print quantities with units: ``3.35 TB/s`` is 3.35e12 bytes per second, one direction.

``b`` is bit, ``B`` byte, ``G`` 10⁹, ``Gi`` 2³⁰. Factors are ``Decimal``: in binary floating point 5 * 1e-6 is not
5e-6, and a what-if must be able to ask whether a figure is still the default.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal

# dimension -> example shown in messages
EXAMPLES: dict[str, str] = {
    "B/s": "3.35 TB/s",
    "B": "80 GiB",
    "s": "5 us",
    "FLOP/s": "989 TFLOP/s",
    "W": "700 W",
    "USD/h": "2.50 USD/h",
    "1/s": "3.5 /s",
}


def _table() -> dict[str, tuple[str, Decimal]]:
    units: dict[str, tuple[str, Decimal]] = {
        "s": ("s", Decimal(1)),
        "ms": ("s", Decimal("1e-3")),
        "us": ("s", Decimal("1e-6")),
        "µs": ("s", Decimal("1e-6")),
        "ns": ("s", Decimal("1e-9")),
        "min": ("s", Decimal(60)),
        "h": ("s", Decimal(3600)),
        "W": ("W", Decimal(1)),
        "kW": ("W", Decimal(1000)),
        "USD/h": ("USD/h", Decimal(1)),
        "/s": ("1/s", Decimal(1)),
        "/min": ("1/s", Decimal(1) / 60),
        "/h": ("1/s", Decimal(1) / 3600),
    }
    for power, prefix in enumerate(["", "k", "M", "G", "T", "P"]):
        factor = Decimal(1000) ** power
        units[f"{prefix}B"] = ("B", factor)
        units[f"{prefix}B/s"] = ("B/s", factor)
        units[f"{prefix}b/s"] = ("B/s", factor / 8)
        units[f"{prefix}FLOP/s"] = ("FLOP/s", factor)
    for power, prefix in enumerate(["Ki", "Mi", "Gi", "Ti"], start=1):
        units[f"{prefix}B"] = ("B", Decimal(1024) ** power)
        units[f"{prefix}B/s"] = ("B/s", Decimal(1024) ** power)
    return units


UNITS = _table()
_NUMBER = re.compile(r"\s*([-+]?(?:[0-9][0-9_]*(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)\s*([A-Za-zµ/]*)\s*")


def parse(text: object, dimension: str) -> float:
    """Return a quantity such as ``"3.35 TB/s"`` in the base unit of ``dimension``.

    Raises:
        ValueError: not a string, no number, an unknown unit, or a unit of another dimension.
    """
    hint = f"expected a quantity in {dimension}, such as '{EXAMPLES[dimension]}'"
    if not isinstance(text, str):
        raise ValueError(f"{hint}; got the bare number {text!r}; write its unit")
    match = _NUMBER.fullmatch(text)
    if not match:
        raise ValueError(f"{hint}; got {text!r}; write a number and a unit")
    if not match[2]:
        raise ValueError(f"{hint}; got the bare number {text!r}; write its unit")
    if match[2] not in UNITS:
        known = ", ".join(unit for unit, (of, _) in UNITS.items() if of == dimension)
        raise ValueError(f"{hint}; got {text!r} with the unknown unit {match[2]!r}; use one of {known}")
    found, factor = UNITS[match[2]]
    if found != dimension:
        raise ValueError(f"{hint}; got {text!r}, which is in {found}; use a unit of {dimension}")
    value = float(Decimal(match[1]) * factor)
    if math.isinf(value):
        raise ValueError(f"{hint}; got {text!r}; give a finite one")
    return value


def show(value: float, dimension: str) -> str:
    """Return a quantity for people, with the largest decimal prefix that keeps the number at 1 or above."""
    decimal = [
        (float(factor), unit)
        for unit, (of, factor) in UNITS.items()
        if of == dimension and "i" not in unit and "b" not in unit and unit not in ("µs", "min", "h", "/min", "/h")
    ]
    for factor, unit in sorted(decimal, reverse=True):
        if abs(value) >= factor:
            return f"{value / factor:.4g} {unit}"
    factor, unit = min(decimal)
    return f"{value / factor:.4g} {unit}"
