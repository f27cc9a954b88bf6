"""``validate``: predictions beside published and measured results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longcat_sim.cli.output import print_json, say
from longcat_sim.errors import SpecError
from longcat_sim.studies.validate.sections import PER_HARDWARE, SECTIONS


def run(
    section: Annotated[
        list[str] | None,
        typer.Option("--section", help=f"Only this section. Repeatable. One of {', '.join(SECTIONS)}."),
    ] = None,
    hardware: Annotated[
        list[str] | None,
        typer.Option("--hardware", help=f"Only this profile, in {' and '.join(PER_HARDWARE)}. Repeatable."),
    ] = None,
    vllm_run: Annotated[Path | None, typer.Option(help="A recorded engine run: requests.jsonl, meta.json, ...")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
) -> None:
    """Print predictions beside published and measured results."""
    if vllm_run is not None and (section or hardware):
        raise SpecError("--vllm-run: expected neither --section nor --hardware beside it; drop them or --vllm-run")
    if vllm_run is not None:
        import warnings

        from longcat_sim.studies.validate import vllm_run as recorded

        with warnings.catch_warnings(record=True) as remarks:
            warnings.simplefilter("always", UserWarning)
            found = recorded.run(vllm_run)
        for remark in remarks:
            say(str(remark.message))
        if json:
            print_json(found)
            return
        print(f"{'':8} {'':6} {'predicted':>11} {'runs':>6} {'measured':>11} {'error':>8}")
        for quantity, statistics in found.items():
            for statistic, row in statistics.items():
                runs = f"±{row['spread']:.1%}"
                error = "" if row["error"] is None else f"{row['error']:+.2%}"
                print(
                    f"{quantity:8} {statistic:6} {row['predicted']:11.4g} {runs:>6} {row['measured']:11.4g} {error:>8}"
                )
        return
    from longcat_sim.studies.validate.sections import run_sections

    sections = run_sections(section or [], progress=say, hardware=hardware or [])
    if json:
        print_json({each.name: each.to_json() for each in sections})
    else:
        print("\n\n".join(str(each) for each in sections))
