"""``topk-study``: top-k sparse attention on a real language model and from scratch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longcat_sim.cli.output import say


def run(
    out: Annotated[Path, typer.Option(help="Folder for topk_study.json and topk_study.html.")],
    quick: Annotated[bool, typer.Option("--quick", help="A minute: every part shrunk until it says little.")] = False,
) -> None:
    """Study top-k sparse attention: exact, native, approximate, and what is lost."""
    from longcat_sim.studies.topk.study import run_study

    found = run_study(out, quick=quick, progress=say)
    for claim in found.get("claims", []):
        print(claim if isinstance(claim, str) else f"{claim.get('claim', '')}: {claim.get('verdict', '')}")
    say(f"open {out / 'topk_study.html'} in a browser")
