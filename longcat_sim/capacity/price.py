"""What tokens cost: GPU-hours × price, split so that the lines add up to the bill.

Every figure names its basis. ``decode_gpus``: only the GPUs that decode are paid (how the LongCat-Flash and DeepSeek
reports count). ``fleet``: every GPU-hour of the fleet is paid, idle ones included.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from longcat_sim.errors import CapacityError
from longcat_sim.specs.price import HOURS_PER_MONTH

SECONDS_PER_HOUR = 3600.0
MILLION = 1e6


def usd_per_million_tokens(
    usd_per_gpu_hour: float, tokens_per_s_per_gpu: float, utilisation: float = 1.0
) -> float:  # fmt: skip
    """Return USD per million tokens of GPUs that make ``tokens_per_s_per_gpu`` during ``utilisation`` of paid time.

    Raises:
        CapacityError: a price, rate or utilisation that is not positive.
    """
    for name, value in (
        ("usd_per_gpu_hour", usd_per_gpu_hour),
        ("tokens_per_s_per_gpu", tokens_per_s_per_gpu),
        ("utilisation", utilisation),
    ):
        if not value > 0:
            raise CapacityError(f"{name}: expected more than 0, such as 2.0; got {value!r}; mend it")
    return usd_per_gpu_hour / SECONDS_PER_HOUR / (tokens_per_s_per_gpu * utilisation) * MILLION


@dataclass(frozen=True, kw_only=True)
class Work:
    """GPU-seconds that one pool spent, and the tokens they made.

    The rule for mixed batches: busy GPU-seconds are split between prefill and decode in the ratio of what the prompt
    and the output tokens would take in steps of their own, at the run's mean sizes (the step model gives both); what
    is left of the paid time is idle.
    """

    paid_gpu_s: float
    input_gpu_s: float
    """Computing the KV cache of input tokens that were not cached."""
    cached_gpu_s: float
    """Reading the KV cache of input tokens that were: attention over them during prefill, and their transfer."""
    output_gpu_s: float
    input_tokens: float
    cached_tokens: float
    output_tokens: float
    usd_per_gpu_hour: float | None = None
    """Of this pool's device; the bill's where not given."""


@dataclass(frozen=True, kw_only=True)
class Bill:
    """The lines of a fleet's bill in USD. They add up to GPU-hours × price."""

    gpu_hours: float
    usd_per_gpu_hour: float
    input_usd: float
    cached_input_usd: float
    output_usd: float
    idle_usd: float
    input_tokens: float
    cached_tokens: float
    output_tokens: float

    @property
    def total_usd(self) -> float:
        """GPU-hours × price."""
        return self.gpu_hours * self.usd_per_gpu_hour

    def _per_million(self, line_usd: float, tokens: float) -> float | None:
        """Return the line's price with its share of the idle line (in proportion to the lines), per million tokens."""
        busy = self.total_usd - self.idle_usd
        if not tokens or not busy:
            return None
        return line_usd * (self.total_usd / busy) / tokens * MILLION

    @property
    def usd_per_million_input_tokens(self) -> float | None:
        """Of tokens that had to be computed, idle time included; None where there were none."""
        return self._per_million(self.input_usd, self.input_tokens)

    @property
    def usd_per_million_cached_input_tokens(self) -> float | None:
        """Of tokens found in the prefix cache, idle time included; None where there were none."""
        return self._per_million(self.cached_input_usd, self.cached_tokens)

    @property
    def usd_per_million_output_tokens(self) -> float | None:
        """Of generated tokens, idle time included; None where there were none."""
        return self._per_million(self.output_usd, self.output_tokens)

    @property
    def usd_per_million_output_tokens_all_in(self) -> float | None:
        """The whole bill over the output tokens, as a provider that bills output alone would count."""
        return self.total_usd / self.output_tokens * MILLION if self.output_tokens else None

    @property
    def lines_usd(self) -> dict[str, float]:
        """The bill by what was done; the lines add up to ``total_usd``."""
        return {
            "input": self.input_usd, "cached_input": self.cached_input_usd, "output": self.output_usd,
            "idle": self.idle_usd,
        }  # fmt: skip

    @property
    def utilisation(self) -> float:
        """Share of the paid time that was spent on tokens."""
        return 1 - self.idle_usd / self.total_usd if self.total_usd else 0.0

    def figures(self) -> dict[str, Any]:
        """Return what every command prints of a bill: prices per million tokens, GPU-hours, and the lines in USD."""
        return {
            "usd_per_million_input_tokens": self.usd_per_million_input_tokens,
            "usd_per_million_cached_input_tokens": self.usd_per_million_cached_input_tokens,
            "usd_per_million_output_tokens": self.usd_per_million_output_tokens,
            "usd_per_million_output_tokens_all_in": self.usd_per_million_output_tokens_all_in,
            "gpu_hours": self.gpu_hours, "bill_usd": {**self.lines_usd, "total": self.total_usd},
        }  # fmt: skip

    def by_gpu_hour(self, gpu_hour_usd: Mapping[str, float]) -> dict[str, float]:
        """Return the bill by what an hour is paid for (rent, power, amortisation, network, ..); it adds up too."""
        whole = sum(gpu_hour_usd.values())
        return {name: self.total_usd * usd / whole for name, usd in gpu_hour_usd.items()}

    def at_utilisation(self, utilisation: float) -> Bill:
        """Return the bill of the same work on a fleet whose paid time is used to ``utilisation``.

        Raises:
            CapacityError: a utilisation outside (0, 1].
        """
        if not 0 < utilisation <= 1:
            raise CapacityError(f"utilisation: expected a share in (0, 1], such as 0.6; got {utilisation!r}; mend it")
        busy_usd = self.total_usd - self.idle_usd
        gpu_hours = busy_usd / self.usd_per_gpu_hour / utilisation
        return replace(self, gpu_hours=gpu_hours, idle_usd=gpu_hours * self.usd_per_gpu_hour - busy_usd)

    def request_usd(self, input_tokens: float, output_tokens: float, cached_tokens: float = 0.0) -> float:
        """Return what one request costs at the bill's prices per token; ``input_tokens`` includes the cached ones.

        Raises:
            CapacityError: tokens of a class that the bill has no price for, or more cached than input.
        """
        if not 0 <= cached_tokens <= input_tokens:
            raise CapacityError(
                f"cached_tokens: expected 0..input_tokens ({input_tokens:g}); got {cached_tokens:g}; mend it"
            )
        total = 0.0
        for name, count, price in (
            ("input", input_tokens - cached_tokens, self.usd_per_million_input_tokens),
            ("cached input", cached_tokens, self.usd_per_million_cached_input_tokens),
            ("output", output_tokens, self.usd_per_million_output_tokens),
        ):
            if count and price is None:
                raise CapacityError(f"{name} tokens: expected none, for the bill has none to price; got {count:g}")
            total += count * (price or 0.0) / MILLION
        return total

    def session_usd(self, turns: Sequence[tuple[float, float, float]]) -> float:
        """Return what a session costs: its turns as (input, output, cached tokens)."""
        return sum(self.request_usd(*turn) for turn in turns)


