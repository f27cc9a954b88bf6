"""``Measurement``: how long one op took on one machine; JSON Lines in and out, with the environment on the first line.

A file holds one device. Its first line is ``{"schema": 1, "environment": {...}}``, every other line one measurement.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)

from longcat_sim.errors import MeasurementError
from longcat_sim.ops.op import Op, op
from longcat_sim.records.files import write_text

SCHEMA = 1
MAX_CORRUPT_SHARE = 0.05
UNSTABLE_SPREAD = 0.25
"""A point whose (p90 - p10) / median stays above this is marked unstable."""

CHECKED = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
"""What is read from a file: nothing is taken for something else, and nothing is passed over."""
Blocks = Annotated[tuple[PositiveFloat, ...], Field(strict=False)]
"""JSON has lists only."""


def block_drift(block_s: Sequence[float]) -> float:
    """Return the median over pairs of blocks of the longer over the shorter, less 1; 0 for a single block."""
    pairs = [max(a, b) / min(a, b) - 1 for a, b in itertools.combinations(block_s, 2)]
    return statistics.median(pairs) if pairs else 0.0


def _check_times(row: Measurement | StepMeasurement) -> None:
    """Refuse times that cannot be.

    Raises:
        ValueError: NaN, infinite, zero or negative times, or p10 > median > p90.
    """
    for name in ("p10_s", "median_s", "p90_s"):
        value = getattr(row, name)
        if not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: expected a time above 0, such as 1.2e-5; got {value!r}; measure it again")
    if not row.p10_s <= row.median_s <= row.p90_s:
        raise ValueError(
            f"expected p10_s <= median_s <= p90_s; got {row.p10_s:g}, {row.median_s:g}, {row.p90_s:g}; "
            "measure the point again"
        )
    if row.count < 1:
        raise ValueError(f"count: expected 1 or more; got {row.count}; measure the point again")


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The machine that was measured, and with what."""

    __pydantic_config__ = CHECKED
    device: str
    """Name of the device, such as ``NVIDIA H100 80GB HBM3`` or the CPU's model name."""
    kind: str
    """``cpu`` or ``cuda``; ``table`` when the figures were read from a published table."""
    threads: PositiveInt = 1
    libraries: Mapping[str, str] = field(default_factory=dict)
    """Library -> version."""
    clock_mhz: PositiveFloat | None = None
    """SM or core clock while measuring, if it can be read."""
    pace_s: Blocks = ()
    """CPU: seconds of the probes (``profiling.pace``) at the pace of which the medians of ops alone are."""
    sensitivity: Mapping[str, Annotated[tuple[NonNegativeFloat, ...], Field(strict=False)]] = field(
        default_factory=dict
    )
    """CPU: sort of op -> by which power of each probe its times went."""
    commit: str = ""
    """Commit of this package, if it runs from a checkout."""
    date: str = ""
    source: str = ""
    """Where a table comes from; empty for our own measurements."""

    def at_pace_of(self, other: Environment) -> Environment:
        """Return this environment with the pace of another."""
        return replace(self, pace_s=other.pace_s, sensitivity=other.sensitivity)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The time of one op alone, or beside another op that runs at the same time."""

    op: Op
    median_s: float
    p10_s: float
    p90_s: float
    count: int
    """Timed repetitions."""
    suite: str = ""
    stable: bool = True
    """False when the spread stayed large after the point was measured again."""
    alongside: Op | None = None
    """The op that ran at the same time on another stream or lane; None: alone."""
    overlapped: float = 1.0
    """Share of the op's time during which ``alongside`` ran too."""
    block_s: tuple[float, ...] = ()
    """p10 of each block of repetitions: the machine's own drift between blocks."""
    source: str = ""
    """The table the figure comes from; empty for our own."""

    def __post_init__(self) -> None:
        """Refuse times that cannot be."""
        _check_times(self)

    @property
    def is_contention(self) -> bool:
        """Whether it is of ops side by side: one beside another, or alone in the same rounds (and with warm caches)."""
        return self.alongside is not None or self.suite.startswith("contention")

    @property
    def spread(self) -> float:
        """(p90 - p10) / median."""
        return (self.p90_s - self.p10_s) / self.median_s

    @property
    def drift(self) -> float:
        """Median difference between the p10 of two blocks: what the machine does from block to block."""
        return block_drift(self.block_s)


