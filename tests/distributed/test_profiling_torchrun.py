"""Collectives between the ranks that torchrun starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from longcat_sim.records.measurement import load_measurements


@pytest.mark.slow
def test_collectives_are_measured_between_the_ranks_of_torchrun(tmp_path: Path) -> None:
    out = tmp_path / "m.jsonl"
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "longcat_sim", "profile"]
    options = ["--suite", "collectives", "--suite", "contention", "--device", "cpu", "--budget-s", "60"]
    done = subprocess.run(
        [sys.executable, *command, *options, "--out", str(out)], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = load_measurements(out)
    kinds = {row.op.kind for row in rows if row.suite == "collectives"}
    assert kinds == {"all_to_all", "all_gather", "reduce_scatter", "all_reduce"}
    assert {row.op.variant for row in rows if row.op.kind == "all_to_all"} == {"", "uneven"}
    assert any(row.alongside is not None and row.alongside.kind == "all_to_all" for row in rows)
    assert done.stderr.count(f"written to {out}") == 1