def month_usd(num_gpus: float, usd_per_gpu_hour: float) -> float:
    """Return what a fleet costs that is paid every hour of a month (730.5 h)."""
    return num_gpus * usd_per_gpu_hour * HOURS_PER_MONTH


def bill(pools: list[Work], usd_per_gpu_hour: float) -> Bill:
    """Return the bill of a fleet of pools.

    Raises:
        CapacityError: a price that is not positive.
    """
    if not usd_per_gpu_hour > 0:
        raise CapacityError(f"usd_per_gpu_hour: expected more than 0, such as 2.0; got {usd_per_gpu_hour!r}; mend it")
    rates = [(pool.usd_per_gpu_hour or usd_per_gpu_hour) / SECONDS_PER_HOUR for pool in pools]
    seconds = sum(pool.paid_gpu_s for pool in pools)
    paid = sum(pool.paid_gpu_s * rate for pool, rate in zip(pools, rates, strict=True))
    computed = sum(pool.input_gpu_s * rate for pool, rate in zip(pools, rates, strict=True))
    cached = sum(pool.cached_gpu_s * rate for pool, rate in zip(pools, rates, strict=True))
    output = sum(pool.output_gpu_s * rate for pool, rate in zip(pools, rates, strict=True))
    idle = paid - computed - cached - output
    assert idle >= -1e-9 * max(paid, 1.0), f"busy {computed + cached + output} USD of {paid} paid"
    return Bill(
        gpu_hours=seconds / SECONDS_PER_HOUR,
        usd_per_gpu_hour=paid / seconds * SECONDS_PER_HOUR if seconds else usd_per_gpu_hour,
        input_usd=computed,
        cached_input_usd=cached,
        output_usd=output,
        idle_usd=max(idle, 0.0),  # not less but for rounding
        input_tokens=sum(pool.input_tokens for pool in pools),
        cached_tokens=sum(pool.cached_tokens for pool in pools),
        output_tokens=sum(pool.output_tokens for pool in pools),
    )