@dataclass(frozen=True, kw_only=True)
class StepMeasurement:
    """The time of one whole step of the executable model; never fitted, only compared with a prediction."""

    __pydantic_config__ = CHECKED
    model: str
    phase: Literal["decode", "prefill"]
    sequences: PositiveInt
    queries: PositiveInt
    """New tokens per sequence."""
    context: PositiveInt
    """Positions that the last of them sees."""
    median_s: float
    p10_s: float
    p90_s: float
    count: int
    block_s: Blocks = ()
    received: NonNegativeFloat = 0.0
    """Mean token copies that FFN experts of one layer got."""
    active: NonNegativeFloat = 0.0
    """Mean FFN experts of one layer that got any."""
    overlap: str = ""
    """Schedule of a step whose exchanges loop back on the device, without the output projection; "": none run."""
    exchange_s: NonNegativeFloat = 0.0
    """Time of one of its exchanges alone."""
    exchange_bytes: NonNegativeFloat = 0.0
    """Bytes of the rows that one exchange moves."""
    exchange_sms: NonNegativeInt = 0
    """SMs that copy them; 0: time passes, and no SM is busy."""
    pace_s: Blocks = ()
    """CPU: seconds of the probes at the pace to which the times are scaled, the mean one while the steps ran."""

    def __post_init__(self) -> None:
        """Refuse times that cannot be."""
        _check_times(self)

    @property
    def drift(self) -> float:
        """Median difference between the p10 of two blocks: what the machine does from block to block."""
        return block_drift(self.block_s)


ENVIRONMENT, STEP = TypeAdapter(Environment), TypeAdapter(StepMeasurement)
"""Readers of JSON text: to strict readers of Python a mapping is neither."""


@dataclass(frozen=True)
class Measurements(Sequence[Measurement]):
    """The measurements of one file, and the lines that could not be read."""

    environment: Environment
    rows: tuple[Measurement, ...]
    skipped: tuple[tuple[int, str], ...] = ()
    """(line number, reason) of each line that was left out."""
    steps: tuple[StepMeasurement, ...] = field(default=(), kw_only=True)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]


def skipped_lines(skipped: Sequence[tuple[int, str]]) -> str:
    """Return what to say of lines of a measurement file that could not be read."""
    if not skipped:
        return ""
    shown = "; ".join(f"line {number}: {reason}" for number, reason in skipped[:3])
    more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    what = (
        "1 line could not be read and was" if len(skipped) == 1 else f"{len(skipped)} lines could not be read and were"
    )
    return f"; {what} left out ({shown}{more})"


def _op_to_json(item: Op) -> dict[str, Any]:
    return {"kind": item.kind, "dtype": item.dtype, "variant": item.variant, "dims": item.dims}


def to_json(measurement: Measurement) -> dict[str, Any]:
    """Return one measurement as a JSON object, seconds in every key."""
    document = {
        **_op_to_json(measurement.op),
        "median_s": measurement.median_s,
        "p10_s": measurement.p10_s,
        "p90_s": measurement.p90_s,
        "count": measurement.count,
        "spread": round(measurement.spread, 5),
        "stable": measurement.stable,
        "suite": measurement.suite,
    }
    if measurement.alongside is not None:
        document["alongside"] = _op_to_json(measurement.alongside)
        document["overlapped"] = measurement.overlapped
    if measurement.block_s:
        document["block_s"] = list(measurement.block_s)
    if measurement.source:
        document["source"] = measurement.source
    return document


class _Op(BaseModel):
    """An op as it stands in the file."""

    model_config = CHECKED
    kind: str
    dtype: str
    variant: str = ""
    dims: dict[str, float]

    def op(self) -> Op:
        """Return the op.

        Raises:
            ValueError: no such kind or dtype, or other sizes than it has.
        """
        try:
            return op(self.kind, dtype=self.dtype, variant=self.variant, **self.dims)
        except TypeError:
            raise ValueError(f"dims: expected sizes only; got {', '.join(self.dims)}") from None


class _Row(_Op):
    """A measurement as it stands in the file."""

    median_s: float
    p10_s: float
    p90_s: float
    count: int
    spread: float = 0.0
    """For a person who reads the file; found again from the times."""
    stable: bool = True
    suite: str = ""
    alongside: _Op | None = None
    overlapped: Annotated[float, Field(gt=0, le=1)] = 1.0
    block_s: Blocks = ()
    source: str = ""


