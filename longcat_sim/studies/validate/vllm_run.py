"""Predict a recorded vLLM run from the card's layer profile, and set it beside what was measured.

The folder holds ``requests.jsonl`` (token counts and times of each request), ``meta.json`` (engine settings),
``config.json`` (the deployment: parallelism, memory, links; or the model's published config) and ``profile/``;
``hardware.yaml`` beside them gives measured collectives, ``timeseries.csv`` the tokens found in the prefix cache. The
prediction uses arrival times and token counts, and no measured time of any request. The engine is the serving
simulator's own, with the times of ``calibration.engine_times``.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longcat_sim.calibration.engine_times import EngineTimes
from longcat_sim.calibration.layer_profile import LayerProfile
from longcat_sim.errors import MeasurementError
from longcat_sim.simulation.serving.cluster import Engine
from longcat_sim.simulation.serving.published_loads import BalancerRules
from longcat_sim.simulation.serving.request import COMPLETED, Request
from longcat_sim.simulation.serving.simulate import ServingResult, simulate_serving
from longcat_sim.specs.model import ModelSpec
from longcat_sim.specs.serve import Serve
from longcat_sim.studies.validate.vllm_folder import RunFolder, read_measured

FloatArray = npt.NDArray[np.float64]
STATISTICS = ("mean", "p50", "p90", "p99")


def _times(folder: RunFolder, model: ModelSpec) -> EngineTimes:
    """Return the step times of the engine.

    Raises:
        MeasurementError: the profile lacks what the run needs.
    """
    tp, dp = (folder.count("parallel_config", f"{kind}_parallel_size", 1) for kind in ("tensor", "data"))
    if folder.count("parallel_config", "pipeline_parallel_size", 1) > 1:
        raise MeasurementError(
            f"{folder.path / 'meta.json'}: pipeline_parallel_size: expected 1; pipelined engines are not covered"
        )
    profile = LayerProfile.read(folder.path / "profile", tp, dp)
    if model.num_moe_layers and not profile.moe and not profile.components:
        raise MeasurementError(
            f"{folder.path / 'profile'}: expected tp{tp}/moe.csv, the times of the experts of {model.name}; there is "
            "none; profile the experts on the card"
        )
    if not profile.skew.shares:
        warnings.warn(
            f"{folder.path / 'profile'}: no skew.csv for tensor parallelism {tp}: decode batches are taken at their "
            "mean context",
            stacklevel=2,
        )
    return EngineTimes(
        profile,
        model,
        folder.max_num_seqs,
        tp_size=tp,
        dp_size=dp,
        is_expert_parallel=bool(folder.setting("parallel_config", "enable_expert_parallel")),
        link=folder.link() if tp * dp > 1 else None,
        is_eager=folder.is_eager,
        has_one_shot=folder.has_own_all_reduce,
        captured=folder.setting("compilation_config", "cudagraph_capture_sizes"),
    )


def predict(directory: Path) -> tuple[ServingResult, list[dict[str, Any]]]:
    """Simulate the recorded run; return the result and the measured rows.

    Raises:
        MeasurementError: a file of the folder is missing or cannot be read.
        WorkloadError: rows of ``requests.jsonl`` cannot be used.
    """
    folder = RunFolder.read(directory)
    rows = read_measured(directory / "requests.jsonl")
    model = folder.model()
    times = _times(folder, model)
    blocks, block_tokens = folder.kv_blocks(model, times.tp_size, times.dp_size)
    serve = Serve.model_validate(
        {
            "workload": {"trace": str(directory / "requests.jsonl"), "format": "jsonl"},
            "replicas": times.dp_size,
            "router": "least_loaded",
            "scheduler": {
                "max_num_seqs": times.max_num_seqs,
                "max_num_batched_tokens": folder.max_num_batched_tokens,
                "block_tokens": block_tokens,
                "prefix_cache": folder.setting("cache_config", "enable_prefix_caching") is not False,
                "async_scheduling": folder.is_async,
            },
        }
    )
    # arrival_time is an epoch clock, the others a monotonic one: the quickest hand-over aligns them
    offset = min(row["queued_ts"] - row["arrival_time"] for row in rows)
    start = min(row["arrival_time"] for row in rows)
    rows.sort(key=lambda row: row["arrival_time"])
    share, owed = folder.cached_share(), 0.0
    requests: list[Request] = []
    for number, row in enumerate(rows, start=1):
        first, blocks_of = number << 32, int(row["input_toks"]) // block_tokens
        # nothing says which prompts share a prefix: all share as many blocks as the run found on average
        owed += share * blocks_of
        common = min(int(owed), blocks_of)
        owed -= common
        chain = [(range(common), 1)] if common else []
        chain.append((range(first, first + blocks_of - common), 1))
        arrival = round((row["arrival_time"] - start) * 1e9)
        requests.append(Request(0, arrival, int(row["input_toks"]), int(row["output_toks"]), chain))
        row["arrival"] = row["arrival_time"] + offset
    engine = Engine(times, blocks, times.tp_size)
    rules = BalancerRules.of(folder.version) if times.dp_size > 1 and model.num_moe_layers else None
    return simulate_serving(serve, engine, requests=requests, lockstep=rules), rows


def _statistics(values: FloatArray) -> dict[str, float]:
    return {"mean": float(values.mean())} | {f"p{p}": float(np.percentile(values, p)) for p in (50, 90, 99)}


def run(directory: Path) -> dict[str, Any]:
    """Return {"ttft_s" | "tpot_s" | "e2e_s": {"mean" | "p50" | "p90" | "p99": {predicted, measured, error}}}.

    ``error`` is predicted / measured - 1.
    """
    directory = Path(directory)
    result, rows = predict(directory)
    columns = result.records
    first, last, arrival = (columns.numpy(name) * 1e-9 for name in ("first", "last", "arrival"))
    tokens = columns.numpy("output")
    many = (tokens > 1) & (columns.numpy("status") == COMPLETED)
    done = columns.numpy("status") == COMPLETED
    predicted = {
        "ttft_s": (first - arrival)[done],
        "tpot_s": (last - first)[many] / (tokens[many] - 1),
        "e2e_s": (last - arrival)[done],
    }
    arrived, begun, ended, generated = (
        np.array([row[key] for row in rows], dtype=float)
        for key in ("arrival", "first_token_ts", "last_token_ts", "output_toks")
    )
    measured = {
        "ttft_s": begun - arrived,
        "tpot_s": (ended - begun)[generated > 1] / (generated[generated > 1] - 1),
        "e2e_s": ended - arrived,
    }
    table: dict[str, Any] = {}
    for name, values in predicted.items():
        ours, theirs = _statistics(values), _statistics(measured[name])
        table[name] = {
            key: {"predicted": ours[key], "measured": theirs[key], "error": ours[key] / theirs[key] - 1}
            for key in STATISTICS
        }
    return table
