import json
import math
from dataclasses import asdict

import pytest

from longcat_sim.errors import MeasurementError
from longcat_sim.ops import op
from longcat_sim.records.measurement import (
    Environment,
    Measurement,
    StepMeasurement,
    load_measurements,
    save_measurements,
    to_json,
)

HERE = Environment(device="a machine", kind="cpu", threads=1, libraries={"torch": "2.13.0"})

STEP = StepMeasurement(
    model="tiny", phase="decode", sequences=2, queries=1, context=9, median_s=1.0, p10_s=0.9, p90_s=1.1, count=3,
    block_s=(0.9, 1.08),
)  # fmt: skip


def point(m: int = 8, seconds: float = 1e-3) -> Measurement:
    return Measurement(
        op=op("gemm", dtype="fp32", m=m, n=16, k=32), median_s=seconds, p10_s=0.9 * seconds, p90_s=1.2 * seconds,
        count=10, suite="decode",
    )  # fmt: skip


def test_a_file_gives_back_what_was_saved(tmp_path) -> None:
    beside = Measurement(
        op=op("gemm", m=1, n=2, k=3), median_s=2.0, p10_s=1.0, p90_s=3.0, count=4, stable=False,
        alongside=op("all_to_all", message_bytes=4096, ranks=2), overlapped=0.5, block_s=(1.0, 1.1),
    )  # fmt: skip
    save_measurements(tmp_path / "m.jsonl", HERE, [point(), beside], [STEP])
    found = load_measurements(tmp_path / "m.jsonl")
    assert found.rows == (point(), beside)
    assert found.steps == (STEP,)
    assert found.environment == HERE
    assert found[0].spread == pytest.approx(0.3)
    assert STEP.drift == pytest.approx(0.2)


def test_a_few_corrupt_lines_are_skipped_with_their_numbers(tmp_path) -> None:
    path = tmp_path / "m.jsonl"
    save_measurements(path, HERE, [point(m) for m in range(1, 61)])
    lines = path.read_text().splitlines()
    lines[7] = lines[7][:30]  # truncated
    lines[9] = "[" * 100_000
    lines[20] = json.dumps({**to_json(point()), "median_s": -1.0})
    path.write_text("\n".join(lines))
    found = load_measurements(path)
    assert [number for number, _ in found.skipped] == [8, 10, 21]
    assert len(found) == 57
    assert "above 0" in found.skipped[2][1]


