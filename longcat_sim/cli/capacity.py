"""``capacity``: the deployment that answers a scenario's search best, as a table or as JSON."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from longcat_sim.cli.output import load, print_json, say


def run(
    scenario: Annotated[str, typer.Argument(help="A packaged scenario's name or a YAML file with a search: section.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Change a figure: path=value. Repeatable.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")] = False,
    dask: Annotated[str | None, typer.Option(help="Simulate on the Dask cluster of this scheduler address.")] = None,
    processes: Annotated[int, typer.Option(help="Worker processes; 0: one per core.", min=0)] = 0,
    picture: Annotated[Path | None, typer.Option(help="Draw price against speed into this .html or .png.")] = None,
    store: Annotated[Path | None, typer.Option(help="Keep results in this JSON Lines file; resumes from it.")] = None,
) -> None:
    """Find the deployment that answers a scenario's search best."""
    from longcat_sim.capacity.sweep import progress_line
    from longcat_sim.figures.picture import check_picture, write_picture
    from longcat_sim.records.files import check_outputs
    from longcat_sim.studies.capacity import capacity

    check_outputs(files={"--picture": picture, "--store": store})  # before the search, which takes a while
    if picture is not None:
        check_picture(picture)
    made = load(scenario, set_ or [])
    with _executor(dask, processes) as executor:
        result = capacity(made, executor, store=store, progress=progress_line("simulated", 2.0, say))
    result.source = scenario
    if picture is not None:
        from longcat_sim.figures.capacity import capacity_figure

        write_picture(capacity_figure(result), picture)
        say(f"picture written to {picture}")
    if json:
        print_json(result.to_json())
    else:
        print(result)


def _executor(dask: str | None, processes: int) -> AbstractContextManager[Any]:
    """Return the cluster's executor, a pool of processes, or none for one process."""
    if dask is not None:
        from longcat_sim.capacity.sweep import dask_executor

        return dask_executor(dask)
    count = processes or os.cpu_count() or 1
    if count == 1:
        return nullcontext()
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    return ProcessPoolExecutor(count, mp_context=get_context("spawn"))
