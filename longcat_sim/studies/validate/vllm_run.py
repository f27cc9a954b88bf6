"""Predict a recorded vLLM run from the card's layer profile, and set it beside what was measured.

The folder holds ``requests.jsonl`` (token counts and times of each request), ``meta.json`` (engine settings),
``config.json`` (the deployment: parallelism, memory, links; or the model's published config) and ``profile/``. The
prediction uses arrival times and token counts of the requests, and nothing else of them. The engine is the serving
simulator's own, with the times of ``calibration.engine_times``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from longcat_sim.calibration.engine_times import Collective, EngineTimes
from longcat_sim.calibration.layer_profile import LayerProfile
from longcat_sim.errors import MeasurementError, WorkloadError
from longcat_sim.simulation.serving.cluster import Engine
from longcat_sim.simulation.serving.request import Request
from longcat_sim.simulation.serving.simulate import ServingResult, simulate_serving
from longcat_sim.specs.model import ModelSpec, model_names, model_spec
from longcat_sim.specs.serve import Serve

FloatArray = npt.NDArray[np.float64]
STATISTICS = ("mean", "p50", "p90", "p99")
BLOCK_TOKENS = 16
"""vLLM's default KV block on CUDA."""
ASYNC_SINCE = (0, 14)
"""vLLM decides the next step while one runs by default since v0.14.0 (its release notes, January 2026)."""
DEFAULT_LINK = Collective(16e9, 20e-6)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MeasurementError(f"{path}: expected a recorded engine run with this file; there is none") from None
    except json.JSONDecodeError as fault:
        raise MeasurementError(f"{path}:{fault.lineno}: expected JSON; got {fault.msg}; mend the file") from None
    if not isinstance(document, dict):
        raise MeasurementError(f"{path}: expected a JSON object; got {type(document).__name__}")
    return document


def read_measured(path: Path) -> list[dict[str, Any]]:
    """Return the rows of ``requests.jsonl``.

    Raises:
        WorkloadError: a row is not JSON or lacks a field; all such rows are listed.
    """
    needed = ("input_toks", "output_toks", "arrival_time", "queued_ts", "first_token_ts", "last_token_ts")
    rows, faults = [], []
    if not path.is_file():
        raise MeasurementError(f"{path}: expected a recorded engine run with this file; there is none")
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                missing = [key for key in needed if not isinstance(row.get(key), int | float)]
            except (json.JSONDecodeError, AttributeError) as fault:
                faults.append(f"{path}:{number}: expected one JSON object per line; got {fault}")
                continue
            if missing:
                faults.append(f"{path}:{number}: expected numbers in {', '.join(missing)}; got {line.strip()[:80]!r}")
            rows.append(row)
    if faults or not rows:
        raise WorkloadError(faults or [f"{path}: expected one request at least; got none"])
    return rows


def find_model(name: str, folder: Path, config: Mapping[str, Any]) -> ModelSpec:
    """Return the model's shape: from a published config in the folder, else from the packaged models by name.

    Raises:
        MeasurementError: neither is there.
    """
    for candidate in (folder / "model_config.json", folder / "profile" / "config.json", folder / "config.json"):
        if candidate.is_file() and "num_hidden_layers" in _read_json(candidate):
            return ModelSpec.from_hf_config(candidate)
    short = name.rsplit("/", 1)[-1].lower()
    matches = [known for known in model_names() if short == known or short.startswith(f"{known}-")]
    if not matches:
        raise MeasurementError(
            f"{folder}: expected the shape of {name!r} in model_config.json (its published config.json), or one of "
            f"the packaged models {', '.join(model_names())}; add the file"
        )
    return model_spec(max(matches, key=len))


