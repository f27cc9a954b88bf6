"""The JSON files of a recorded vLLM run: single objects, and the measured requests, a row each."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from longcat_sim.errors import MeasurementError, WorkloadError

MISSING = "expected a recorded engine run with this file; there is none; copy the whole folder of the run"
TIMES = ("queued_ts", "first_token_ts", "last_token_ts")


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        MeasurementError: there is no such file, or it holds something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MeasurementError(f"{path}: {MISSING}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, OSError) as fault:
        raise MeasurementError(f"{path}: expected JSON; got {fault}; mend the file") from None
    if not isinstance(document, dict):
        raise MeasurementError(f"{path}: expected a JSON object; got {type(document).__name__}; mend the file")
    return document


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def read_measured(path: Path) -> list[dict[str, Any]]:
    """Return the completed rows of ``requests.jsonl``; rows whose times are null (failed requests) are left out.

    Raises:
        WorkloadError: a row is not JSON, lacks a field or contradicts itself; all such rows are listed.
    """
    rows, faults, failed = [], [], 0
    if not path.is_file():
        raise MeasurementError(f"{path}: {MISSING}")
    with path.open(encoding="utf-8", errors="replace") as file:  # what is no text is no JSON, and told with its line
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                missing = [k for k in ("input_toks", "output_toks", "arrival_time") if not is_number(row.get(k))]
                if any(key in row and row[key] is None for key in TIMES) and is_number(row.get("input_toks")):
                    failed += 1
                    continue
                missing += [key for key in TIMES if not is_number(row.get(key))]
            except (json.JSONDecodeError, AttributeError) as fault:
                faults.append(
                    f"{path}:{number}: expected one JSON object per line; got {line.strip()[:40]!r} ({fault}); mend it"
                )
                continue
            if missing:
                faults.append(f"{path}:{number}: expected numbers in {', '.join(missing)}; got {line.strip()[:80]!r}")
            elif row["input_toks"] < 1 or row["output_toks"] < 1:
                faults.append(
                    f"{path}:{number}: expected input_toks and output_toks of 1 at least; got {line.strip()[:80]!r}"
                )
            elif not row["queued_ts"] <= row["first_token_ts"] <= row["last_token_ts"]:
                faults.append(
                    f"{path}:{number}: expected queued_ts <= first_token_ts <= last_token_ts, in seconds of one clock; "
                    f"got {', '.join(str(row[key]) for key in TIMES)}"
                )
            rows.append(row)
    if faults or not rows:
        raise WorkloadError(faults or [f"{path}: expected one completed request at least; got none"])
    if failed:
        warnings.warn(
            f"{path}: {failed} requests have no times (failed); they are neither simulated nor compared", stacklevel=2
        )
    return rows
