"""Recorded traces as streams of requests: one row at a time, faults counted and listed by line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from longcat_sim.errors import WorkloadError
from longcat_sim.simulation.serving.request import Request
from longcat_sim.specs.serve import Serve, TraceFormat, Workload

MOONCAKE_BLOCK_TOKENS = 512
"""Tokens behind one entry of ``hash_ids``. Source: Mooncake FAST'25 release, README of the traces."""
LISTED_FAULTS, FEW_FAULTS = 20, 3
EPOCH_S = 1e8
"""A first arrival later than this (three years) is an epoch clock: time then starts with it."""


@dataclass
class Faults:
    """Rows that were skipped: their number, and the first of them with line and reason."""

    path: str
    limit: int
    hint: str = ""
    """What to try where hardly a row can be read."""
    count: int = 0
    listed: list[str] = field(default_factory=list)

    def add(self, line: int, reason: str) -> None:
        """Count one faulty row.

        Raises:
            WorkloadError: there are more than the limit.
        """
        self.count += 1
        if len(self.listed) < (FEW_FAULTS if self.hint else LISTED_FAULTS):  # of another format all are alike
            self.listed.append(f"{self.path}:{line}: {reason}")
        if self.count > self.limit:
            raise WorkloadError(
                [
                    f"{self.path}: expected at most {self.limit} faulty rows (max_bad_rows); got {self.count} by line "
                    f"{line}; the first are below; {self.hint or 'mend the trace, or raise max_bad_rows to skip them'}",
                    *self.listed,
                ]
            )

    def finish(self, good: int) -> None:
        """Raise WorkloadError where more rows were faulty than good: a table of the rest would mislead."""
        if self.count > good:
            raise WorkloadError(
                [
                    f"{self.path}: expected mostly rows that can be read; got {self.count} faulty and {good} good; "
                    f"the first are below; {self.hint or 'mend the trace'}",
                    *self.listed,
                ]
            )


Row = tuple[float, int, int, Any]  # seconds, input, output, the rest


def _azure(lines: Iterator[str], faults: Faults) -> Iterator[tuple[int, Row | str]]:
    header = next(lines, "").strip().lstrip("﻿").split(",")
    try:
        columns = [header.index(name) for name in ("TIMESTAMP", "ContextTokens", "GeneratedTokens")]
    except ValueError:
        raise WorkloadError(
            f"{faults.path}:1: expected the columns TIMESTAMP,ContextTokens,GeneratedTokens; got "
            f"{','.join(header)[:120]!r}; {faults.hint or 'is this an Azure trace (format: azure)?'}"
        ) from None
    days: dict[str, float] = {}
    for number, line in enumerate(lines, start=2):
        if not line.strip():
            continue
        try:
            cells = line.rstrip("\n").split(",")
            stamp = cells[columns[0]]
            day = days.get(stamp[:10])
            if day is None:
                day = days[stamp[:10]] = date.fromisoformat(stamp[:10]).toordinal() * 86400.0
            # whole and fractional seconds apart: together they would lose digits
            seconds = day + int(stamp[11:13]) * 3600 + int(stamp[14:16]) * 60 + float(stamp[17:].split("+")[0])
            yield number, (seconds, int(cells[columns[1]]), int(cells[columns[2]]), None)
        except (ValueError, IndexError) as fault:
            yield number, f"expected a row like '2023-11-16 18:15:46.6805900,374,44'; got {line.strip()!r} ({fault})"


def _json_rows(lines: Iterator[str], read: Callable[[dict], Row], example: str) -> Iterator[tuple[int, Row | str]]:
    loads = json.loads
    for number, line in enumerate(lines, start=1):
        if line == "\n" or not line:
            continue
        try:
            yield number, read(loads(line))
        except (ValueError, KeyError, TypeError) as fault:
            yield number, f"expected a row like {example}; got {line.strip()[:120]!r} ({fault!r})"


def _read_mooncake(row: dict) -> Row:
    return row["timestamp"] * 1e-3, row["input_length"], row["output_length"], row.get("hash_ids")


def _read_own(row: dict) -> Row:
    return row["arrival_s"] * 1.0, row["input_tokens"], row["output_tokens"], row


def _rows(lines: Iterator[str], form: TraceFormat, faults: Faults) -> Iterator[tuple[int, Row | str]]:
    if form == "azure":
        return _azure(lines, faults)
    if form == "mooncake":
        example = '{"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47]}'
        return _json_rows(lines, _read_mooncake, example)
    return _json_rows(lines, _read_own, '{"arrival_s": 0.5, "input_tokens": 1020, "output_tokens": 211}')


def _format_of(path: Path) -> TraceFormat | None:
    """Return the format that the first row of a trace looks like, if any."""
    with path.open(encoding="utf-8", errors="replace") as file:
        row = next((line for line in file if line.strip()), "")
    marks: dict[TraceFormat, tuple[str, ...]] = {
        "azure": ("TIMESTAMP", "ContextTokens"), "mooncake": ('"timestamp"', '"input_length"'),
        "jsonl": ('"arrival_s"', '"input_tokens"'),
    }  # fmt: skip
    return next((form for form, names in marks.items() if all(name in row for name in names)), None)


