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


def _reader(dimension: str, *, may_be_zero: bool = False) -> BeforeValidator:
    """Return the pydantic reader of quantities in ``dimension``, which are above 0 unless they may be 0."""

    def read(value: Any) -> float:
        found = value if isinstance(value, ParsedFloat) else units.parse(value, dimension)
        if found < 0 or (found == 0 and not may_be_zero):
            bound = "of at least 0" if may_be_zero else "greater than 0"
            raise ValueError(
                f"expected a quantity in {dimension} {bound}, such as '{units.EXAMPLES[dimension]}'; got {value!r}; "
                "write a larger one"
            )
        return found

    return BeforeValidator(read)


BytesPerSecond = Annotated[float, _reader("B/s")]
Bytes = Annotated[float, _reader("B", may_be_zero=True)]
Seconds = Annotated[float, _reader("s", may_be_zero=True)]
PositiveSeconds = Annotated[float, _reader("s")]
FlopPerSecond = Annotated[float, _reader("FLOP/s")]
Watts = Annotated[float, _reader("W", may_be_zero=True)]
UsdPerHour = Annotated[float, _reader("USD/h")]
PerSecond = Annotated[float, _reader("1/s")]
Ratio = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
