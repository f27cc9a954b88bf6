"""The ``fit:`` section of a hardware profile: written by ``calibrate`` only, read by ``OpTimes.from_hardware``.

Weights and errors are plain figures. Grids are packed text (zlib, base64): one byte per cell (two where ``wide``),
hundredths of log(time / law), a bit per cell for "measured"; draws are float32.
"""

from __future__ import annotations

import base64
import binascii
import tempfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, ValidationInfo, field_validator

from longcat_sim.calibration.collective_file import collectives_section, read_collectives
from longcat_sim.calibration.collectives import CollectiveTimes
from longcat_sim.calibration.fitted import LEVELS, FittedLaw
from longcat_sim.calibration.laws import LAWS, Device
from longcat_sim.calibration.weights import num_weights
from longcat_sim.errors import MeasurementError, SpecError, UserError
from longcat_sim.ops.op import ITEM_BYTES, FloatArray
from longcat_sim.records.files import write_text
from longcat_sim.specs.base import Part
from longcat_sim.specs.hardware import HardwareSpec, load_hardware
from longcat_sim.specs.loading import validate

SCHEMA = 5
AGAIN = "write the fit again with `calibrate`"
STEP = 0.01
"""Resolution of a packed correction; far below any fit's error."""


def _pack(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 9)).decode()


def _unpack(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))


