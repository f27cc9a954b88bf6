"""Traces and synthetic traffic: formats, faults by line, lengths, processes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longcat_sim.errors import WorkloadError
from longcat_sim.simulation.serving.cluster import Engine
from longcat_sim.simulation.serving.simulate import simulate_serving
from longcat_sim.simulation.serving.step_times import LinearStepTimes
from longcat_sim.simulation.serving.synthetic import Synthetic
from longcat_sim.simulation.serving.workload import TraceReader
from longcat_sim.specs.serve import Serve

AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 23:59:59.9000000,374,44
2023-11-17 00:00:00.4000001,396,109
"""


def reader(path: Path, form: str, **workload: Any) -> TraceReader:
    return TraceReader(Serve.model_validate({"workload": {"trace": str(path), "format": form, **workload}}))


def test_azure_times_run_on_past_midnight(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(AZURE)
    rows = list(reader(tmp_path / "a.csv", "azure"))
    assert [(r.input, r.output) for r in rows] == [(374, 44), (396, 109)]
    assert rows[1].arrival - rows[0].arrival == pytest.approx(500_000_100, abs=100)


def test_mooncake_keeps_whole_blocks_only(tmp_path: Path) -> None:
    row = {"timestamp": 1500, "input_length": 1100, "output_length": 5, "hash_ids": [7, 8, 9]}
    (tmp_path / "m.jsonl").write_text(json.dumps(row) + "\n")
    (request,) = reader(tmp_path / "m.jsonl", "mooncake", time_scale=2.0)
    assert request.chain == [([7, 8], 32)]
    assert request.arrival == 750_000_000


def test_own_format_names_class_and_priority(tmp_path: Path) -> None:
    row = {"arrival_s": 0.25, "input_tokens": 5, "output_tokens": 6, "slo_class": "fast"}
    (tmp_path / "o.jsonl").write_text(json.dumps(row) + "\n")
    spec = {"workload": {"trace": str(tmp_path / "o.jsonl"), "format": "jsonl"},
            "slo": [{"name": "slow"}, {"name": "fast", "priority": -1}]}  # fmt: skip
    (request,) = TraceReader(Serve.model_validate(spec))
    assert (request.slo_class, request.priority, request.arrival) == (1, -1, 250_000_000)


BAD = [
    ('{"timestamp": 0, "input_length": 5, "output_length": 1}', ""),
    ('{"timestamp": 0, "input_length": 5', "expected a row like"),
    ('{"timestamp": 0, "input_length": -5, "output_length": 1}', "1 token at least"),
    ('{"timestamp": 0, "input_length": 5.5, "output_length": 1}', "whole numbers"),
    ('{"timestamp": 0, "output_length": 1}', "KeyError"),
    ('{"timestamp": 9, "input_length": 5, "output_length": 1}', ""),
    ('{"timestamp": 8, "input_length": 5, "output_length": 1}', "arrivals in order"),
    ('{"timestamp": 10, "input_length": 90, "output_length": 11}', "90 + 11 = 101 > 100"),
    ('{"timestamp": -1, "input_length": 5, "output_length": 1}', "arrival time of 0 s or later"),
]
BAD += [(f'{{"timestamp": {at}, "input_length": 5, "output_length": 1}}', "") for at in range(20, 28)]


def test_a_trace_of_mostly_faulty_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "2023-11-16 18:15:46.68,374,44\n" * 3)
    with pytest.raises(WorkloadError, match=r"got 4 faulty and 0 good; .*serve.workload.format=azure"):
        list(reader(path, "mooncake"))
    path.write_text('{"arrival_s": 0.5, "input_tokens": 900, "output_tokens": 120}\n' * 9)
    for given in ("mooncake", "azure"):
        with pytest.raises(WorkloadError, match=r"try --set serve.workload.format=jsonl") as caught:
            list(reader(path, given))
        assert len(caught.value.faults) <= 4  # rows of another format are all alike
    path.write_bytes(bytes(range(128, 256)) * 40 + b"\n")
    with pytest.raises(WorkloadError, match="got 1 faulty and 0 good"):
        list(reader(path, "mooncake"))


def test_faulty_rows_are_counted_listed_by_line_and_skipped(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(line + "\n" for line, _ in BAD))
    trace = reader(path, "mooncake", max_context_tokens=100)
    assert len(list(trace)) == 10
    assert trace.faults.count == 7
    wanted = [(number, reason) for number, (_, reason) in enumerate(BAD, start=1) if reason]
    for (line, reason), listed in zip(wanted, trace.faults.listed, strict=True):
        assert listed.startswith(f"{path}:{line}: ")
        assert reason in listed


