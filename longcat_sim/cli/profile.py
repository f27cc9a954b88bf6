"""``profile``: time operators, collectives and contention on this machine."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from longcat_sim.cli.output import bar, say

BUDGET_S = 120.0


def run(
    out: Annotated[Path, typer.Option(help="Measurements, JSON Lines; an existing file of this device is resumed.")],
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    suite: Annotated[list[str] | None, typer.Option("--suite", help="Only this suite. Repeatable.")] = None,
    campaign: Annotated[
        bool,
        typer.Option(
            "--campaign",
            help="All suites, by value; meant for an 80 GB GPU.",
        ),
    ] = False,
    model: Annotated[str | None, typer.Option(help="Take the shapes of this model.")] = None,
    budget_s: Annotated[
        float, typer.Option(min=0.0, help="Time box in s; what it drops is said. 0: 120, a campaign 480.")
    ] = 0.0,
) -> None:
    """Time operators, collectives and contention on this machine."""
    from longcat_sim.errors import MeasurementError
    from longcat_sim.profiling.campaign import run_campaign
    from longcat_sim.profiling.profile import pick_device, profile
    from longcat_sim.profiling.suites import DENSE, FULL, SUITES
    from longcat_sim.records.files import check_outputs

    if campaign and (suite or model):
        given = " and ".join([f"--suite {name}" for name in suite or ()] + ([f"--model {model}"] if model else []))
        raise MeasurementError(
            f"--campaign: expected no --suite and no --model, its plan has them; got {given}; drop it"
        )
    check_outputs(files={"--out": out})
    suites = suite or list(SUITES)
    if campaign:
        with bar("campaign") as progress:
            found = run_campaign(out, device=device, budget_s=budget_s or 480.0, progress=progress)
    else:
        spec = model or "longcat-cpu-64e"
        with bar("profile") as progress:
            if set(suites) <= set(SUITES) and os.environ.get("WORLD_SIZE", "1") == "1":
                found = profile(suites, device, spec, budget_s or BUDGET_S, resume=out, out=out, progress=progress)
            else:
                grid = FULL if pick_device(device).type == "cuda" else DENSE
                plan = tuple((name, spec, 1.0) for name in suites)
                found = run_campaign(
                    out, device=device, budget_s=budget_s or BUDGET_S, progress=progress, plan=plan, grid=grid
                )
    if os.environ.get("RANK", "0") == "0":  # of torchrun's ranks the first writes
        if not out.exists():
            raise MeasurementError(f"--out {out}: expected at least one point; got none: {found.summary()}")
        say(f"{found.summary()}; written to {out}")
        if found.advice():
            say(found.advice())