def _instances(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [instance for node in config.get("nodes", []) for instance in node.get("instances", [])]


def _find_link(config: Mapping[str, Any]) -> Collective:
    """Return the link between the cards: ``link_bw`` in GB/s and ``link_latency`` in ns."""
    bandwidth, latency = config.get("link_bw"), config.get("link_latency")
    if isinstance(bandwidth, int | float) and isinstance(latency, int | float):
        return Collective(bandwidth * 1e9, latency * 1e-9)
    return DEFAULT_LINK


def _kv_blocks(meta: Mapping[str, Any], config: Mapping[str, Any], model: ModelSpec, tp: int, ranks: int) -> int:
    """Return the KV blocks of one rank: what the engine reported, else the share of memory that weights leave."""
    reported = meta.get("kv_cache") or {}
    if reported.get("num_gpu_blocks"):
        return int(reported["num_gpu_blocks"]) - 1  # vLLM keeps one as the null block
    instances = _instances(config)
    memory = (instances[0].get("npu_mem") if instances else None) or {}
    size, share = memory.get("mem_size", 80), memory.get("mem_util", 0.9)
    experts = model.num_moe_layers * model.n_routed_experts * model.expert_parameters if model.num_moe_layers else 0
    weights = ((model.num_parameters - experts) / tp + experts / max(ranks, 1)) * 2.0
    free = size * 2**30 * share - weights
    return max(1, int(free / (model.kv_bytes_per_token(bytes_per_value=2) / tp * BLOCK_TOKENS)) - 1)


def predict(directory: Path) -> tuple[ServingResult, list[dict[str, Any]]]:
    """Simulate the recorded run; return the result and the measured rows.

    Raises:
        MeasurementError: a file of the folder is missing or cannot be read.
        WorkloadError: rows of ``requests.jsonl`` cannot be used.
    """
    meta, config = _read_json(directory / "meta.json"), _read_json(directory / "config.json")
    rows = read_measured(directory / "requests.jsonl")
    settings = meta.get("engine_kwargs", {})
    tp, dp = int(settings.get("tensor_parallel_size") or 1), int(settings.get("data_parallel_size") or 1)
    is_ep = bool(settings.get("enable_expert_parallel"))
    model = find_model(str(meta.get("model") or settings.get("model")), directory, config)
    max_num_seqs = int(settings.get("max_num_seqs") or 256)
    version = tuple(int(part) for part in str(meta.get("vllm_version", "0.0")).split(".")[:2] if part.isdigit())
    profile = LayerProfile.read(directory / "profile", tp)
    if model.num_moe_layers and not profile.moe:
        raise MeasurementError(
            f"{directory / 'profile'}: expected tp{tp}/moe.csv, the times of the experts of {model.name}; there is none"
        )
    times = EngineTimes(
        profile,
        model,
        max_num_seqs,
        tp_size=tp,
        dp_size=dp,
        is_expert_parallel=is_ep,
        link=_find_link(config) if tp * dp > 1 else None,
        is_eager=bool(settings.get("enforce_eager")),
    )
    serve = Serve.model_validate(
        {
            "workload": {"trace": str(directory / "requests.jsonl"), "format": "jsonl"},
            "replicas": dp,
            "router": "least_loaded",
            "scheduler": {
                "max_num_seqs": max_num_seqs,
                "max_num_batched_tokens": int(settings.get("max_num_batched_tokens") or 2048),
                "block_tokens": BLOCK_TOKENS,
                "prefix_cache": settings.get("enable_prefix_caching") is not False,
                "async_scheduling": bool(settings.get("async_scheduling", version >= ASYNC_SINCE)),
            },
        }
    )
    # arrival_time is an epoch clock, the others a monotonic one: the quickest hand-over aligns them
    offset = min(row["queued_ts"] - row["arrival_time"] for row in rows)
    start = min(row["arrival_time"] for row in rows)
    requests: list[Request] = []
    for row in sorted(rows, key=lambda r: r["arrival_time"]):
        number = len(requests)
        blocks = int(row["input_toks"]) // BLOCK_TOKENS
        first = (number + 1) << 32
        request = Request(
            0,
            round((row["arrival_time"] - start) * 1e9),
            int(row["input_toks"]),
            int(row["output_toks"]),
            [(range(first, first + blocks), 1)],
        )
        requests.append(request)
        row["arrival"] = row["arrival_time"] + offset
    engine = Engine(times, _kv_blocks(meta, config, model, tp, tp * dp if is_ep else tp), tp)
    result = simulate_serving(serve, engine, requests=requests, lockstep=dp > 1 and model.num_moe_layers > 0)
    return result, sorted(rows, key=lambda r: r["arrival_time"])


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
    many = (tokens > 1) & (columns.numpy("status") == 1)
    done = columns.numpy("status") == 1
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
