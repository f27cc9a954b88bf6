"""``quickstart``: the loop of the whole project on one machine, in about two minutes."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longcat_sim.calibration import OpTimes
from longcat_sim.records.files import check_outputs, write_text
from longcat_sim.records.measurement import save_measurements
from longcat_sim.specs.hardware import LOCAL
from longcat_sim.specs.scenario import scenario
from longcat_sim.studies.measure import calibrate, write_this_machine
from longcat_sim.studies.quickstart.checks import (
    decode_steps,
    held_out_ops,
    prices,
    published_rows,
    traffic,
    two_ranks,
)
from longcat_sim.studies.result import ServeOutcome, StepOutcome
from longcat_sim.studies.validate.section import Section

Progress = Callable[[str, float, float], None]
MODEL = "longcat-cpu-64e"
"""What is run here: a LongCat-Flash small enough for two minutes on two cores."""
STAGES = ("measure", "fit", "steps", "ranks", "simulate", "serve", "report")
SHARES = (0.0, 0.37, 0.39, 0.54, 0.89, 0.92, 0.98)
"""Where each stage starts on the progress bar, by its usual time."""
PROFILE_BUDGET_S = 50.0
PROFILES = {"cuda": "cuda-local", "cpu": LOCAL}
"""Name of the hardware profile by sort of device."""


@dataclass
class Quickstart:
    """Everything that the quickstart found."""

    sections: list[Section]
    step: StepOutcome
    serving: ServeOutcome
    op_times: OpTimes
    out: Path
    wall_s: float = 0.0
    stage_s: dict[str, float] = field(default_factory=dict)
    measured: str = ""

    def __str__(self) -> str:
        text = "\n\n".join(str(section) for section in self.sections)
        files = ", ".join(sorted(path.name for path in self.out.iterdir()))
        return f"{text}\n\n{self.measured}\nwritten to {self.out}: {files}\ntook {self.wall_s:.0f} s"

    def summary(self) -> dict[str, Any]:
        """Return everything as plain data; units in the keys."""
        return {
            "sections": {section.name: section.to_json() for section in self.sections},
            "simulate": self.step.to_json(),
            "serve": self.serving.to_json(),
            "wall_s": self.wall_s,
            "stage_s": self.stage_s,
        }


def quickstart(out: Path, *, device: str = "auto", progress: Progress | None = None) -> Quickstart:
    """Measure this machine, fit, check, simulate LongCat-Flash on 128 H800, serve an hour, price; write a report.

    Files appear in ``out`` one whole file at a time: measurements.jsonl, the hardware profile, summary.json,
    report.html. Those of an earlier run go first, so that an interrupted one leaves no mixture of two.

    Raises:
        UserError: a device that this machine does not have, or a folder that cannot be written.
    """
    from longcat_sim.profiling.profile import pick_device, profile
    from longcat_sim.profiling.suites import SMALL
    from longcat_sim.studies.quickstart.report import write_report

    began = time.monotonic()
    stages: dict[str, float] = {}

    def tell(stage: int, what: str, share: float = 0.0) -> None:
        stages.setdefault(STAGES[stage], time.monotonic() - began)
        end = SHARES[stage + 1] if stage + 1 < len(SHARES) else 1.0
        whole = SHARES[stage] + share * (end - SHARES[stage])
        spent = time.monotonic() - began
        if progress is not None:
            progress(what, whole, spent / whole - spent if whole > 0.02 else 150.0)

    place = pick_device(device)
    check_outputs(folders={"--out": out})
    out.mkdir(parents=True, exist_ok=True)
    for earlier in ("summary.json", "report.html", *(f"{name}.yaml" for name in PROFILES.values())):
        (out / earlier).unlink(missing_ok=True)
    name = PROFILES[place.type]
    tell(0, "describing this machine")
    write_this_machine(name, out / f"{name}.yaml")
    measured = profile(
        device=place, spec=MODEL, budget_s=PROFILE_BUDGET_S, grid=SMALL if place.type == "cpu" else None,
        progress=lambda what, share, left: tell(0, f"measuring {what}", share),
    )  # fmt: skip
    save_measurements(out / "measurements.jsonl", measured.environment, measured.rows)
    tell(1, "fitting")
    times = calibrate(out / "measurements.jsonl", name, out / f"{name}.yaml")
    _install(out / f"{name}.yaml", name)
    sections = [held_out_ops(times)]
    tell(2, "running decode and prefill steps")
    sections.append(decode_steps(times, MODEL, place))
    tell(3, "two ranks, with and without overlap")
    sections.append(two_ranks(MODEL))
    tell(4, "LongCat-Flash on 128 H800")
    rows, step = published_rows()
    sections.append(rows)
    tell(5, "an hour of traffic")
    serving = traffic(scenario("longcat-flash-h800-serve", {"draws": 1}))
    sections.append(prices(step, serving))
    tell(6, "report")
    result = Quickstart(sections, step, serving, times, out, measured=measured.summary())
    result.stage_s = stages
    result.wall_s = time.monotonic() - began
    write_text(out / "summary.json", json.dumps(result.summary(), indent=2, default=float) + "\n")
    write_report(result, measured.rows, out / "report.html")
    result.wall_s = time.monotonic() - began
    if progress is not None:
        progress("done", 1.0, 0.0)
    return result


def _install(profile: Path, name: str) -> None:
    """Copy the profile to ./hardware_profiles, where scenarios look for it."""
    folder = Path("hardware_profiles")
    if folder.is_dir():
        shutil.copyfile(profile, folder / f".{name}.part")
        (folder / f".{name}.part").replace(folder / f"{name}.yaml")