def _round(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")


def _packed_correction(correction: FloatArray) -> dict[str, Any]:
    """Return the packed cells; ``wide`` says two bytes a cell, for laws that are off by more than a byte holds."""
    steps = np.round(correction / STEP)
    if np.any(np.abs(steps) > 127):
        return {"wide": True, "correction": _pack(np.clip(steps, -32767, 32767).astype(np.int16).tobytes())}
    return {"correction": _pack(steps.astype(np.int8).tobytes())}


def write_section(
    fitted: Iterable[FittedLaw], collectives: CollectiveTimes | None, provenance: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the section as plain YAML data."""
    laws = []
    for law in fitted:
        document: dict[str, Any] = {"kind": law.kind, "dtype": law.dtype}
        if law.variant:
            document["variant"] = law.variant
        if law.transferred_from:
            document["transferred_from"] = law.transferred_from
        document |= {
            "points": law.count_,
            "sources": list(law.provenance),
            "errors": {
                split: {name: _round(figure, 3) for name, figure in figures.items()}
                for split, figures in law.errors_.items()
            },
            "reference": {name: _round(figure, 7) for name, figure in law.reference._asdict().items()},
            "weights": [_round(weight, 6) for weight in law.weights_],
            "sizes": {
                name: [_round(size, 8) for size in axis]
                for name, axis in zip(LAWS[law.kind].coordinates, law.axes_, strict=True)
            },
            **_packed_correction(law.correction_),
            "measured": _pack(np.packbits(law.measured_).tobytes()),
            "correlation": _round(law.correlation_, 3),
            "residuals": {name: [_round(x, 3) for x in quantiles] for name, quantiles in law.residuals_.items()},
        }
        if len(law.draws_):
            document["draws"] = len(law.draws_)
            document["draw_weights"] = _pack(law.draws_.astype(np.float32).tobytes())
        laws.append(document)
    section: dict[str, Any] = {"schema": SCHEMA, **provenance, "laws": laws}
    if collectives is not None:
        section["collectives"] = collectives_section(collectives)
    return section


class _Reference(Part):
    """As ``laws.Device``."""

    peak: PositiveFloat
    bandwidth: PositiveFloat
    sm_count: PositiveFloat
    cache_bytes: PositiveFloat


class _Law(Part):
    """A law as it stands in the file."""

    kind: str
    dtype: str
    variant: str = ""
    transferred_from: str = ""
    points: NonNegativeInt
    sources: tuple[str, ...]
    errors: dict[str, dict[str, float]]
    reference: _Reference
    weights: list[NonNegativeFloat]
    """A law with a negative one would fall as a size grows."""
    sizes: dict[str, list[NonNegativeFloat]]
    wide: bool = False
    correction: str
    measured: str
    correlation: Annotated[float, Field(ge=0, le=1)]
    residuals: dict[Literal["interpolated", "extrapolated"], list[float]]
    draws: NonNegativeInt = 0
    draw_weights: str = ""

    @field_validator("kind", "dtype")
    @classmethod
    def _is_known(cls, name: str, info: ValidationInfo) -> str:
        known = LAWS if info.field_name == "kind" else ITEM_BYTES
        if name not in known:
            raise ValueError(f"expected one of {', '.join(known)}; got {name!r}")
        return name

    @field_validator("sizes")
    @classmethod
    def _sizes_rise(cls, sizes: dict[str, list[float]]) -> dict[str, list[float]]:
        for name, axis in sizes.items():
            if not axis or any(low >= high for low, high in pairwise(axis)):
                raise ValueError(f"expected {name} to rise, such as [1, 2, 4]; got {axis}")
        return sizes

    @field_validator("residuals")
    @classmethod
    def _residuals_rise(cls, residuals: dict[str, list[float]]) -> dict[str, list[float]]:
        for name, quantiles in residuals.items():
            if len(quantiles) != len(LEVELS) or any(low > high for low, high in pairwise(quantiles)):
                raise ValueError(f"expected {name} to hold {len(LEVELS)} quantiles that rise; got {quantiles}")
        return residuals


def _cells(packed: str, dtype: Any, count: int, name: str) -> Any:
    """Return ``count`` packed cells, flat.

    Raises:
        ValueError: there are more or fewer, or they cannot be unpacked.
    """
    try:
        data = _unpack(packed)
    except (zlib.error, binascii.Error):
        raise ValueError(f"{name}: expected packed cells; got text that is cut short or was changed") from None
    if len(data) != count * np.dtype(dtype).itemsize:
        raise ValueError(f"{name}: expected {count} cells; got {len(data) / np.dtype(dtype).itemsize:g}")
    return np.frombuffer(data, dtype=dtype)


def _law(document: Any, where: str) -> FittedLaw:
    """Return the law of a mapping.

    Raises:
        SpecError, ValueError: it is not what ``write_section`` writes.
    """
    law = validate(_Law, document, where=where)
    device, names = Device(**dict(law.reference)), LAWS[law.kind].coordinates
    if set(law.sizes) != set(names):
        raise ValueError(f"sizes: expected {', '.join(names)}; got {', '.join(law.sizes)}")
    wanted = num_weights(law.kind, law.dtype, device)
    if len(law.weights) != wanted:
        raise ValueError(f"weights: expected {wanted}; got {len(law.weights)}")
    axes: list[FloatArray] = [np.array(law.sizes[name], dtype=float) for name in names]
    shape = tuple(len(axis) for axis in axes)
    cells = prod(shape)
    correction = _cells(law.correction, np.int16 if law.wide else np.int8, cells, "correction").astype(float) * STEP
    measured = np.unpackbits(_cells(law.measured, np.uint8, -(-cells // 8), "measured"), count=cells)
    if bool(law.draws) != bool(law.draw_weights):
        raise ValueError(
            f"draws: expected their number and draw_weights, or neither; got {law.draws} and "
            f"{'some' if law.draw_weights else 'none'}"
        )
    draws = _cells(law.draw_weights, np.float32, law.draws * wanted, "draw_weights") if law.draws else np.zeros(0)
    if not (np.isfinite(draws) & (draws >= 0)).all():
        raise ValueError("draw_weights: expected 0 or more; got a weight that is negative or not finite")
    return FittedLaw(
        law.kind,
        law.dtype,
        law.variant,
        device,
        np.array(law.weights, dtype=float),
        axes,
        correction.reshape(shape),
        measured.astype(bool).reshape(shape),
        law.points,
        draws.astype(float).reshape(law.draws, wanted),
        {name: np.array(quantiles) for name, quantiles in law.residuals.items()},
        law.correlation,
        law.errors,
        law.sources,
        law.transferred_from,
    )


def read_fit(hardware: HardwareSpec) -> tuple[dict[Any, FittedLaw], Any, dict[str, Any], int]:
    """Return (laws, collectives or None, provenance, draws) of a profile; nothing where it has no fit.

    Raises:
        MeasurementError: the section is of another version or cannot be read.
    """
    section = hardware.fit
    if not section:
        return {}, None, {}, 64
    where = f"{hardware.where}: fit"
    if section.get("schema") != SCHEMA:
        raise MeasurementError(
            f"{where}: schema: expected {SCHEMA}; got {section.get('schema')!r}; "
            "write the fit again with this version's `calibrate`"
        )
    laws, faults = [], []
    listed = section.get("laws") or ()
    if not isinstance(listed, list | tuple):
        raise MeasurementError(f"{where}: laws: expected a list; got {listed!r}; write the fit again with `calibrate`")
    for number, document in enumerate(listed, start=1):
        names = [document.get(key) for key in ("kind", "dtype", "variant")] if isinstance(document, dict) else []
        at = f"{where}: laws: {' '.join(map(str, filter(None, names))) or f'number {number}'}"
        try:
            laws.append(_law(document, at))
        except SpecError as error:
            faults += [f"{fault}; {AGAIN}" for fault in error.faults]
        except ValueError as error:
            faults.append(f"{at}: {error}; {AGAIN}")
    twice = [key for key, count in Counter(law.key for law in laws).items() if count > 1]
    faults += [f"{where}: laws: {' '.join(filter(None, key))}: expected once; got it twice; {AGAIN}" for key in twice]
    if faults:
        raise MeasurementError(faults)
    provenance = {key: value for key, value in section.items() if key not in ("schema", "laws", "collectives")}
    draws = max((len(law.draws_) for law in laws), default=64)
    return {law.key: law for law in laws}, read_collectives(hardware), provenance, draws


class _Wide(yaml.SafeDumper):
    """Writes lists of numbers on one line."""


def _flow(dumper: yaml.SafeDumper, items: list) -> yaml.Node:
    plain = all(not isinstance(item, dict | list) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=plain)


_Wide.add_representer(list, _flow)


def write_fit(hardware_path: str | Path, fit: Mapping[str, Any]) -> None:
    """Replace the ``fit:`` section of a profile; the data sheet above it stays as it was, to the character.

    Raises:
        SpecError: there is no such profile.
        MeasurementError: the profile with this fit could not be read; the old one stays.
    """
    path = Path(hardware_path)
    if not path.exists():
        raise SpecError(f"{path}: expected a hardware profile with a datasheet; there is none; write it first")
    lines = path.read_text(encoding="utf-8").splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("fit:")), len(lines))
    end = next((i for i in range(start + 1, len(lines)) if lines[i][:1] not in ("", " ", "#", "-")), len(lines))
    body = yaml.dump({"fit": dict(fit)}, Dumper=_Wide, sort_keys=False, width=118, allow_unicode=True)
    text = "\n".join([*lines[:start], *body.splitlines(), *lines[end:]]) + "\n"
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / path.name
        write_text(draft, text)
        try:
            read_fit(load_hardware(draft))
        except UserError as error:
            raise MeasurementError(
                [*error.faults, f"{path}: left as it was: with the new fit it cannot be read"]
            ) from None
    write_text(path, text)
