"""``HardwareSpec``: one device and its links, as a data sheet with a source per figure, and the fit made on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import Field, PrivateAttr, model_validator

from longcat_sim.errors import SpecError
from longcat_sim.specs.base import (
    Bytes,
    BytesPerSecond,
    Count,
    FlopPerSecond,
    Part,
    Seconds,
    UsdPerHour,
    Watts,
)
from longcat_sim.specs.loading import read_yaml, unknown_name, validate

SCHEMA = 1


class Link(Part):
    """One device's way onto a link, one direction."""

    bandwidth: BytesPerSecond
    latency: Seconds = 0.0


class ScaleUp(Link):
    """The link inside a scale-up domain (NVLink, xGMI, HCCS, shared memory)."""

    domain_size: Count
    """Devices that reach each other over this link."""


class HardwareSpec(Part):
    """A device as its data sheet gives it. Every figure's source stands in ``sources``; one without is *assumed*."""

    name: str
    device: str
    architecture: str = ""
    """Generation of its cores, such as Hopper: devices of one run the same kernels."""
    peak: dict[str, FlopPerSecond] = Field(min_length=1)
    """Dense peak by dtype."""
    memory: Bytes
    memory_bandwidth: BytesPerSecond
    l2: Bytes | None = None
    sm_count: Count | None = None
    """SMs, CUs or cores."""
    scale_up: ScaleUp | None = None
    scale_out: Link | None = None
    host_link: Link | None = None
    """To host memory (PCIe, C2C)."""
    power: Watts | None = None
    """TDP of the device."""
    all_in_power: Watts | None = None
    """Server, network and cooling share included."""
    idle_power: Watts | None = None
    price: UsdPerHour | None = None
    """Rental price; its date is in its source."""
    sources: dict[str, str] = Field(default_factory=dict)
    """Dotted field -> where the figure comes from, with a date."""
    notes: str = ""
    fit: Mapping[str, Any] | None = Field(default=None, repr=False)
    """What ``calibrate`` wrote; read by ``calibration``."""
    _file: str = PrivateAttr(default="")
    _sheet: HardwareSpec | None = PrivateAttr(default=None)

    @model_validator(mode="after")
    def _sources_name_fields(self) -> HardwareSpec:
        known = set(self._figures())
        strange = [key for key in self.sources if key not in known]
        if strange:
            raise ValueError(
                f"sources: expected keys among {', '.join(sorted(known))}; got {', '.join(strange)}; "
                "name the field that the source is of"
            )
        return self

    def _figures(self) -> list[str]:
        """Return the dotted names of all figures of the data sheet."""
        names: list[str] = []
        for key, value in self:
            if key in ("name", "device", "architecture", "sources", "notes", "fit") or value is None:
                continue
            if isinstance(value, Part):
                names += [f"{key}.{inner}" for inner, got in value if got is not None]
            elif isinstance(value, dict):
                names += [f"{key}.{inner}" for inner in value]
            else:
                names.append(key)
        return names

    @property
    def where(self) -> str:
        """Where the profile stands, for messages: its file, or its name where it was made in code."""
        return self._file or f"hardware {self.name}"

    @property
    def sheet(self) -> HardwareSpec:
        """The profile as its file has it, whatever a what-if changed since."""
        return self._sheet or self

    @property
    def changed(self) -> list[str]:
        """Figures that a what-if changed, and how: ``memory_bandwidth x 1.5``, ``no l2``; new ones by their names."""
        found = []
        for name in dict.fromkeys([*self.sheet._figures(), *self._figures()]):
            now, before = self._figure(name), self.sheet._figure(name)
            if now != before and name != "price":  # rent has a note of its own
                is_scaled = isinstance(now, int | float) and isinstance(before, int | float) and before
                found.append(f"{name} x {now / before:.4g}" if is_scaled else f"no {name}" if now is None else name)
        return found

    def _figure(self, name: str) -> Any:
        head, _, inner = name.partition(".")
        part = getattr(self, head)
        return (part.get(inner) if isinstance(part, dict) else getattr(part, inner, None)) if inner else part

    @property
    def domain_size(self) -> int:
        """Devices that the scale-up link joins, such as the 8 of a node; 1 without one."""
        return self.scale_up.domain_size if self.scale_up else 1

    def link_over(self, ranks: float) -> str:
        """Name of the link that a collective over so many ranks waits for: ``scale_up`` or ``scale_out``."""
        return "scale_up" if ranks <= self.domain_size else "scale_out"

    @property
    def has_kernel_gaps(self) -> bool:
        """Whether time passes between two kernels that op times leave out: on everything but a CPU (one core a
        device), unless ``profile`` measured the times, which then hold it."""
        return self.sm_count != 1 and not self.has_own_kernels

    @property
    def maker(self) -> str:
        """First word of the device's name, such as NVIDIA."""
        return self.device.split()[0] if self.device.strip() else ""

    @property
    def assumed(self) -> tuple[str, ...]:
        """Figures without a source."""
        return tuple(name for name in self._figures() if name not in self.sources)

    @property
    def has_own_kernels(self) -> bool:
        """Whether the fit is of what ``profile`` measured here: the executable model's kernels, and no engine's."""
        return bool((self.fit or {}).get("measured_on"))

    def peak_flop_per_s(self, dtype: str) -> float:
        """Return the dense peak for ``dtype``; a dtype the device lacks runs at the next wider one's rate.

        Raises:
            SpecError: neither ``dtype`` nor a wider type has a peak.
        """
        wider = {"nvfp4": "fp4", "fp4": "fp8", "fp8": "bf16", "int8": "bf16", "fp16": "bf16", "tf32": "fp32"}
        wanted = dtype
        while dtype not in self.peak and dtype in wider:
            dtype = wider[dtype]
        if dtype not in self.peak:
            # fp32 products outside the matrix units: datasheets of accelerators list no dense matrix peak for them
            if "bf16" in self.peak and wanted in ("fp32", "tf32"):
                return self.peak["bf16"] / 2
            raise SpecError(
                f"hardware {self.name}: peak: expected an entry for {wanted}; it has {', '.join(self.peak)}; "
                f"add peak.{wanted} to the profile or choose another precision"
            )
        return self.peak[dtype]


