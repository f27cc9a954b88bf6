"""Measure this machine and fit it: what ``profile``, ``calibrate`` and the quickstart share."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from longcat_sim.calibration import OpTimes, write_fit
from longcat_sim.calibration.collective_file import Variant, read_collectives
from longcat_sim.calibration.collectives import CollectiveTimes
from longcat_sim.calibration.importers.exchange import Point
from longcat_sim.errors import MeasurementError, SpecError
from longcat_sim.records.files import check_outputs, write_text
from longcat_sim.records.measurement import Environment, Measurements, load_measurements
from longcat_sim.specs.hardware import ONE_CORE, HardwareSpec, hardware_names, load_hardware, profile_folders
from longcat_sim.studies.beside import slowdowns, summary

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""What a profile may be called."""


def calibrate(measurements: Path, name: str, out: Path | None = None, *, draws: int = 64, seed: int = 0) -> OpTimes:
    """Fit a measurement file and write the fit into a hardware profile; return the fitted times.

    The data sheet is that of ``out``, or of the packaged profile ``name``; for a new name it is measured, which needs
    the machine that the file is of. A profile keeps its laws where the file holds no ops but collectives, and its
    collectives where it holds none.

    Raises:
        MeasurementError: the file cannot be used, or a kind has too few points.
        SpecError: a new name, and the file is of another machine.
        UserError: the profile cannot be written.
    """
    target = out or Path("hardware_profiles") / f"{name}.yaml"
    check_outputs(files={"--out": target})
    rows, is_new = load_measurements(measurements), not target.exists()
    hardware = _sheet(name, target, rows.environment)
    try:
        times = _fitted(rows, hardware, draws, seed)
    except BaseException:
        if is_new:  # a data sheet without a fit
            target.unlink(missing_ok=True)
        raise
    write_fit(target, times.to_fit())
    return times


def _fitted(rows: Measurements, hardware: HardwareSpec, draws: int, seed: int) -> OpTimes:
    collectives, left_out = measured_collectives(rows, hardware)
    if collectives is not None and hardware.fit and all(row.is_contention or row.op.is_collective for row in rows):
        times = OpTimes.from_hardware(hardware)
    else:
        times = OpTimes.fit(rows, hardware, draws=draws, seed=seed)
    times.collectives_ = collectives or read_collectives(hardware)
    times.provenance = {
        "measured_on": rows.environment.device, "date": rows.environment.date,
        "libraries": dict(rows.environment.libraries), **times.provenance,
    }  # fmt: skip
    if rows.environment.pace_s:
        times.provenance["pace"] = {
            "probe_s": [float(f"{seconds:.4g}") for seconds in rows.environment.pace_s],
            "sensitivity": {
                sort: [float(f"{power:.3g}") for power in powers]
                for sort, powers in rows.environment.sensitivity.items()
            },
        }
    if left_out:
        times.provenance["left_out"] = {**times.provenance.get("left_out", {}), **left_out}
    together = slowdowns(rows, times, hardware, own_cores=rows.environment.kind == "cpu")
    if together:
        times.provenance["contention"] = summary(together)
    return times


def measured_collectives(rows: Measurements, hardware: HardwareSpec) -> tuple[CollectiveTimes | None, dict[str, int]]:
    """Return the times of collectives that were measured alone (None: of none), and how many rows were left out, by
    why.

    Those between processes of a CPU are: nobody knows how they share its cores, and they repeat within no 5 %.
    """
    left_out: Counter[str] = Counter()
    points: dict[tuple[str, float], list[Point]] = defaultdict(list)
    source = f"profile on {rows.environment.device}, {rows.environment.date[:10]}"
    for row in rows:
        if row.is_contention:
            left_out.update([f"{row.suite} (nothing is fitted to it)"] if row.suite != "contention" else [])
        if row.is_contention or not row.op.is_collective:
            continue
        name, ranks = " ".join(filter(None, (row.op.kind, row.op.variant))), row.op["ranks"]
        link = hardware.link_over(ranks)
        if rows.environment.kind == "cpu":
            left_out["collectives (between processes of a CPU, not between devices)"] += 1
        elif row.op.variant not in get_args(Variant):
            left_out[f"{name} (tables hold none of that variant)"] += 1
        elif getattr(hardware, link) is None:
            left_out[f"collectives over {ranks:g} ranks (the data sheet has no {link})"] += 1
        else:
            point = Point(row.op.kind, row.op.variant, int(ranks), row.op.message_bytes, row.median_s, source)
            points[name, ranks].append(point)
    for (name, ranks), found in list(points.items()):
        if len({point.bytes for point in found}) < 2:  # one size says nothing of the next
            left_out[f"{name} over {ranks:g} ranks (1 size, a table needs 2)"] += len(points.pop((name, ranks)))
    if not points:
        return None, dict(left_out)
    times = CollectiveTimes.fit([point for found in points.values() for point in found], hardware)
    return replace(times, kernel_gap_s=0.0), dict(left_out)  # what `profile` measured holds the gaps


