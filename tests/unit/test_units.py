"""Quantities: parsed exactly, printed readably, refused with a remedy."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longcat_sim import units


@pytest.mark.parametrize(
    ("text", "dimension", "value"),
    [
        ("3.35 TB/s", "B/s", 3.35e12),
        ("400 Gb/s", "B/s", 50e9),
        ("80 GiB", "B", 80 * 2**30),
        ("5 us", "s", 5e-6),
        ("989 TFLOP/s", "FLOP/s", 989e12),
        ("2.50 USD/h", "USD/h", 2.5),
        ("1.5 kW", "W", 1500.0),
        ("90 /min", "1/s", 1.5),
        ("1e3 GB/s", "B/s", 1e12),
    ],
)
def test_parse_is_exact(text: str, dimension: str, value: float) -> None:
    assert units.parse(text, dimension) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (3.35e12, "bare number 3350000000000.0; write its unit"),
        ("3.35e12", "bare number '3.35e12'; write its unit"),
        ("3.35 TB", "which is in B; use a unit of B/s"),
        ("3.35 TX/s", "unknown unit 'TX/s'"),
        ("fast", "write a number and a unit"),
        (None, "expected a quantity in B/s, such as '3.35 TB/s'"),
    ],
)
def test_parse_refuses_with_a_remedy(text: object, words: str) -> None:
    with pytest.raises(ValueError) as error:
        units.parse(text, "B/s")
    assert words in str(error.value)


@given(st.floats(1e-9, 1e18), st.sampled_from(["B/s", "B", "s", "FLOP/s"]))
def test_show_reads_back(value: float, dimension: str) -> None:
    assert units.parse(units.show(value, dimension), dimension) == pytest.approx(value, rel=1e-3)
