"""Evaluate many scenarios: in this process, on an executor, or on a Dask cluster; results survive a kill.

One call for all: ``executor`` is None or any ``concurrent.futures.Executor``. With ``store``, every result is appended
to a JSON Lines file keyed by the scenario's hash as soon as it is known, so that a second call repeats nothing.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from longcat_sim.errors import CapacityError, UserError
from longcat_sim.specs.scenario import Scenario

VERSION = 3
"""Of the sweep file."""
IN_FLIGHT = 256
"""Most chunks handed to an executor at a time: a sweep of a million points must not be a million futures."""

Figures = Mapping[str, float]
Evaluate = Callable[[Scenario], Figures]
"""What a sweep runs. For process pools and Dask it must be a function of a module, or a ``partial`` of one."""
Progress = Callable[[int, int, float], None]
"""Called with (done, total, seconds left)."""


@dataclass(frozen=True)
class Point:
    """One scenario's outcome: its figures, or the faults for which it could not be evaluated."""

    digest: str
    figures: Mapping[str, Any] | None
    faults: tuple[str, ...] = ()


def sweep(
    scenarios: Sequence[Scenario],
    evaluate: Evaluate,
    executor: Executor | None = None,
    *,
    store: str | Path | None = None,
    progress: Progress | None = None,
    chunk: int = 1,
) -> list[Point]:
    """Return the outcome of every scenario, in order; a user's fault in one is recorded and stops no other.

    ``chunk`` scenarios travel to a worker together: choose it so that a chunk takes a tenth of a second or more.

    Raises:
        CapacityError: ``store`` is a sweep file of another version or of another evaluation.
    """
    label = _label(evaluate)
    keys = [scenario.digest() for scenario in scenarios]
    known = _read(Path(store), label) if store is not None else {}
    todo: dict[str, Scenario] = {}
    for key, scenario in zip(keys, scenarios, strict=True):
        if key not in known:
            todo.setdefault(key, scenario)
    began, done = time.perf_counter(), 0
    with _appending(store, label) as file:
        for points in _run(list(todo.items()), evaluate, executor, max(1, chunk)):
            for point in points:
                known[point.digest] = point
                if file is not None:
                    row = {"digest": point.digest, "figures": point.figures, "faults": list(point.faults)}
                    file.write(json.dumps(row, allow_nan=False) + "\n")
            if file is not None:
                file.flush()
            done += len(points)
            if progress is not None:
                progress(done, len(todo), (time.perf_counter() - began) / done * (len(todo) - done))
    return [known[key] for key in keys]


def evaluate_point(key: str, scenario: Scenario, evaluate: Evaluate) -> Point:
    """Return one scenario's point; a ``UserError`` becomes its faults."""
    try:
        figures = evaluate(scenario)
    except UserError as error:
        return Point(key, None, error.faults)
    return Point(key, {name: value.item() if hasattr(value, "item") else value for name, value in figures.items()})


def _evaluate_chunk(items: Sequence[tuple[str, Scenario]], evaluate: Evaluate) -> list[Point]:
    return [evaluate_point(key, scenario, evaluate) for key, scenario in items]


def _run(
    items: Sequence[tuple[str, Scenario]], evaluate: Evaluate, executor: Executor | None, chunk: int
) -> Iterator[list[Point]]:
    """Yield points as they come, never more than ``IN_FLIGHT`` chunks ahead of what was collected."""
    chunks = [items[at : at + chunk] for at in range(0, len(items), chunk)]
    if executor is None:
        for part in chunks:
            yield _evaluate_chunk(part, evaluate)
        return
    waiting: set[Future[list[Point]]] = set()
    try:
        for part in chunks:
            waiting.add(executor.submit(_evaluate_chunk, part, evaluate))
            if len(waiting) >= IN_FLIGHT:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        while waiting:
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in finished)
    finally:
        for future in waiting:
            future.cancel()


