"""``RequestRecord``: everything that is known of one served request, flat; JSON Lines in and out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

Status = Literal["completed", "rejected", "failed"]


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request's life: arrival -> scheduled -> first token -> last token. Seconds since the start of the run.

    Times that never came are ``None``. ``cached_tokens`` counts prompt tokens found in a prefix cache at the first
    admission; ``tag`` tells whether a step-time of the request lay outside the grid.
    """

    request: int
    arrival_s: float
    input_tokens: int
    output_tokens: int
    """Tokens generated: fewer than asked for only if the request failed."""
    status: Status
    reason: str = ""
    scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    cached_tokens: int = 0
    preemptions: int = 0
    retries: int = 0
    replica: int = -1
    """Where it was prefilled (and decoded, in a shared pool); -1: nowhere."""
    decode_replica: int = -1
    slo_class: str = "default"
    session: int = -1
    turn: int = 0
    is_tool_call: bool = False

    @property
    def ttft_s(self) -> float | None:
        """Arrival to first token."""
        return None if self.first_token_s is None else self.first_token_s - self.arrival_s

    @property
    def e2e_s(self) -> float | None:
        """Arrival to last token."""
        return None if self.last_token_s is None else self.last_token_s - self.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """(last - first token) / (n - 1); ``None`` for a single token."""
        if self.first_token_s is None or self.last_token_s is None or self.output_tokens < 2:
            return None
        return (self.last_token_s - self.first_token_s) / (self.output_tokens - 1)


def write_requests(records: Iterable[RequestRecord], path: Path) -> None:
    """Write records as JSON Lines."""
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(asdict(record)) + "\n")


def read_requests(path: Path) -> Iterator[RequestRecord]:
    """Yield the records of a file that ``write_requests`` wrote.

    Raises:
        ValueError: a line is not a record; the message names it.
    """
    known = {field.name for field in fields(RequestRecord)}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                unknown = set(row) - known
                if unknown:
                    raise TypeError(f"unknown keys {', '.join(sorted(unknown))}")
                yield RequestRecord(**row)
            except (json.JSONDecodeError, TypeError) as fault:
                raise ValueError(f"{path}:{number}: expected one request record per line; got {fault}") from fault
