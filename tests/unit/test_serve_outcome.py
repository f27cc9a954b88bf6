"""What a serving run tells a person: lines of the table, shares within the level, notes."""

from __future__ import annotations

from typing import Any

import pytest

from longcat_sim.errors import SpecError
from longcat_sim.specs.scenario import Scenario, scenario
from longcat_sim.studies.simulate import simulate


def traffic(count: int = 200, rate: str = "10 /s", **changes: Any) -> Scenario:
    workload = {"arrivals": {"rate": rate}, "input_tokens": 1000, "output_tokens": 20, "num_requests": count}
    settings = {name.replace("__", "."): value for name, value in changes.items()}
    return scenario("qwen3-32b-h200-serve").what_if({"draws": 1, "serve.workload": workload, **settings})


def test_what_is_wrong_with_a_fault_is_said_with_an_example() -> None:
    for faults, words in (
        ("x", [r"serve.faults: expected a list, such as [{kind: slow_rank, at: 60 s, ", "; got 'x'"]),
        ([{"at": "1 s", "down": "2 s"}], ["add it, such as kind: slow_rank", "got 'down'"]),
        ([{"kind": "slow_rank"}], ["add it, such as at: 60 s"]),
    ):
        with pytest.raises(SpecError) as error:
            traffic(serve__faults=faults)
        for each in words:
            assert each in str(error.value)


def test_a_fault_after_the_end_leaves_a_note() -> None:
    late = [{"kind": "slow_rank", "at": "1 s"}, {"kind": "slow_rank", "at": "1 h"}]
    notes = [note for note in simulate(traffic(serve__faults=late)).notes if "serve.faults" in note]
    assert len(notes) == 1
    assert "serve.faults[1]: at = 3600 s lies beyond the end of the run" in notes[0]


def test_the_table_counts_what_was_retried_and_failed() -> None:
    rows = {name: value for name, value, _ in simulate(traffic()).rows()}
    assert not any("retried" in name or "failed" in name for name in rows)
    lost = [{"kind": "replica_loss", "at": "5 s", "duration": "1 s", "replica": r} for r in range(8)]
    for kept, name in (("retry", "requests retried"), ("fail", "requests failed")):
        faults = [{**fault, "in_flight": kept} for fault in lost]
        rows = {name: value for name, value, _ in simulate(traffic(serve__faults=faults)).rows()}
        assert int(rows[name]) > 0


def test_an_overload_is_not_told_to_run_longer() -> None:
    short = traffic(400, "400 /s", serve__scheduler__max_num_seqs=4)
    calm = simulate(traffic(40, "20 /s"))
    assert not calm["unstable"]
    assert any("no steady state" in note for note in calm.notes)
    found = simulate(short)
    assert found["unstable"]
    assert not any("steady state" in note for note in found.notes)
    assert f"about {found['sustainable_requests_per_s']:.3g} requests/s can be kept up" in str(found)
    assert "says nothing of the SLO" in str(found)
