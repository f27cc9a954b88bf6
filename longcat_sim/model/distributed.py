"""``run_ranks``: the expert-parallel model on several ranks of this machine, its schedules interleaved and timed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longcat_sim.errors import ModelError
from longcat_sim.model.expert_parallel import expert_range
from longcat_sim.ops.schedules import schedule
from longcat_sim.records.span import Span
from longcat_sim.specs.model import ModelSpec

ALONE = ("compute", "communication")


@dataclass(frozen=True)
class RanksResult:
    """What ``run_ranks`` measured. Times are of one machine's monotonic clock, from the last rank's start."""

    seconds: Mapping[str, npt.NDArray[np.float64]]
    """By mode (schedule, ``compute``, ``communication``): step seconds of each repeat, first start to last end."""
    rank_seconds: Mapping[str, npt.NDArray[np.float64]]
    """By mode: [ranks, repeats]."""
    spans: Mapping[str, list[list[Span]]]
    """By mode, one list per repeat: the spans of all ranks, from 0 at the first rank's start."""
    moved_bytes: list[dict[str, list[int]]]
    """Per rank: ``dispatch`` and ``combine`` bytes of each layer, rows that stay on the rank included."""
    off_rank_bytes: list[dict[str, list[int]]]
    """The same without the rows that stay."""
    logits: list[npt.NDArray[np.float32]]
    """Per rank, if ``outputs``: logits of its tokens [T, vocab]."""
    tokens: list[npt.NDArray[np.int64]]


def run_ranks(
    spec: ModelSpec,
    schedules: Sequence[str] = ("none", "sbo"),
    *,
    batch: int,
    queries: int = 1,
    context_tokens: int = 0,
    repeats: int = 20,
    warmup: int = 2,
    num_ranks: int = 2,
    alone: bool = True,
    link: Mapping[str, float] | None = None,
    dtype: str = "float32",
    seed: int = 0,
    spans: bool = True,
    outputs: bool = False,
    timeout_s: float = 60.0,
) -> RanksResult:
    """Run ``repeats`` steps of every schedule, one after the other inside each repeat, one thread per rank.

    Each rank runs ``batch`` sequences of ``queries`` new tokens: without ``context_tokens`` a prefill without cache,
    with them a decode from a cache of that length. ``alone`` adds the compute and the communication on their own.
    ``link`` ({"latency_s", "bytes_per_s"}) paces the exchanges. The embedding and the final norm are inside the step,
    the output projection is not.

    Raises:
        ScheduleError, ModelError: an unknown schedule, ranks that do not divide the experts, or ranks that fail or
            die; the message says which.
    """
    for name in schedules:
        schedule(name, spec.layer_kind).check()
    expert_range(spec.n_routed_experts, 0, num_ranks)
    modes = [*(ALONE if alone else ()), *schedules]
    job: dict[str, Any] = {
        "spec": spec.model_dump(), "modes": modes, "batch": batch, "queries": queries,
        "context_tokens": context_tokens, "repeats": repeats, "warmup": warmup, "num_ranks": num_ranks,
        "link": dict(link) if link else None, "dtype": dtype, "seed": seed, "spans": spans, "outputs": outputs,
        "timeout_s": timeout_s,
    }  # fmt: skip
    for name, value in (("batch", batch), ("queries", queries), ("repeats", repeats)):
        if value < 1:
            raise ModelError(f"run_ranks: {name}: expected at least 1; got {value}")
    with tempfile.TemporaryDirectory() as folder:
        results = _run(job, Path(folder), timeout_s)
        logits = [np.load(Path(folder) / f"logits{rank}.npy") for rank in range(num_ranks)] if outputs else []
        tokens = [np.load(Path(folder) / f"tokens{rank}.npy") for rank in range(num_ranks)] if outputs else []
    start = {mode: np.array([result["start_s"][mode] for result in results]) for mode in modes}
    end = {mode: np.array([result["end_s"][mode] for result in results]) for mode in modes}
    return RanksResult(
        {mode: end[mode].max(0) - start[mode].min(0) for mode in modes},
        {mode: end[mode] - start[mode] for mode in modes},
        {mode: [_spans(results, mode, i, float(start[mode][:, i].min())) for i in range(repeats)] for mode in modes},
        [result["moved_bytes"] for result in results],
        [result["off_rank_bytes"] for result in results],
        logits,
        tokens,
    )


def _spans(results: list[dict], mode: str, repeat: int, zero_s: float) -> list[Span]:
    found = []
    for result in results:
        for name, lane, start_s, end_s, rank, layer, *_ in result["spans"][mode][repeat]:
            found.append(Span(name, lane, start_s - zero_s, end_s - zero_s, rank, layer))
    return found


def _run(job: dict[str, Any], folder: Path, timeout_s: float) -> list[dict]:
    """Start the ranks and return their results.

    Raises:
        ModelError: a rank failed or died, or the time ran out.
    """
    import torch.distributed as dist

    # The store lives here, so that no rank's death takes it along.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    path = folder / "job.json"
    path.write_text(json.dumps({**job, "port": store.port}))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "longcat_sim.model.rank_worker", str(path)]
    errors = [(folder / f"stderr{rank}").open("w+") for rank in range(job["num_ranks"])]
    ranks = [
        subprocess.Popen([*command, str(rank)], env=environment, stdout=error, stderr=error)
        for rank, error in enumerate(errors)
    ]
    try:
        _await(ranks, errors, timeout_s)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                rank.kill()
            rank.wait()
        for error in errors:
            error.close()
    return [json.loads((folder / f"result{rank}.json").read_text()) for rank in range(job["num_ranks"])]


def _await(ranks: list[subprocess.Popen], errors: list, timeout_s: float) -> None:
    """Wait until all ranks are done, or the first has failed and the others have had time to notice."""
    failed_s = None
    while any(rank.poll() is None for rank in ranks):
        failed = any(rank.returncode not in (None, 0) for rank in ranks)
        if failed and failed_s is None:
            failed_s = time.monotonic()
        if failed_s is not None and time.monotonic() - failed_s > timeout_s:
            break
        time.sleep(0.02)
    faults = []
    for i, (rank, error) in enumerate(zip(ranks, errors, strict=True)):
        if rank.returncode != 0:
            error.seek(0)
            lines = [line for line in error.read().splitlines() if line.strip()]
            state = "still waiting" if rank.returncode is None else f"exit code {rank.returncode}"
            faults.append(f"run_ranks: rank {i}: expected to finish; {state}: {lines[-1] if lines else 'no message'}")
    if faults:
        raise ModelError(faults)
