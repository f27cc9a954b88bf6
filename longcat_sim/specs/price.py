"""``Price``: what a GPU-hour costs and of what, rented or owned."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from longcat_sim.errors import SpecError
from longcat_sim.specs.base import Part, Ratio
from longcat_sim.specs.hardware import HardwareSpec

HOURS_PER_YEAR = 8766.0
HOURS_PER_MONTH = HOURS_PER_YEAR / 12


class Owned(Part):
    """A GPU that was bought, its share of server, network and building beside it."""

    purchase_usd_per_gpu: float = Field(gt=0)
    """GPU and its share of the server."""
    network_usd_per_gpu: float = Field(default=0.0, ge=0)
    """Its share of switches, cables and optics, written off with it."""
    amortisation_years: float = Field(default=4.0, gt=0)
    """Straight-line (assumed)."""
    residual: Ratio = 0.0
    """Share of the purchase that a sale brings at the end."""
    interest_per_year: float = Field(default=0.0, ge=0)
    """On the mean of what is not written off yet."""
    other_usd_per_gpu_hour: float = Field(default=0.0, ge=0)
    """Space, staff, spares."""

    def _per_hour(self, usd: float) -> float:
        written_off = usd * (1 - self.residual) / (self.amortisation_years * HOURS_PER_YEAR)
        interest = usd * (1 + self.residual) / 2 * self.interest_per_year / HOURS_PER_YEAR
        return written_off + interest


class Price(Part):
    """What a GPU-hour costs.

    ``rental`` and ``owned`` GPUs are paid for every hour, ``on_demand`` ones only while their replica is up: what an
    autoscaler has drained, or a fault has taken, costs nothing then.
    """

    basis: Literal["rental", "on_demand", "owned"] = "rental"
    usd_per_gpu_hour: float | None = Field(default=None, gt=0)
    """Of any hardware; the hardware profile's price where not given."""
    hardware_usd_per_gpu_hour: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Prices by hardware name, for a search over several; without effect beside ``usd_per_gpu_hour``."""
    owned: Owned | None = None
    utilisation: float = Field(default=1.0, gt=0, le=1)
    """Share of paid GPU time that serves tokens at the simulated rate."""
    usd_per_kwh: float | None = Field(default=None, ge=0)
    """Power, where it is not in the rent: always of owned GPUs."""
    pue: float = Field(default=1.0, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> Price:
        if (self.basis == "owned") != (self.owned is not None):
            raise ValueError(
                "price: expected owned exactly when basis is owned, such as {basis: owned, owned: "
                f"{{purchase_usd_per_gpu: 30000}}}}; got basis {self.basis!r}"
            )
        if self.owned is not None and (self.usd_per_gpu_hour is not None or self.hardware_usd_per_gpu_hour):
            raise ValueError("price: expected either a rent or owned; got both; remove one")
        return self

    def gpu_hour_usd(self, hardware: HardwareSpec) -> dict[str, float]:
        """Return the lines of one paid GPU-hour at ``utilisation``; their sum is its price.

        A GPU draws ``all_in_power`` (else ``power``) while it serves and ``idle_power`` else (where unknown: as much).

        Raises:
            SpecError: neither the scenario nor the profile has a price, or power is to be paid and unknown.
        """
        lines: dict[str, float] = {}
        if self.owned is not None:
            lines["amortisation"] = self.owned._per_hour(self.owned.purchase_usd_per_gpu)
            lines["network"] = self.owned._per_hour(self.owned.network_usd_per_gpu)
            lines["other"] = self.owned.other_usd_per_gpu_hour
        else:
            rent = self.usd_per_gpu_hour or self.hardware_usd_per_gpu_hour.get(hardware.name) or hardware.price
            if rent is None:
                raise SpecError(
                    f"price.hardware_usd_per_gpu_hour: expected a price of {hardware.name}, such as "
                    f"{{{hardware.name}: 1.5}}; neither the scenario nor its profile has one; add it: "
                    "price.usd_per_gpu_hour would be the price of every device"
                )
            lines["rent"] = rent
        if self.usd_per_kwh:
            active = hardware.all_in_power or hardware.power
            if active is None:
                raise SpecError(
                    f"price.usd_per_kwh: expected hardware {hardware.name} to have power or all_in_power, such as "
                    "700 W; it has neither; add it to the profile"
                )
            idle = active if hardware.idle_power is None else hardware.idle_power
            watts = self.utilisation * active + (1 - self.utilisation) * idle
            lines["power"] = watts / 1000.0 * self.pue * self.usd_per_kwh
        return lines
