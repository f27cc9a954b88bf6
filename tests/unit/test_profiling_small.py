import ctypes
import resource

import pytest
import torch

from longcat_sim.errors import MeasurementError
from longcat_sim.profiling import profile
from longcat_sim.profiling.kernels import BUILDERS, spread_rows
from longcat_sim.profiling.place import Place
from longcat_sim.profiling.samples import Samples
from longcat_sim.profiling.suites import SUITES, Grid, step_ops, suite_ops
from longcat_sim.profiling.timing import steady
from longcat_sim.records.measurement import load_measurements
from longcat_sim.specs.model import model_spec

TINY = model_spec("longcat-tiny")
GRID = Grid(decode=((1, 32), (4, 64), (8, 32)), prefill=((1, 16), (2, 32)))


def test_the_suites_cover_every_op_of_a_step() -> None:
    measured = {item for suite in SUITES for item in suite_ops(suite, TINY, GRID, "fp32")}
    for phase, batch, size in (("decode", 4, 64), ("prefill", 2, 32)):
        queries = 1 if phase == "decode" else size
        missing = [item for item in step_ops(TINY, phase, batch, queries, size, "fp32") if item not in measured]
        assert not missing, f"{phase}: not measured: {missing[:3]}"


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library")
def test_a_steady_cpu_keeps_the_memory_it_frees() -> None:
    """A page is touched afresh each time that the C library maps a large tensor; a kept one is not."""

    def faults(mib: int = 64) -> int:
        """Return the least faults of an array of so many MiB: 256 pages each, until the heap has found a place."""
        found = []
        for _ in range(8):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.ones(mib << 18)
            found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        return min(found)

    with steady(torch.device("cpu")):
        with steady(torch.device("cpu")):
            assert faults() < 100
        assert faults() < 100
    assert faults(4) < 100  # as in any process that has freed larger ones


@pytest.mark.parametrize("kind", sorted(set(BUILDERS) - {"dispatch"}))  # that one needs a GPU (tests/gpu)
def test_every_kind_runs_at_its_smallest_size(kind: str) -> None:
    dtype = "bf16" if kind == "permute" else "fp32"  # on a CPU in fp32 it rides with the experts' products
    item = next(i for suite in SUITES for i in suite_ops(suite, TINY, GRID, dtype) if i.kind == kind)
    with torch.inference_mode():
        timed = BUILDERS[kind](item, TINY, Place(torch.device("cpu"), torch.float32))
        timed.run()
        for part in timed.less:
            part()
    assert timed.divide == (2 if kind == "permute" else 1)  # a permute is timed there and back


def test_rows_are_spread_over_all_groups() -> None:
    counts = spread_rows(100, 16)
    assert sum(counts) == 100
    assert min(counts) >= 1
    assert spread_rows(100, 16) == counts


def test_parts_are_taken_off_round_by_round() -> None:
    left = Samples([[3.0, 4.0], [5.0]]).minus(Samples([[1.0, 1.0, 2.0], [9.0]]))
    assert left.rounds == [[2.0, 3.0], [0.5]]  # a tenth at least


def test_a_profile_is_written_resumed_and_boxed(tmp_path) -> None:
    out = tmp_path / "m.jsonl"
    first = profile(["small-ops"], "cpu", TINY, budget_s=1.5, grid=GRID, out=out)
    assert first.environment.threads == 1
    assert len(load_measurements(out)) == len(first)
    again = profile(["small-ops"], "cpu", TINY, budget_s=5.0, grid=GRID, out=out, resume=out)
    kept = {row.op: row for row in first}
    assert all(row == kept[row.op] for row in again if row.op in kept)
    assert len(again) >= len(first)
    boxed = profile(["decode"], "cpu", TINY, budget_s=0.0, grid=GRID)
    assert len(boxed) == 1
    assert "the time box dropped" in boxed.summary()


def test_unknown_suites_and_devices_are_refused() -> None:
    with pytest.raises(MeasurementError, match="suite: expected some of decode"):
        profile(["decoder"], "cpu", TINY)
    with pytest.raises(MeasurementError, match="device: expected auto, cpu or cuda; got 'tpu'"):
        profile(["decode"], "tpu", TINY)


@pytest.mark.slow
def test_a_campaign_runs_every_suite_on_a_cpu(tmp_path) -> None:
    from longcat_sim.profiling.campaign import run_campaign

    plan = (
        ("decode", "longcat-tiny", 0.3), ("experts", "longcat-tiny", 0.2), ("small-ops", "longcat-tiny", 0.2),
        ("model-step", "longcat-tiny", 0.2), ("contention", "longcat-tiny", 0.1),
    )  # fmt: skip
    out = tmp_path / "campaign.jsonl"
    found = run_campaign(out, device="cpu", budget_s=25.0, plan=plan)
    saved = load_measurements(out)
    assert {row.op.kind for row in saved} >= {"gemm", "mla_decode", "grouped_gemm", "norm", "router"}
    assert len(saved) == len(found)
    assert len(saved.steps) == 5
    # ranks take seconds to start; a busy machine may leave them no time, and then it says so
    assert any(row.alongside is not None for row in saved) or "not run: contention" in found.summary()
