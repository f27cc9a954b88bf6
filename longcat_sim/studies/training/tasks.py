"""Runs of the study as tasks: each a plain function of JSON arguments with a JSON result, cached in a file."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longcat_sim.records.files import write_text
from longcat_sim.studies.training.claims import finite


@dataclass(frozen=True)
class Task:
    """One run: ``module:function`` of this folder and its arguments."""

    key: str
    function: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    cost: float = 1.0
    """Rough core seconds: the long ones start first, and the bar moves by it."""


def call(function: str, arguments: Mapping[str, Any], threads: int = 1) -> dict[str, Any]:
    """Run a task in this process with ``threads`` torch threads; adds ``cpu_s`` and ``wall_s`` to its result."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    began, cpu = time.perf_counter(), time.process_time()
    try:
        module, name = function.split(":")
        result = getattr(importlib.import_module(f"longcat_sim.studies.training.{module}"), name)(**arguments)
    finally:
        torch.set_num_threads(before)
    return {**result, "wall_s": time.perf_counter() - began, "cpu_s": time.process_time() - cpu}


def run_tasks(
    tasks: Sequence[Task], out: Path, *, executor: Executor | None, done: Callable[[Task, dict[str, Any]], None]
) -> dict[str, dict[str, Any]]:
    """Return each task's result by key; what an earlier call finished with the same arguments is read from ``out``."""
    results: dict[str, dict[str, Any]] = {}
    todo: list[Task] = []

    def keep(task: Task, result: dict[str, Any]) -> None:
        write_text(_file(out, task), json.dumps(finite({"task": _identity(task), "result": result})))
        results[task.key] = finite(result)
        done(task, result)

    for task in sorted(tasks, key=lambda t: -t.cost):
        kept = _read(out, task)
        if kept is None:
            todo.append(task)
        else:
            results[task.key] = kept
            done(task, kept)
    if executor is None:
        for task in todo:
            keep(task, call(task.function, task.arguments))
        return results
    waiting: dict[Future[dict[str, Any]], Task] = {
        executor.submit(call, task.function, dict(task.arguments)): task for task in todo
    }
    try:
        while waiting:
            finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in finished:
                keep(waiting.pop(future), future.result())
    except BaseException:
        for future in waiting:
            future.cancel()
        raise
    return results


def _identity(task: Task) -> dict[str, Any]:
    return json.loads(json.dumps({"function": task.function, "arguments": dict(task.arguments)}))


def _file(out: Path, task: Task) -> Path:
    return out / "runs" / f"{task.key}.json"


def _read(out: Path, task: Task) -> dict[str, Any] | None:
    try:
        kept = json.loads(_file(out, task).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return kept["result"] if kept.get("task") == _identity(task) else None
