"""``quickstart``: the main job, end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longcat_sim.cli.output import bar, say


def run(
    out: Annotated[Path, typer.Option(help="Folder for the report, the measurements and the profile.")] = Path("out"),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Measure this machine, fit, simulate 128 GPUs, price a token, and check every prediction."""
    from longcat_sim.studies.quickstart import quickstart

    with bar("quickstart") as progress:
        found = quickstart(out, device=device, progress=progress)
    print(found)
    say(f"open {out / 'report.html'} in a browser")
