"""Predict a recorded vLLM run from the card's layer profile, and set it beside what was measured.

The folder holds ``requests.jsonl`` (token counts and times of each request), ``meta.json`` (engine settings),
``config.json`` (the deployment: parallelism, memory, links; or the model's published config) and ``profile/``;
``hardware.yaml`` beside them gives measured collectives, ``timeseries.csv`` the tokens found in the prefix cache. The
prediction uses arrival times and token counts, and no measured time of any request. The engine is the serving
simulator's own, with the times of ``calibration.engine_times``.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, replace
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
from longcat_sim.studies.validate.vllm_files import read_measured
from longcat_sim.studies.validate.vllm_folder import RunFolder

FloatArray = npt.NDArray[np.float64]
STEP_TIME_ERROR = 0.007
"""Steps of one engine, started twice on one card, differed by 1.4%; no table can say more.
Source: casys-kaist/LLMServingSim, profiler/core/hooks/cudagraph_hook.py @446b29d (RTX PRO 6000, Llama-3.1-8B)."""
RUNS = 21
"""A loaded engine is chaotic: a step that is 0.1% longer can move the mean time to first token of two data-parallel
ranks by 3%. What is predicted is therefore a mean over runs that tables cannot tell apart."""


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
    is_expert_parallel = bool(folder.setting("parallel_config", "enable_expert_parallel"))
    if profile.has_forced_experts and not folder.cache_bytes:
        warnings.warn(
            f"{folder.path / 'profile' / 'meta.yaml'}: gpu: no packaged card of that name: times of few experts may be "
            "those of weights in its cache",
            stacklevel=2,
        )
    expert_bytes = 2.0 * model.expert_parameters / (1 if is_expert_parallel else tp * dp)
    profile = profile.with_experts_in_memory(expert_bytes, folder.cache_bytes)
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
        is_expert_parallel=is_expert_parallel,
        link=folder.link() if tp * dp > 1 else None,
        is_eager=folder.is_eager,
        has_one_shot=folder.has_own_all_reduce,
        captured=folder.setting("compilation_config", "cudagraph_capture_sizes"),
    )


@dataclass(frozen=True)
class Recording:
    """A recorded run, ready to be simulated."""

    rows: list[dict[str, Any]]
    """What was measured, by arrival (``read_measured``; ``arrival`` is on the monotonic clock)."""
    times: EngineTimes
    serve: Serve
    blocks: int
    rules: BalancerRules | None
    """Of data-parallel ranks that step together."""
    cached_share: float

    @classmethod
    def read(cls, directory: Path) -> Recording:
        """Read a folder.

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
        rows.sort(key=lambda row: row["arrival_time"])
        for row in rows:
            row["arrival"] = row["arrival_time"] + offset
        rules = folder.balancer() if times.dp_size > 1 and model.num_moe_layers else None
        return cls(rows, times, serve, blocks, rules, folder.cached_share())

    def simulate(self, scale: float = 1.0) -> ServingResult:
        """Return the simulated run, its steps ``scale`` times as long as the tables say."""
        size, owed = self.serve.scheduler.block_tokens, 0.0
        requests: list[Request] = []
        for number, row in enumerate(self.rows, start=1):
            first, blocks_of = number << 32, int(row["input_toks"]) // size
            # nothing says which prompts share a prefix: all share as many blocks as the run found on average
            owed += self.cached_share * blocks_of
            common = min(int(owed), blocks_of)
            owed -= common
            chain = [(range(common), 1)] if common else []
            chain.append((range(first, first + blocks_of - common), 1))
            arrival = round((row["arrival_time"] - self.rows[0]["arrival_time"]) * 1e9)
            requests.append(Request(0, arrival, int(row["input_toks"]), int(row["output_toks"]), chain))
        engine = Engine(replace(self.times, scale=scale), self.blocks, self.times.tp_size)
        return simulate_serving(self.serve, engine, requests=requests, lockstep=self.rules)


def _latencies(times: Iterable[FloatArray], tokens: FloatArray) -> dict[str, FloatArray]:
    """Return what is compared, in seconds, of (arrival, first token, last token) and the tokens of the answers."""
    arrival, first, last = times
    many = tokens > 1
    return {
        "ttft_s": first - arrival,
        "tpot_s": (last - first)[many] / (tokens[many] - 1),
        "e2e_s": last - arrival,
    }


def _statistics(values: FloatArray) -> dict[str, float]:
    return {"mean": float(values.mean())} | {f"p{p}": float(np.percentile(values, p)) for p in (50, 90, 99)}


def run(directory: Path) -> dict[str, Any]:
    """Return {"ttft_s" | "tpot_s" | "e2e_s": {"mean" | "p50" | "p90" | "p99": {predicted, measured, error, spread}}}.

    ``predicted`` is the mean over runs whose steps are up to ``STEP_TIME_ERROR`` shorter or longer, ``spread`` their
    standard deviation over it, ``error`` is predicted / measured - 1. Requests that no run can serve are left out of
    both, and so is a quantity that nobody measured (time per token of answers of one).

    Raises:
        MeasurementError: as ``Recording.read``, or none of the requests fits.
    """
    recording = Recording.read(Path(directory))
    columns = [recording.simulate(scale).records for scale in 1 + np.linspace(-STEP_TIME_ERROR, STEP_TIME_ERROR, RUNS)]
    served = np.all([each.numpy("status") == COMPLETED for each in columns], axis=0)
    if not served.all():
        left = int((~served).sum())
        reason = next(iter(columns[0].reasons.values()), "not served")
        said = f"{Path(directory) / 'requests.jsonl'}: {left} of {len(served)} requests cannot be served ({reason})"
        if not served.any():
            raise MeasurementError(f"{said}; expected the deployment that served them; mend its memory or KV blocks")
        warnings.warn(f"{said}; they are left out of both sides", stacklevel=2)
    tokens = columns[0].numpy("output")[served].astype(float)
    runs = [
        _latencies((each.numpy(name)[served] * 1e-9 for name in ("arrival", "first", "last")), tokens)
        for each in columns
    ]
    times = (
        np.array([row[key] for row in recording.rows], dtype=float)[served]
        for key in ("arrival", "first_token_ts", "last_token_ts")
    )
    table: dict[str, Any] = {}
    for name, values in _latencies(times, tokens).items():
        if not len(values) or not values.any():
            warnings.warn(f"{Path(directory) / 'requests.jsonl'}: nothing was measured of {name}", stacklevel=2)
            continue
        theirs = _statistics(values)
        each_run = [_statistics(found[name]) for found in runs]
        table[name] = {}
        for key, truth in theirs.items():
            ours = np.array([found[key] for found in each_run])
            error = ours.mean() / truth - 1 if truth else None
            spread = ours.std() / ours.mean()
            cell = {"predicted": ours.mean(), "measured": truth, "error": error, "spread": spread}
            table[name][key] = {what: None if figure is None else float(figure) for what, figure in cell.items()}
    return table
