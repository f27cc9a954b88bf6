"""``simulate``: one scenario, as a table or as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from longcat_sim.cli.output import load, print_json, say


def run(
    scenario: Annotated[str, typer.Argument(help="A packaged scenario's name or a YAML file.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Change a figure: path=value. Repeatable.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome trace that opens in Perfetto.")] = None,
    step_by_step: Annotated[bool, typer.Option("--step-by-step", help="Serving: the slow oracle.")] = False,
) -> None:
    """Simulate a scenario."""
    from longcat_sim.records.files import check_outputs, write_text
    from longcat_sim.studies.simulate import simulate

    check_outputs(files={"--trace": trace})
    chosen = load(scenario, set_ or [])
    if step_by_step and chosen.serve is None:
        say("--step-by-step has no effect on one step: it is the slow oracle of traffic (serve:)")
    result = simulate(
        chosen,
        step_by_step=step_by_step,
        keep_spans=trace is not None,
        progress=say,
    )
    if trace is not None:
        import json as json_module

        write_text(trace, json_module.dumps(result.chrome_trace()))
        say(f"trace written to {trace}; open it at ui.perfetto.dev")
    if json:
        print_json(result.to_json())
    else:
        print(result)