def from_json(document: Mapping[str, Any]) -> Measurement:
    """Return the measurement of a JSON object.

    Raises:
        ValueError: a key is missing or unknown, or a value cannot be.
    """
    row = _Row.model_validate(document)
    return Measurement(
        op=row.op(), median_s=row.median_s, p10_s=row.p10_s, p90_s=row.p90_s, count=row.count, suite=row.suite,
        stable=row.stable, alongside=None if row.alongside is None else row.alongside.op(), overlapped=row.overlapped,
        block_s=row.block_s, source=row.source,
    )  # fmt: skip


def save_measurements(
    path: str | Path,
    environment: Environment,
    measurements: Iterable[Measurement],
    steps: Iterable[StepMeasurement] = (),
) -> None:
    """Write a measurement file; an interruption leaves the earlier file as it was."""
    head = {"schema": SCHEMA, "environment": asdict(environment)}
    documents = (head, *map(to_json, measurements), *({"step": asdict(step)} for step in steps))
    lines = [json.dumps(document) for document in documents]
    write_text(Path(path), "\n".join(lines) + "\n")


def _said(error: ValueError) -> str:
    """Return what is wrong with a line, in a sentence."""
    if not isinstance(error, ValidationError):
        return str(error)
    faults = []
    for fault in error.errors(include_url=False, include_context=False):
        match fault["type"]:
            case "value_error":
                says = fault["msg"].removeprefix("Value error, ")
            case "extra_forbidden" | "unexpected_keyword_argument":
                says = "expected no such key; remove it"
            case "missing" | "missing_argument" | "missing_keyword_only_argument":
                says = "expected this key; it is missing"
            case _:
                says = f"{fault['msg'].replace('Input should be', 'expected')}; got {fault['input']!r}"
        faults.append(": ".join(filter(None, (".".join(map(str, fault["loc"])), says))))
    return "; ".join(faults)


def _environment(head: Any, name: str, line: int) -> Environment:
    if head.get("schema") != SCHEMA:
        raise MeasurementError(
            f"{name}:{line}: schema: expected {SCHEMA}; got {head.get('schema')!r}; "
            "measure again with this version's `profile`"
        )
    try:
        return ENVIRONMENT.validate_json(json.dumps(head["environment"]))
    except ValueError as error:
        raise MeasurementError(f"{name}:{line}: environment: {_said(error)}; measure again") from None


def load_measurements(path: str | Path) -> Measurements:
    """Return the measurements of a file. Lines that cannot be read are left out and listed in ``skipped``.

    Raises:
        MeasurementError: no such file, nothing in it, another schema version, several devices, or more than
            5 % of the lines cannot be read.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().decode("utf-8", errors="replace").splitlines()
    except OSError as error:
        raise MeasurementError(
            f"{path}: expected a measurement file; got {error.strerror}; write one with `profile --out {path.name}`"
        ) from None
    environment: Environment | None = None
    rows: list[Measurement] = []
    steps: list[StepMeasurement] = []
    skipped: list[tuple[int, str]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)
            if not isinstance(document, dict):
                raise ValueError(f"expected a JSON object; got {type(document).__name__}")
            if "environment" in document:
                found = _environment(document, path.name, number)
                if environment and (found.device, found.kind) != (environment.device, environment.kind):
                    raise MeasurementError(
                        f"{path.name}:{number}: expected one device per file, {environment.device!r}; "
                        f"got also {found.device!r}; split the file by device"
                    )
                environment = environment or found
            elif "step" in document:
                steps.append(STEP.validate_json(json.dumps(document["step"])))
            else:
                rows.append(from_json(document))
        except (json.JSONDecodeError, RecursionError) as error:
            skipped.append((number, f"not JSON: {error}"))
        except MeasurementError:
            raise
        except ValueError as error:
            skipped.append((number, _said(error)))
    total = len(rows) + len(steps) + len(skipped)
    if skipped and len(skipped) > MAX_CORRUPT_SHARE * total:
        shown = [f"{path.name}:{number}: {reason}" for number, reason in skipped[:10]]
        raise MeasurementError(
            [
                f"{path.name}: expected at most {MAX_CORRUPT_SHARE:.0%} unreadable lines; "
                f"got {len(skipped)} of {total}; measure again",
                *shown,
            ]
        )
    if environment is None:
        raise MeasurementError(
            f"{path.name}:1: environment: expected it on the first line; it is missing; measure again with `profile`"
        )
    if not rows and not steps:
        raise MeasurementError(f"{path.name}: expected measurements; got none; measure again with `profile`")
    return Measurements(environment, tuple(rows), tuple(skipped), steps=tuple(steps))