LOCAL = "cpu-local"
"""Name of the profile of this machine's CPU, which no checkout holds."""
ONE_CORE = ", one core"
"""Ends the device's name in the profile of a CPU, whose ops were timed on one core."""


def profile_folders() -> list[Path]:
    """Return where profiles are looked for: ./hardware_profiles first, then the package's own checkout."""
    folders = [Path.cwd() / "hardware_profiles", Path(__file__).resolve().parents[2] / "hardware_profiles"]
    return [folder for i, folder in enumerate(folders) if folder.is_dir() and folder not in folders[:i]]


def hardware_names() -> list[str]:
    """Return the names of all profiles found."""
    return sorted({path.stem for folder in profile_folders() for path in folder.glob("*.yaml")})


def readable_hardware() -> Iterator[tuple[str, HardwareSpec]]:
    """Yield the name and content of every profile that can be read; one that somebody still writes is passed over."""
    for name in hardware_names():
        with contextlib.suppress(SpecError):
            yield name, load_hardware(name)


def load_hardware(name_or_path: str | Path, *, where: str = "") -> HardwareSpec:
    """Return a hardware profile by name or path.

    Raises:
        SpecError: no such profile (lists those there are), or every fault of the file.
    """
    text = str(name_or_path)
    if text.endswith((".yaml", ".yml")) or "/" in text:
        path = Path(text)
        if not path.exists():
            raise unknown_name("hardware", text, hardware_names(), where=where)
    else:
        found = [folder / f"{text}.yaml" for folder in profile_folders() if (folder / f"{text}.yaml").exists()]
        if not found and text == LOCAL:
            raise SpecError(
                f"{where or 'hardware'}: {LOCAL}: expected this machine's own profile, hardware_profiles/{LOCAL}.yaml; "
                "there is none yet; run `quickstart`, or `profile --out m.jsonl` and then "
                f"`calibrate m.jsonl --name {LOCAL}`: both write it"
            )
        if not found:
            raise unknown_name("hardware", text, hardware_names(), where=where)
        path = found[0]
    changed = path.stat()
    return _read_profile(path.resolve(), path.name, changed.st_mtime_ns, changed.st_size)


@lru_cache(maxsize=64)
def _read_profile(path: Path, shown: str, mtime_ns: int, size: int) -> HardwareSpec:
    """Return the profile in a file; a file that has not changed is read once."""
    document, lines, faults = read_yaml(path)
    if not isinstance(document, dict) or "datasheet" not in document:
        raise SpecError([*faults, f"{path.name}:1: datasheet: expected this section, such as 'datasheet: {{...}}'"])
    unknown = sorted(set(document) - {"schema", "name", "datasheet", "fit"})
    faults += [
        f"{path.name}:{lines.get((key,), 1)}: expected schema, name, datasheet and fit; got {key!r}; remove it"
        for key in unknown
    ]
    if document.get("schema") != SCHEMA:
        faults.append(
            f"{path.name}:{lines.get(('schema',), 1)}: schema: expected {SCHEMA}; got {document.get('schema')!r}; "
            "write the profile again with this version's `calibrate`"
        )
    sheet = document["datasheet"] if isinstance(document["datasheet"], dict) else {}
    flat = {"name": document.get("name", path.stem), **sheet, "fit": document.get("fit")}
    try:
        spec = validate(HardwareSpec, flat, where=path.name, lines=lines, at=("datasheet",))
    except SpecError as error:
        faults += error.faults
    if faults:
        raise SpecError(faults)
    spec._file = path.name
    spec._sheet = spec.model_copy()
    return spec
