"""Published prices come out of the price functions, and a bill's lines add up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longcat_sim.capacity.price import Bill, Work, bill, month_usd, usd_per_million_tokens
from longcat_sim.errors import CapacityError
from longcat_sim.specs.hardware import load_hardware
from longcat_sim.specs.price import Owned, Price


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
                paid_gpu_s=paid_gpu_s, input_gpu_s=prefill_gpu_s * scale, cached_gpu_s=0.0,
                output_gpu_s=decode_gpu_s * scale,
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


def _bill() -> Bill:
    work = Work(
        paid_gpu_s=7200, input_gpu_s=1800, cached_gpu_s=360, output_gpu_s=3600, input_tokens=1e6, cached_tokens=2e6,
        output_tokens=5e5,
    )  # fmt: skip
    return bill([work], 3.0)


def test_requests_add_up_to_the_bill() -> None:
    """All tokens of the bill, priced as requests, cost the whole bill."""
    made = _bill()
    assert made.request_usd(3e6, 5e5, 2e6) == pytest.approx(made.total_usd, rel=1e-12)
    assert made.session_usd([(1.5e6, 2.5e5, 1e6)] * 2) == pytest.approx(made.total_usd, rel=1e-12)
    with pytest.raises(CapacityError, match="cached_tokens: expected 0"):
        made.request_usd(10, 1, 11)


def test_utilisation_changes_the_idle_line_only() -> None:
    made = _bill()
    assert made.utilisation == pytest.approx(0.8)
    half = made.at_utilisation(0.4)
    assert half.total_usd == pytest.approx(2 * made.total_usd)
    assert half.output_usd == made.output_usd
    assert sum(half.lines_usd.values()) == pytest.approx(half.total_usd, rel=1e-12)
    assert half.usd_per_million_output_tokens == pytest.approx(2 * made.usd_per_million_output_tokens)  # type: ignore[operator]
    with pytest.raises(CapacityError, match="utilisation: expected a share"):
        made.at_utilisation(0.0)


def test_an_owned_gpu_hour_is_written_off_and_powered() -> None:
    """30,000 USD over 4 years: 0.8556 USD/h; 5 % on half of it: 0.0856; 1.37 kW at PUE 1.3 and 0.1 USD: 0.1781."""
    hardware = load_hardware("h800-sxm")
    price = Price(
        basis="owned", owned=Owned(purchase_usd_per_gpu=30000, network_usd_per_gpu=4000, interest_per_year=0.05),
        usd_per_kwh=0.1, pue=1.3,
    )  # fmt: skip
    lines = price.gpu_hour_usd(hardware)
    assert lines["amortisation"] == pytest.approx(30000 / 4 / 8766 + 15000 * 0.05 / 8766)
    assert lines["network"] == pytest.approx(lines["amortisation"] * 4 / 30)
    assert lines["power"] == pytest.approx(1.37 * 1.3 * 0.1)
    idle = hardware.model_copy(update={"idle_power": 300.0})
    half = price.model_copy(update={"utilisation": 0.5})
    assert half.gpu_hour_usd(idle)["power"] == pytest.approx((1.37 + 0.3) / 2 * 1.3 * 0.1)
    made = _bill()
    assert sum(made.by_gpu_hour(lines).values()) == pytest.approx(made.total_usd, rel=1e-12)


def test_a_month_of_the_published_fleet() -> None:
    """30.4375 of DeepSeek's days at 87,072 USD."""
    assert month_usd(226.75 * 8, 2.0) == pytest.approx(87072 * 30.4375)


def test_a_rent_and_a_purchase_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="expected owned exactly when basis is owned"):
        Price(basis="owned")
    with pytest.raises(ValueError, match="expected either a rent or owned"):
        Price(basis="owned", owned=Owned(purchase_usd_per_gpu=1.0), usd_per_gpu_hour=2.0)