def test_too_many_faulty_rows_refuse_the_trace(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("".join(line + "\n" for line, _ in BAD))
    with pytest.raises(WorkloadError, match=r"at most 2 faulty rows \(max_bad_rows\); got 3 by line 4"):
        list(reader(path, "mooncake", max_bad_rows=2))
    spec = Serve.model_validate(
        {"workload": {"trace": str(path), "format": "mooncake", "max_context_tokens": 100}, "replicas": 1}
    )
    result = simulate_serving(spec, Engine(LinearStepTimes(fixed_ns=1000), 1000))
    assert result.metrics()["skipped_rows"] == 7
    assert len(result.skipped) == 7


@pytest.mark.parametrize(
    ("text", "form", "message"),
    [
        ("a,b\n1,2\n", "azure", "expected the columns TIMESTAMP,ContextTokens,GeneratedTokens"),
        ("", "mooncake", "expected one request at least"),
    ],
)
def test_wrong_format_is_named(tmp_path: Path, text: str, form: str, message: str) -> None:
    (tmp_path / "x").write_text(text)
    with pytest.raises(WorkloadError, match=message):
        list(reader(tmp_path / "x", form))


def test_missing_trace_and_block_size_that_does_not_divide(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="is not a file"):
        reader(tmp_path / "none", "azure")
    (tmp_path / "m").write_text("{}")
    spec = {"workload": {"trace": str(tmp_path / "m")}, "scheduler": {"block_tokens": 24}}
    with pytest.raises(WorkloadError, match="512 % 24 = 8"):
        TraceReader(Serve.model_validate(spec))


def synthetic(arrivals: dict[str, Any], seed: int = 0, **workload: Any) -> list[Any]:
    spec = {
        "workload": {"arrivals": arrivals, "input_tokens": 10, "output_tokens": 10, "num_requests": 20_000} | workload
    }
    return list(Synthetic(Serve.model_validate(spec), seed))


@pytest.mark.parametrize(
    ("arrivals", "cv"),
    [({"process": "poisson"}, 1.0), ({"process": "gamma", "cv": 3.0}, 3.0), ({"process": "constant"}, 0.0)],
)
def test_arrival_processes_have_their_rate_and_variation(arrivals: dict[str, Any], cv: float) -> None:
    times = np.array([r.arrival for r in synthetic({**arrivals, "rate": "50 /s"})]) * 1e-9
    gaps = np.diff(times)
    assert gaps.mean() == pytest.approx(0.02, rel=0.07)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05, abs=1e-6)


def test_diurnal_rate_follows_its_sine() -> None:
    arrivals = {"process": "diurnal", "rate": "100 /s", "amplitude": 0.8, "period": "100 s"}
    times = np.array([r.arrival for r in synthetic(arrivals)]) * 1e-9
    phase = times[times < 100 * (times.max() // 100)] % 100
    up, down = np.count_nonzero(phase < 50), np.count_nonzero(phase >= 50)
    assert (up - down) / (up + down) == pytest.approx(2 * 0.8 / np.pi, abs=0.03)


@pytest.mark.parametrize(
    ("lengths", "mean", "cv"),
    [
        ({"distribution": "exponential", "mean": 211}, 211, 1.0),
        ({"distribution": "lognormal", "mean": 300, "cv": 0.7}, 300, 0.7),
        ({"distribution": "gamma", "mean": 50, "cv": 0.5}, 50, 0.5),
        ({"distribution": "uniform", "min": 30, "max": 100}, 65, 20.5 / 65),
        ({"distribution": "empirical", "values": [1, 3]}, 2, 0.5),
        (77, 77, 0.0),
    ],
)
def test_lengths_have_their_mean_and_variation(lengths: Any, mean: float, cv: float) -> None:
    drawn = np.array([r.output for r in synthetic({"rate": "1 /s"}, output_tokens=lengths)])
    assert drawn.mean() == pytest.approx(mean, rel=0.03)
    assert drawn.std() / mean == pytest.approx(cv, rel=0.06, abs=1e-9)


def test_lengths_fitted_from_a_trace_are_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(AZURE)
    fit = {"distribution": "empirical", "fit": str(tmp_path / "a.csv"), "format": "azure"}
    rows = synthetic({"rate": "1 /s"}, input_tokens=fit, output_tokens=fit, num_requests=100)
    assert {r.input for r in rows} == {374, 396}
    assert {r.output for r in rows} == {44, 109}


def test_classes_come_in_their_shares_whatever_the_order() -> None:
    spec = {
        "workload": {"arrivals": {"rate": "1 /s"}, "input_tokens": 1, "output_tokens": 1, "num_requests": 9000},
        "slo": [{"name": "a", "share": 2.0}, {"name": "b", "share": 1.0, "priority": 5}],
    }
    rows = list(Synthetic(Serve.model_validate(spec), 4))
    assert np.mean([r.slo_class for r in rows]) == pytest.approx(1 / 3, abs=0.02)
    assert {(r.slo_class, r.priority) for r in rows} == {(0, 0), (1, 5)}
    again = list(Synthetic(Serve.model_validate({**spec, "replicas": 3}), 4))
    assert [r.slo_class for r in rows] == [r.slo_class for r in again]
