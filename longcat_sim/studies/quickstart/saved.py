"""``saved_run``: what an earlier quickstart left in its folder; without one, the run is made."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longcat_sim.calibration import OpTimes
from longcat_sim.errors import UserError
from longcat_sim.records.measurement import Measurements, load_measurements
from longcat_sim.specs.hardware import load_hardware
from longcat_sim.studies.quickstart.report import ops_figure, sections_figure
from longcat_sim.studies.quickstart.run import PROFILES, Progress, quickstart
from longcat_sim.studies.validate.section import Row, Section

FOLDER_VARIABLE = "LONGCAT_SIM_OUT"
FILES = ("summary.json", "measurements.jsonl")


@dataclass
class SavedRun:
    """The tables, measurements and fit of one quickstart."""

    out: Path
    sections: list[Section]
    measurements: Measurements
    op_times: OpTimes
    summary: dict[str, Any]

    def section(self, name: str) -> Section:
        """Return one table.

        Raises:
            UserError: no such section; lists those there are.
        """
        for section in self.sections:
            if section.name == name:
                return section
        known = ", ".join(section.name for section in self.sections)
        raise UserError(f"section: expected one of {known}; got {name!r}; choose one")

    def figure(self) -> Any:
        """Return every predicted time of the run beside what was measured or published, a series per check."""
        return sections_figure(self.sections, "Predicted beside measured or published")

    def ops_figure(self) -> Any:
        """Return the fitted op times against this machine's measurements."""
        return ops_figure(self.op_times, self.measurements)

    def __str__(self) -> str:
        return "\n\n".join(str(section) for section in self.sections)


def out_folder() -> Path:
    """Return where runs are kept: $LONGCAT_SIM_OUT, else ``out`` beside the present folder."""
    return Path(os.environ.get(FOLDER_VARIABLE) or Path("..") / "out")


def saved_run(out: str | Path | None = None, *, progress: Progress | None = None) -> SavedRun:
    """Return the quickstart in ``out`` (``out_folder()`` by default); make it first where there is none.

    Raises:
        UserError: files of another version, or a folder that cannot be written.
    """
    folder = out_folder() if out is None else Path(out)
    if not all((folder / name).exists() for name in FILES):
        quickstart(folder, progress=progress or _tell)
    return load_run(folder)


def load_run(folder: Path) -> SavedRun:
    """Return the quickstart in ``folder``.

    Raises:
        UserError: no run there, one that did not end, or one of another version.
    """
    advice = "delete the folder and run `python -m longcat_sim quickstart` again"
    profiles = [folder / f"{name}.yaml" for name in PROFILES.values() if (folder / f"{name}.yaml").exists()]
    missing = [name for name in FILES if not (folder / name).exists()] + ([] if profiles else ["a hardware profile"])
    if missing:
        raise UserError(f"{folder}: expected a finished quickstart; it lacks {', '.join(missing)}; {advice}")
    try:
        summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        sections = [_section(document) for document in summary["sections"].values()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder / 'summary.json'}: expected a summary of this version; got {error!r}; {advice}"
        ) from None
    hardware = load_hardware(profiles[0])
    if not hardware.fit:
        raise UserError(f"{profiles[0]}: expected a fit; got a data sheet alone, of a run that did not end; {advice}")
    times = OpTimes.from_hardware(hardware)
    return SavedRun(folder, sections, load_measurements(folder / "measurements.jsonl"), times, summary)


def _section(document: dict[str, Any]) -> Section:
    rows = [Row(**row) for row in document["rows"]]
    return Section(document["name"], document["title"], rows, list(document["notes"]), document["skipped"])


def _tell(what: str, share: float, left_s: float) -> None:
    end = "\n" if share >= 1 else ""
    sys.stderr.write(f"\rquickstart: {share:4.0%} {what[:40]:<40} about {max(left_s, 0):.0f} s left{end}")
