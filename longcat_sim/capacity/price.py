"""What tokens cost: GPU-hours × price, split so that the lines add up to the bill.

Every figure names its basis. ``decode_gpus``: only the GPUs that decode are paid (how the LongCat-Flash and DeepSeek
reports count). ``fleet``: every GPU-hour of the fleet is paid, idle ones included.
"""

from __future__ import annotations

from dataclasses import dataclass

SECONDS_PER_HOUR = 3600.0
MILLION = 1e6


def usd_per_million_tokens(
    usd_per_gpu_hour: float, tokens_per_s_per_gpu: float, utilisation: float = 1.0
) -> float:  # fmt: skip
    """Return USD per million tokens of GPUs that make ``tokens_per_s_per_gpu`` during ``utilisation`` of paid time.

    Raises:
        ValueError: a price, rate or utilisation that is not positive.
    """
    for name, value in (
        ("usd_per_gpu_hour", usd_per_gpu_hour),
        ("tokens_per_s_per_gpu", tokens_per_s_per_gpu),
        ("utilisation", utilisation),
    ):
        if not value > 0:
            raise ValueError(f"{name}: expected more than 0, such as 2.0; got {value!r}")
    return usd_per_gpu_hour / SECONDS_PER_HOUR / (tokens_per_s_per_gpu * utilisation) * MILLION


def power_usd_per_gpu_hour(all_in_watts: float, usd_per_kwh: float, pue: float = 1.0) -> float:
    """Return what an hour of a GPU's power costs, cooling and losses by ``pue``."""
    return all_in_watts / 1000.0 * pue * usd_per_kwh


@dataclass(frozen=True, kw_only=True)
class Work:
    """GPU-seconds that one pool spent, and the tokens they made.

    The rule for mixed batches: a step's GPU-seconds are split between its prefill and its decode part by the time each
    part would take alone (the step model gives both); what is left of the paid time is idle.
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


def bill(pools: list[Work], usd_per_gpu_hour: float) -> Bill:
    """Return the bill of a fleet of pools.

    Raises:
        ValueError: a price that is not positive.
    """
    if not usd_per_gpu_hour > 0:
        raise ValueError(f"usd_per_gpu_hour: expected more than 0, such as 2.0; got {usd_per_gpu_hour!r}")
    rate = usd_per_gpu_hour / SECONDS_PER_HOUR
    paid = sum(pool.paid_gpu_s for pool in pools)
    computed = sum(pool.input_gpu_s for pool in pools)
    cached = sum(pool.cached_gpu_s for pool in pools)
    output = sum(pool.output_gpu_s for pool in pools)
    idle = paid - computed - cached - output
    assert idle >= -1e-9 * max(paid, 1.0), f"busy {computed + cached + output} GPU-s of {paid} paid"
    return Bill(
        gpu_hours=paid / SECONDS_PER_HOUR,
        usd_per_gpu_hour=usd_per_gpu_hour,
        input_usd=computed * rate,
        cached_input_usd=cached * rate,
        output_usd=output * rate,
        idle_usd=idle * rate,
        input_tokens=sum(pool.input_tokens for pool in pools),
        cached_tokens=sum(pool.cached_tokens for pool in pools),
        output_tokens=sum(pool.output_tokens for pool in pools),
    )
