"""Sweeps: order, faults recorded, resumed after a kill, on every executor; Dask as a cluster of processes."""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from longcat_sim.capacity.sweep import dask_executor, sweep
from longcat_sim.errors import CapacityError, SpecError
from longcat_sim.specs.scenario import Scenario, scenario

CALLS: list[str] = []


def area(of: Scenario) -> dict[str, float]:
    CALLS.append(of.digest())
    if of.step.sequences_per_gpu == 13:  # type: ignore[union-attr]
        raise SpecError("13: unlucky")
    return {"area": of.step.sequences_per_gpu * of.step.context_tokens}  # type: ignore[union-attr]


def scenarios(count: int) -> list[Scenario]:
    base = scenario(
        {
            "model": "longcat-flash", "hardware": "h800-sxm", "deployment": {"num_gpus": 16, "ep_size": 16},
            "step": {"phase": "decode", "sequences_per_gpu": 8, "context_tokens": 100},
        }
    )  # fmt: skip
    return [base.what_if({"step.sequences_per_gpu": n}) for n in range(1, count + 1)]


def test_results_come_in_order_and_faults_are_recorded() -> None:
    points = sweep(scenarios(14), area)
    assert [p.figures["area"] if p.figures else p.faults for p in points] == [
        *(100 * n for n in range(1, 13)), ("13: unlucky",), 1400,
    ]  # fmt: skip


def test_a_killed_sweep_resumes_and_repeats_nothing(tmp_path: Path) -> None:
    store = tmp_path / "sweep.jsonl"
    sweep(scenarios(5), area, store=store)
    whole = store.read_text()
    store.write_text(whole[: whole.rindex('{"digest"') + 20])  # killed while it wrote the fifth line
    CALLS.clear()
    points = sweep(scenarios(8), area, store=store)
    assert len(CALLS) == 4  # the cut one and three new ones
    assert [p.figures["area"] for p in points if p.figures] == [100 * n for n in range(1, 9)]
    CALLS.clear()
    sweep(scenarios(8), area, store=store)
    assert not CALLS
    assert len(store.read_text().splitlines()) == 9


def test_a_fault_is_remembered_too(tmp_path: Path) -> None:
    store = tmp_path / "sweep.jsonl"
    sweep(scenarios(14)[12:], area, store=store)
    CALLS.clear()
    assert sweep(scenarios(14)[12:], area, store=store)[0].faults == ("13: unlucky",)
    assert not CALLS


def test_a_sweep_file_of_another_version_is_refused(tmp_path: Path) -> None:
    store = tmp_path / "sweep.jsonl"
    store.write_text(json.dumps({"longcat_sim_sweep": 99, "evaluate": "x"}) + "\n")
    with pytest.raises(CapacityError, match=r"expected version 3; got 99; .*another version"):
        sweep(scenarios(2), area, store=store)
    store.write_text(json.dumps({"longcat_sim_sweep": 3, "evaluate": "other.figure"}) + "\n")
    with pytest.raises(CapacityError, match=r"got those of other\.figure"):
        sweep(scenarios(2), area, store=store)
    for other in (b"hello\n", bytes(range(128, 256))):
        store.write_bytes(other)
        with pytest.raises(CapacityError, match="expected the head of a sweep file"):
            sweep(scenarios(2), area, store=store)


def test_equal_scenarios_are_evaluated_once() -> None:
    CALLS.clear()
    points = sweep([*scenarios(2), *scenarios(2)], area)
    assert len(CALLS) == 2
    assert points[0] == points[2]


def test_progress_counts_up_and_time_left_ends_at_zero() -> None:
    seen: list[tuple[int, int, float]] = []
    sweep(scenarios(6), area, progress=lambda *p: seen.append(p), chunk=2)
    assert [(d, t) for d, t, _ in seen] == [(2, 6), (4, 6), (6, 6)]
    assert seen[-1][2] == 0


@pytest.mark.slow
def test_a_process_pool_gives_the_same() -> None:
    with ProcessPoolExecutor(2) as executor:
        assert sweep(scenarios(14), area, executor, chunk=3) == sweep(scenarios(14), area)


@pytest.mark.slow
def test_a_dask_cluster_of_processes_gives_the_same(tmp_path: Path) -> None:
    distributed = pytest.importorskip("dask.distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        dask_executor(cluster.scheduler_address) as executor,
    ):
        points = sweep(scenarios(14), area, executor, store=tmp_path / "s.jsonl", chunk=2)
    assert points == sweep(scenarios(14), area)
    assert len((tmp_path / "s.jsonl").read_text().splitlines()) == 15


def test_a_scheduler_that_does_not_answer_is_a_clear_fault() -> None:
    pytest.importorskip("dask.distributed")
    with (
        pytest.raises(CapacityError, match=r"got .tcp://127\.0\.0\.1:1., which did not answer"),
        dask_executor("tcp://127.0.0.1:1", timeout_s=0.5),
    ):
        pass