def calibrate_published(
    records: Path | None, name: str, tables: Path | None = None, out: Path | None = None, backend: str = ""
) -> OpTimes:
    """Fit a profile to published tables (a YAML file of records, and aiconfigurator-core's tables where they are).

    Collectives of the records are fitted too; a profile's own stay where there are none. Returns the times.
    The fit goes into the profile, or into another of the same device at ``out``, made as a copy where there is none.
    ``backend`` is the framework whose tables of ops go before the ones that packaged profiles hold.

    Raises:
        SpecError: no profile of that name, or ``out`` is another device's.
        MeasurementError: no table of the device, no such backend, or too few points.
    """
    from longcat_sim.calibration.published import (
        devices_by_backend,
        fit_published,
        has_op_tables,
        published_collectives,
    )

    hardware = load_hardware(name)
    profile = next(folder / f"{name}.yaml" for folder in profile_folders() if (folder / f"{name}.yaml").exists())
    target = out or profile
    check_outputs(files={"--name" if out is None else "--out": target})
    there = load_hardware(target).device if target.exists() else hardware.device
    if there != hardware.device:
        raise SpecError(f"--out {out}: expected a profile of {hardware.device}; got one of {there}; give another path")
    taken = out is not None and out.stem in hardware_names() and not (load_hardware(out.stem).fit or {}).get("backend")
    if backend and (out is None or taken):
        raise MeasurementError(
            f"--backend {backend}: expected a profile of its own, such as --out hardware_profiles/{name}-{backend}.yaml"
            f"; got {out or 'none'}, and {name} is what others take it for; name another"
        )
    if backend and name not in devices_by_backend():
        raise MeasurementError(
            f"--backend {backend}: expected a device with published tables of several engines, --name "
            f"{' or '.join(devices_by_backend())}; got {name}; measure it yourself with `profile`"
        )
    collectives = published_collectives(records, hardware, load_hardware) if records else None
    if collectives is None or has_op_tables(name):  # what another version fitted is replaced
        times = fit_published(hardware, kernels=records, tables=tables, backend=backend)
    else:
        has_laws = bool((hardware.fit or {}).get("laws"))  # without any, a section of another version can be replaced
        known = OpTimes.from_hardware(hardware) if has_laws else OpTimes(hardware, {})
        times = OpTimes(hardware, known.laws_, provenance={"method": "published tables", **known.provenance})
    times.collectives_ = collectives or read_collectives(hardware)
    if not target.exists():
        text = profile.read_text(encoding="utf-8")
        write_text(target, re.sub(rf"^name: {re.escape(name)}$", f"name: {target.stem}", text, flags=re.M))
    write_fit(target, times.to_fit())
    return times


def _sheet(name: str, target: Path, environment: Environment) -> HardwareSpec:
    """Make sure that ``target`` has a data sheet; return it."""
    if not NAME.fullmatch(name):
        raise SpecError(f"--name {name}: expected letters, digits, dots and dashes, such as mine or h100-sxm-measured")
    packaged = [folder / f"{name}.yaml" for folder in profile_folders() if (folder / f"{name}.yaml").exists()]
    for known in [target] if target.exists() else packaged[:1]:
        hardware = load_hardware(known)
        if not _is_of(environment, hardware):
            raise SpecError(
                f"--name {name}: expected measurements of {hardware.device or name}, whose data sheet {known.name} "
                f"holds; got those of {environment.device!r}; give the fit a name of its own, such as --name mine"
            )
        if hardware.fit and not hardware.has_own_kernels:
            raise SpecError(
                f"--name {name}: expected a name of its own; got that of a profile whose fit is of published tables; "
                f"give another, such as --name {name}-measured"
            )
    if not target.exists():
        sheet = packaged[0] if packaged else sheet_of_card(environment.device)
        if sheet is None:
            write_this_machine(name, target, environment)
        else:
            text = sheet.read_text(encoding="utf-8").split("\nfit:\n")[0] + "\n"
            write_text(target, re.sub(r"^name: .*$", f"name: {name}", text, count=1, flags=re.MULTILINE))
    return load_hardware(target)


def _is_of(environment: Environment, hardware: HardwareSpec) -> bool:
    """Return whether what was measured is the device of a data sheet: a GPU of that card, or a CPU of that name."""
    if (environment.kind == "cpu") != (hardware.sm_count == 1):
        return False
    if environment.kind == "cpu":
        return environment.device == hardware.device.removesuffix(ONE_CORE)
    return card_of(environment.device) == card_of(hardware.device)


def card_of(device: str) -> tuple[str, bool] | None:
    """Return (model, whether on PCIe) of a GPU's name, such as H100 or RTX 4090; None where it has none, as a CPU."""
    found = re.search(r"\b(?:RTX (?:PRO )?\d+|[A-Z]+\d+[A-Z]*)\b", device)
    return (found[0], "PCIe" in device) if found else None


def sheet_of_card(device: str) -> Path | None:
    """Return the packaged profile of the GPU that its driver calls ``device``; None where there is none."""
    card = card_of(device)
    for folder in profile_folders():
        for path in sorted(folder.glob("*.yaml")):
            if card is not None and card_of(load_hardware(path).device) == card:
                return path
    return None


def write_this_machine(name: str, target: Path, environment: Environment | None = None) -> HardwareSpec:
    """Write a profile of this machine, its peaks and bandwidth measured; return it.

    Raises:
        SpecError: ``environment`` is of another device.
    """
    from longcat_sim.profiling.environment import here
    from longcat_sim.profiling.machine import describe_machine, write_machine
    from longcat_sim.profiling.profile import pick_device

    device = pick_device("cpu" if environment is None or environment.kind == "cpu" else "cuda")
    found = here(device)
    if environment is not None and found.device != environment.device:
        raise SpecError(
            f"--name {name}: expected a profile with a data sheet, one of {', '.join(hardware_names())}, for the file "
            f"is of {environment.device!r} and this machine is {found.device!r}; write {target} with a datasheet first"
        )
    write_machine(target, describe_machine(name, device))
    return load_hardware(target)


def error_table(times: OpTimes) -> list[tuple[Any, ...]]:
    """Return (kind, dtype, variant, split, MAPE, coverage, points) of every law and split."""
    return [
        (row["kind"], row["dtype"], row["variant"], row["split"], row["mape"], row.get("coverage"), row["count"])
        for row in times.errors_
    ]
