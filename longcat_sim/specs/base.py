"""The pieces that every description shares: a frozen checked model and the quantity types."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from longcat_sim import units


class Part(BaseModel):
    """A checked, frozen piece of a description; unknown keys and NaN are faults."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)


class ParsedFloat(float):
    """A quantity given in code, already in base units: passes where a file would have to write a unit."""


def _reader(dimension: str) -> BeforeValidator:
    """Return the pydantic reader of quantities in ``dimension``."""

    def read(value: Any) -> float:
        return value if isinstance(value, ParsedFloat) else units.parse(value, dimension)

    return BeforeValidator(read)


BytesPerSecond = Annotated[float, _reader("B/s"), Field(gt=0)]
Bytes = Annotated[float, _reader("B"), Field(ge=0)]
Seconds = Annotated[float, _reader("s"), Field(ge=0)]
FlopPerSecond = Annotated[float, _reader("FLOP/s"), Field(gt=0)]
Watts = Annotated[float, _reader("W"), Field(ge=0)]
UsdPerHour = Annotated[float, _reader("USD/h"), Field(gt=0)]
PerSecond = Annotated[float, _reader("1/s"), Field(gt=0)]
Ratio = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