class TraceReader:
    """Iterate over the requests of a trace in order of arrival; memory does not grow with its length."""

    def __init__(self, serve: Serve) -> None:
        workload = serve.workload
        assert workload.trace is not None
        self.workload: Workload = workload
        self.path = Path(workload.trace)
        if not self.path.is_file():
            raise WorkloadError(
                f"serve.workload.trace: expected the path of a {workload.format} trace; got {workload.trace!r}, "
                "which is not a file; correct the path"
            )
        self.block_tokens = serve.scheduler.block_tokens
        if workload.format == "mooncake" and MOONCAKE_BLOCK_TOKENS % self.block_tokens:
            raise WorkloadError(
                f"serve.scheduler.block_tokens must divide the trace's {MOONCAKE_BLOCK_TOKENS}-token blocks: "
                f"{MOONCAKE_BLOCK_TOKENS} % {self.block_tokens} = {MOONCAKE_BLOCK_TOKENS % self.block_tokens}; try 16"
            )
        self.classes = {level.name: (at, level.priority) for at, level in enumerate(serve.slo)}
        form = _format_of(self.path)
        hint = f"its first row is of another format: try --set serve.workload.format={form}"
        is_other = form is not None and form != workload.format
        self.faults = Faults(str(self.path), workload.max_bad_rows, hint if is_other else "")
        self.count = 0

    def __iter__(self) -> Iterator[Request]:
        workload = self.workload
        most = workload.num_requests or 1 << 62
        until = 1 << 62 if workload.duration is None else round(workload.duration * 1e9)
        limit = workload.max_context_tokens or 1 << 62
        with self.path.open(encoding="utf-8", errors="replace") as file:
            start: float | None = None
            last = 0
            for number, row in _rows(iter(file), workload.format, self.faults):
                if self.count >= most:
                    break
                if isinstance(row, str):
                    self.faults.add(number, row)
                    continue
                seconds, input_tokens, output_tokens, rest = row
                problem = self._problem(seconds, input_tokens, output_tokens, limit)
                if problem:
                    self.faults.add(number, problem)
                    continue
                if start is None:
                    start = seconds if workload.format == "azure" or seconds > EPOCH_S else 0.0
                arrival = round((seconds - start) / workload.time_scale * 1e9)
                if arrival < last:
                    self.faults.add(
                        number, f"expected arrivals in order; got {seconds} s, which is before the row above; sort them"
                    )
                    continue
                if arrival > until:
                    break
                last = arrival
                self.count += 1
                yield self._request(arrival, input_tokens, output_tokens, rest)
        self.faults.finish(self.count)
        if not self.count:
            raise WorkloadError(f"{self.path}: expected one request at least; the file is empty; give another")

    @staticmethod
    def _problem(seconds: Any, input_tokens: Any, output_tokens: Any, limit: int) -> str:
        if type(input_tokens) is not int or type(output_tokens) is not int:
            return f"expected whole numbers of tokens; got {input_tokens!r} and {output_tokens!r}"
        if not 0 <= seconds < 1e12:
            return f"expected an arrival time of 0 s or later; got {seconds}"
        if input_tokens < 1 or output_tokens < 1:
            return f"expected 1 token at least in and out; got {input_tokens} and {output_tokens}"
        if input_tokens + output_tokens > limit:
            total = input_tokens + output_tokens
            return (
                f"input + output must fit in max_context_tokens: {input_tokens} + {output_tokens} = {total} > {limit}"
            )
        return ""

    def _request(self, arrival: int, input_tokens: int, output_tokens: int, rest: Any) -> Request:
        chain: Any = ()
        if rest is None:
            return Request(0, arrival, input_tokens, output_tokens)
        if type(rest) is list:
            blocks = MOONCAKE_BLOCK_TOKENS // self.block_tokens
            # the last, partly filled block has a hash of its own that no longer prompt shares
            return Request(
                0,
                arrival,
                input_tokens,
                output_tokens,
                [(rest[: input_tokens // MOONCAKE_BLOCK_TOKENS], blocks)],
            )
        if "hash_ids" in rest:
            per_hash = rest.get("hash_block_tokens", MOONCAKE_BLOCK_TOKENS)
            chain = [(rest["hash_ids"][: input_tokens // per_hash], per_hash // self.block_tokens)]
        request = Request(0, arrival, input_tokens, output_tokens, chain)
        if "slo_class" in rest:
            request.slo_class, request.priority = self.classes.get(rest["slo_class"], (0, 0))
        if "priority" in rest:
            request.priority = rest["priority"]
        return request


def trace_lengths(path: str, form: TraceFormat) -> tuple[list[int], list[int]]:
    """Return the input and the output lengths of a trace, to draw from."""
    faults = Faults(path, 1 << 30)
    if not Path(path).is_file():
        raise WorkloadError(f"fit: expected the path of a {form} trace; got {path!r}, which is not a file")
    inputs, outputs = [], []
    with Path(path).open(encoding="utf-8") as file:
        for _, row in _rows(iter(file), form, faults):
            if not isinstance(row, str) and row[1] > 0 and row[2] > 0:
                inputs.append(row[1])
                outputs.append(row[2])
    if not inputs:
        raise WorkloadError(f"fit: {path} holds no usable row of format {form}; correct the path or the format")
    return inputs, outputs
