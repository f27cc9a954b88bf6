"""Published prices come out of the price functions, and a bill's lines add up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longcat_sim.capacity.price import Work, bill, usd_per_million_tokens


def test_longcat_100_tokens_per_second_row() -> None:
    """804 tokens/s/GPU at 2 USD/h: 0.691 USD (LongCat-Flash report, Table 6 and section 6.3.1)."""
    assert usd_per_million_tokens(2.0, 804) == pytest.approx(0.691, abs=5e-4)


def test_longcat_theory_price() -> None:
    """96 sequences per GPU at 16 ms per token: 0.09 USD, truncated (Table 7)."""
    assert usd_per_million_tokens(2.0, 96 / 16e-3) == pytest.approx(0.0926, abs=5e-5)


def test_deepseek_published_day() -> None:
    """226.75 nodes of 8 GPUs for 24 h at 2 USD/h cost 87,072 USD (DeepSeek open-infra-index, day 6)."""
    paid_gpu_s = 226.75 * 8 * 86400
    decode_gpu_s = 168e9 / 14.8e3 * 8  # 14.8k output tokens/s per node
    prefill_gpu_s = 608e9 / 73.7e3 * 8  # 73.7k input tokens/s per node, cache hits included
    # the published rates (three digits) explain the published fleet
    assert prefill_gpu_s + decode_gpu_s == pytest.approx(paid_gpu_s, rel=2e-3)
    scale = paid_gpu_s / (prefill_gpu_s + decode_gpu_s)
    day = bill(
        [
            Work(
                paid_gpu_s=paid_gpu_s, input_gpu_s=prefill_gpu_s * scale, cached_gpu_s=0.0, output_gpu_s=decode_gpu_s * scale,
                input_tokens=608e9 - 342e9, cached_tokens=342e9, output_tokens=168e9,
            )
        ],
        2.0,
    )  # fmt: skip
    assert day.total_usd == pytest.approx(87072, rel=1e-9)
    assert day.usd_per_million_output_tokens_all_in == pytest.approx(0.518, abs=5e-4)
    assert day.idle_usd == pytest.approx(0, abs=1e-3)


shares = st.floats(0, 1)


@given(st.lists(st.tuples(st.floats(1, 1e9), shares, shares, shares), min_size=1, max_size=5), st.floats(0.01, 100))
def test_lines_add_up(pools: list[tuple[float, float, float, float]], price: float) -> None:
    work = []
    for paid, a, b, c in pools:
        total = max(a + b + c, 1.0)
        work.append(
            Work(
                paid_gpu_s=paid, input_gpu_s=paid * a / total, cached_gpu_s=paid * b / total,
                output_gpu_s=paid * c / total, input_tokens=10, cached_tokens=20, output_tokens=30,
            )
        )  # fmt: skip
    made = bill(work, price)
    lines = made.input_usd + made.cached_input_usd + made.output_usd + made.idle_usd
    assert lines == pytest.approx(made.gpu_hours * price, rel=1e-9)


@pytest.mark.parametrize("price", [0.0, -1.0, float("nan")])
def test_a_price_is_positive(price: float) -> None:
    with pytest.raises(ValueError, match="usd_per_gpu_hour: expected more than 0"):
        usd_per_million_tokens(price, 100)