BESIDE = {"alongside": {"kind": "gemm", "dtype": "fp32", "dims": {"m": 1, "n": 2, "k": 3}}}
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"block_s": [0.0, 1.0]}, "block_s.0: expected greater than 0; got 0.0"),
        ({"block_s": [-1.0]}, "block_s.0: expected greater than 0"),
        ({"block_s": [NAN]}, "block_s.0: expected a finite number"),
        ({"block_s": ["1"]}, "block_s.0: expected a valid number; got '1'"),
        ({"block_s": 1.0}, "block_s: expected a valid tuple"),
        *(({**BESIDE, "overlapped": share}, "overlapped: expected") for share in (0, None, "x", -1, NAN, 1.5)),
        ({"alongside": "gemm"}, "alongside: expected"),
        ({"variant": 3}, "variant: expected a valid string; got 3"),
        *(({"suite": suite}, "suite: expected a valid string") for suite in (None, 4)),
        ({"source": ["a"]}, "source: expected a valid string"),
        ({"dims": {"m": INF, "n": 1, "k": 1}}, "dims.m: expected a finite number"),
        ({"dims": {"m": "8", "n": 1, "k": 1}}, "dims.m: expected a valid number"),
        ({"dims": {"m": 1, "kind": 1}}, "dims: expected sizes only"),
        ({"dims": {"m": 1}}, "takes the dims m, n, k"),
        ({"kind": "gemmm"}, "got 'gemmm'"),
        ({"kind": ["gemm"]}, "kind: expected a valid string"),
        ({"stable": "no"}, "stable: expected a valid boolean; got 'no'"),
        ({"count": 1.5}, "count: expected a valid integer; got 1.5"),
        ({"median_s": "1"}, "median_s: expected a valid number"),
        ({"p50_s": 1.0}, "p50_s: expected no such key"),
        *(({"step": {**asdict(STEP), "median_s": time}}, "median_s: expected") for time in (0, NAN, "x")),
        ({"step": {**asdict(STEP), "median_s": 9.0}}, "expected p10_s <= median_s <= p90_s; got 0.9, 9, 1.1"),
        ({"step": {**asdict(STEP), "phase": "zz"}}, "phase: expected 'decode' or 'prefill'; got 'zz'"),
        ({"step": {"model": "tiny"}}, "phase: expected this key; it is missing; sequences: expected this key"),
        ({"step": {**asdict(STEP), "queries": 0}}, "queries: expected greater than 0"),
        ({"step": {**asdict(STEP), "more": 0}}, "more: expected no such key"),
        ({"step": None}, "expected an object"),
    ],
)
def test_a_line_with_a_value_that_cannot_be_is_skipped(tmp_path, change: dict, says: str) -> None:
    path = tmp_path / "m.jsonl"
    save_measurements(path, HERE, [point(m) for m in range(1, 40)])
    path.write_text(path.read_text() + json.dumps({**to_json(point()), **change}) + "\n")
    found = load_measurements(path)
    assert len(found) == 39
    [(number, reason)] = found.skipped
    assert number == 41
    assert says in reason
    assert "\n" not in reason


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"device": None}, "device: expected a valid string; got None"),
        ({"libraries": None}, "libraries: expected"),
        ({"libraries": "x"}, "libraries: expected"),
        ({"threads": 0}, "threads: expected greater than 0"),
        ({"clock_mhz": "1"}, "clock_mhz: expected a valid number"),
        ({"colour": "red"}, "colour: expected no such key"),
    ],
)
def test_an_environment_that_cannot_be_is_refused(tmp_path, change: dict, says: str) -> None:
    path = tmp_path / "m.jsonl"
    save_measurements(path, HERE, [point()])
    head, row = path.read_text().splitlines()
    document = json.loads(head)
    path.write_text(json.dumps({**document, "environment": {**document["environment"], **change}}) + "\n" + row)
    with pytest.raises(MeasurementError, match=rf"m\.jsonl:1: environment: {says}"):
        load_measurements(path)


def test_more_than_a_twentieth_of_corrupt_lines_is_refused(tmp_path) -> None:
    path = tmp_path / "m.jsonl"
    save_measurements(path, HERE, [point(m) for m in range(1, 21)])
    path.write_text(path.read_text() + "{broken\n{broken too\n")
    with pytest.raises(MeasurementError, match=r"at most 5% unreadable lines; got 2 of 22"):
        load_measurements(path)


def test_two_devices_in_one_file_are_refused(tmp_path) -> None:
    save_measurements(tmp_path / "a", HERE, [point()])
    save_measurements(tmp_path / "b", Environment(device="another", kind="cpu"), [point()])
    (tmp_path / "m").write_text((tmp_path / "a").read_text() + (tmp_path / "b").read_text())
    with pytest.raises(MeasurementError, match="'a machine'; got also 'another'"):
        load_measurements(tmp_path / "m")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema": 99, "environment": {"device": "x", "kind": "cpu"}}\n', "schema: expected 1; got 99"),
        ("", "environment: expected it on the first line"),
        ('{"schema": 1, "environment": {"device": "x", "kind": "cpu"}}\n', "expected measurements; got none"),
    ],
)
def test_other_files_are_refused(tmp_path, text: str, message: str) -> None:
    (tmp_path / "m").write_text(text)
    with pytest.raises(MeasurementError, match=message):
        load_measurements(tmp_path / "m")


@pytest.mark.parametrize("seconds", [math.nan, math.inf, 0.0, -1e-6])
def test_times_that_cannot_be_are_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match="expected a time above 0"):
        Measurement(op=op("gemm", m=1, n=1, k=1), median_s=seconds, p10_s=seconds, p90_s=seconds, count=1)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "m.jsonl"
    save_measurements(path, HERE, [point()])
    before = path.read_bytes()

    def explode(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", explode)
    with pytest.raises(KeyboardInterrupt):
        save_measurements(path, HERE, [point(), point(9)])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["m.jsonl"]