def _label(evaluate: Any) -> str:
    """Return a name of an evaluation that is the same in the next process."""
    if hasattr(evaluate, "func"):  # functools.partial
        given = [repr(value) for value in evaluate.args]
        given += [f"{name}={value!r}" for name, value in sorted(evaluate.keywords.items())]
        return f"{_label(evaluate.func)}({', '.join(given)})"
    return f"{evaluate.__module__}.{evaluate.__qualname__}"


def _read(path: Path, label: str) -> dict[str, Point]:
    """Return the points of a sweep file; a last line that a kill cut short is left out."""
    if not path.exists() or not path.stat().st_size:
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    try:
        head = json.loads(lines[0])
        version, of = head["longcat_sim_sweep"], head["evaluate"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise CapacityError(
            f'{path}:1: expected the head of a sweep file, such as {{"longcat_sim_sweep": {VERSION}, ...}}; got '
            f"{lines[0][:60]!r}; give another path"
        ) from None
    if version != VERSION:
        raise CapacityError(
            f"{path}:1: longcat_sim_sweep: expected version {VERSION}; got {version!r}; it was written by another "
            "version of longcat_sim: give another path, or remove the file to compute it again"
        )
    if of != label:
        raise CapacityError(
            f"{path}:1: evaluate: expected results of {label}; got those of {of}; give another path"
        )  # fmt: skip
    points: dict[str, Point] = {}
    for number, line in enumerate(lines[1:], start=2):
        try:
            row = json.loads(line)
            points[row["digest"]] = Point(row["digest"], row["figures"], tuple(row["faults"]))
        except (json.JSONDecodeError, KeyError, TypeError):
            if number == len(lines):
                break  # cut short by a kill: computed again
            raise CapacityError(
                f"{path}:{number}: expected one result per line; got {line[:60]!r}; remove the line to compute it again"
            ) from None
    return points


@contextmanager
def _appending(store: str | Path | None, label: str) -> Iterator[IO[str] | None]:
    """Yield the sweep file, open for appending after its last whole line; None without a store."""
    if store is None:
        yield None
        return
    path = Path(store)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size:
        whole = path.read_bytes()
        last = whole.rfind(b"\n") + 1
        if last < len(whole):
            try:
                json.loads(whole[last:])
            except json.JSONDecodeError:
                os.truncate(path, last)
            else:
                with path.open("ab") as ending:
                    ending.write(b"\n")
    is_new = not path.exists() or not path.stat().st_size
    with path.open("a", encoding="utf-8") as file:
        if is_new:
            file.write(json.dumps({"longcat_sim_sweep": VERSION, "evaluate": label}) + "\n")
            file.flush()
        yield file


@contextmanager
def dask_executor(address: str, *, timeout_s: float = 10.0) -> Iterator[Executor]:
    """Yield an executor on the Dask cluster whose scheduler listens at ``address``.

    Raises:
        CapacityError: Dask is not installed, or the scheduler does not answer.
    """
    try:
        from dask.distributed import Client
    except ImportError:
        raise CapacityError(
            "--dask: expected Dask to be installed; it is not; run: pip install 'longcat-sim[dask]'"
        ) from None
    try:
        client = Client(address, timeout=timeout_s)
    except (OSError, TimeoutError, ValueError) as error:
        raise CapacityError(
            f"--dask: expected the address of a running Dask scheduler, such as tcp://10.0.0.1:8786; got {address!r}, "
            f"which did not answer within {timeout_s:g} s ({type(error).__name__}); start one with `dask scheduler`"
        ) from None
    try:
        yield client.get_executor()
    finally:
        client.close()


def progress_line(what: str, every_s: float = 1.0, say: Callable[[str], None] | None = None) -> Progress:
    """Return a ``Progress`` that says ``what: done of total, time left`` at most every ``every_s`` seconds."""
    import sys

    last = [0.0]

    def tell(done: int, total: int, left_s: float) -> None:
        now = time.monotonic()
        if done < total and now - last[0] < every_s:
            return
        last[0] = now
        text = f"{what}: {done} of {total}" + (f", {left_s:.0f} s left" if done < total else "")
        (say or (lambda line: print(line, file=sys.stderr)))(text)

    return tell
