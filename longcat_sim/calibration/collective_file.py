"""The ``collectives:`` of a profile's ``fit:``: tables of seconds over bytes, and the links they were measured on."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from longcat_sim.calibration.collective_curves import Curve
from longcat_sim.calibration.collectives import CollectiveTimes
from longcat_sim.errors import MeasurementError, SpecError
from longcat_sim.ops.op import KINDS
from longcat_sim.specs.base import Part
from longcat_sim.specs.hardware import HardwareSpec
from longcat_sim.specs.loading import validate

REMEDY = "restore the section"
Variant = Literal["", "low_latency", "normal"]
"""Kernels of one kind that have tables of their own."""


class _Curve(Part):
    """A table of one kind, variant and number of ranks."""

    kind: str
    variant: Variant
    ranks: PositiveInt
    source: NonNegativeInt
    """Which of the section's ``sources``, from 0 on."""
    bytes: list[NonNegativeFloat]
    us: list[PositiveFloat]
    borrowed: str = ""

    @field_validator("kind")
    @classmethod
    def _is_collective(cls, name: str) -> str:
        known = [kind.name for kind in KINDS.values() if kind.is_collective]
        if name not in known:
            raise ValueError(f"expected one of {', '.join(known)}; got {name!r}")
        return name

    @field_validator("bytes")
    @classmethod
    def _rise(cls, sizes: list[float]) -> list[float]:
        if not sizes or any(low >= high for low, high in pairwise(sizes)):
            raise ValueError(f"expected sizes that rise, such as [0, 1048576]; got {sizes}")
        return sizes

    @model_validator(mode="after")
    def _is_a_table(self) -> _Curve:
        if len(self.bytes) != len(self.us):
            raise ValueError(f"expected one of us for each of bytes; got us {self.us} for bytes {self.bytes}")
        return self


class _Collectives(Part):
    """The section."""

    reference: Annotated[dict[Literal["scale_up", "scale_out"], PositiveFloat], Field(min_length=1)]
    kernel_gap_us: NonNegativeFloat
    sources: list[str]
    curves: list[Any]
    carried_from: str = ""


def collectives_section(times: CollectiveTimes) -> dict[str, Any]:
    """Return the ``collectives:`` section of a profile's fit, as plain YAML data."""
    sources = list(dict.fromkeys("; ".join(curve.sources) for curve in times.curves_))
    rows = []
    for curve in times.curves_:
        row: dict[str, Any] = {
            "kind": curve.kind, "variant": curve.variant, "ranks": curve.ranks,
            "source": sources.index("; ".join(curve.sources)), "bytes": [round(float(b)) for b in curve.bytes],
            "us": [round(float(s) * 1e6, 2) for s in curve.seconds],
        }  # fmt: skip
        if curve.borrowed:
            row["borrowed"] = curve.borrowed
        rows.append(row)
    section: dict[str, Any] = {
        "reference": dict(times.reference), "kernel_gap_us": round(times.kernel_gap_s * 1e6, 3), "sources": sources,
        "curves": rows,
    }  # fmt: skip
    if times.carried_from:
        section["carried_from"] = times.carried_from
    return section


def read_collectives(hardware: HardwareSpec) -> CollectiveTimes | None:
    """Return the collectives of a profile's ``fit:`` with the links that ``hardware`` has now, whatever version wrote
    its laws; None where it has none.

    Raises:
        MeasurementError: they are not what ``collectives_section`` gives; names every fault.
    """
    document = (hardware.fit or {}).get("collectives")
    if not document:
        return None
    where = f"{hardware.where}: fit: collectives"
    faults: list[str] = []
    curves: list[Curve] = []
    try:
        section = validate(_Collectives, document, where=where)
    except SpecError as error:
        raise MeasurementError([f"{fault}; {REMEDY}" for fault in error.faults]) from None
    for number, row in enumerate(section.curves, start=1):
        names = [row.get(key) for key in ("kind", "variant", "ranks")] if isinstance(row, dict) else []
        at = f"{where}: {' '.join(map(str, filter(None, names))) or f'curve {number}'}"
        try:
            curve = validate(_Curve, row, where=at)
        except SpecError as error:
            faults += [f"{fault}; {REMEDY}" for fault in error.faults]
            continue
        if curve.source >= len(section.sources):
            known = len(section.sources)
            faults.append(f"{at}: source: expected a number below {known} (sources); got {curve.source}; {REMEDY}")
            continue
        seconds = tuple(us * 1e-6 for us in curve.us)
        source = (section.sources[curve.source],)
        curves.append(
            Curve(curve.kind, curve.variant, curve.ranks, tuple(curve.bytes), seconds, source, curve.borrowed)
        )
    if faults:
        raise MeasurementError(faults)
    links = {str(link): rate for link, rate in section.reference.items()}
    gap_s = section.kernel_gap_us * 1e-6
    return CollectiveTimes(hardware, curves, links, carried_from=section.carried_from, kernel_gap_s=gap_s)
