"""Corners of the serving engine that random scenarios seldom reach: each was a fault once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longcat_sim.errors import WorkloadError
from longcat_sim.ops.memory import draft_bytes, weight_bytes
from longcat_sim.simulation.serving.cluster import Engine, KvLink
from longcat_sim.simulation.serving.simulate import ServingResult, simulate_serving
from longcat_sim.simulation.serving.step_times import LinearStepTimes
from longcat_sim.specs.deployment import Deployment
from longcat_sim.specs.model import model_spec
from longcat_sim.specs.serve import Serve

TIMES = LinearStepTimes(fixed_ns=10_000_000, per_prefill_token_ns=10_000)
ENGINE = Engine(TIMES, 10_000, 1, 0.0, 1000.0, 4)


def constant(inputs: int, outputs: int, count: int, rate: str = "50 /s") -> dict[str, Any]:
    return {
        "arrivals": {"process": "constant", "rate": rate}, "input_tokens": inputs, "output_tokens": outputs,
        "num_requests": count,
    }  # fmt: skip


def serve(engine: Any = ENGINE, **spec: Any) -> ServingResult:
    settings = {name: spec.pop(name) for name in ("kv_link", "acceptance", "seed") if name in spec}
    return simulate_serving(Serve.model_validate(spec), engine, debug=True, **settings)


@pytest.mark.parametrize("tokens", [0, 1600, 100_000])
def test_the_first_turn_computes_its_system_prompt(tokens: int) -> None:
    workload = {
        **constant(100, 20, 50, "1 /s"),
        "sessions": {"turns": 1, "new_tokens": 10, "system_prompt_tokens": tokens},
    }
    alone = serve(workload=workload, scheduler={"prefix_cache": False})
    assert alone.pools["shared"].prefilled_tokens == 50 * (100 + tokens)
    done = alone.records.numpy("status") == 1
    assert (alone.records.numpy("input")[done] == 100 + tokens).all()
    if tokens:
        cached = serve(workload=workload, scheduler={"block_tokens": 16}).metrics()
        assert cached["prefix_hit_ratio"] == pytest.approx(49 / 50 * tokens / (100 + tokens), rel=0.01)


def test_a_threshold_cuts_prompts_before_the_budget_does() -> None:
    """Without chunked prefill too, as in vLLM v1's scheduler."""
    found = serve(
        workload=constant(100, 10, 2), scheduler={"chunked_prefill": False, "long_prefill_token_threshold": 64}
    )
    assert found.metrics()["completed"] == 2


def test_without_chunks_what_could_not_come_back_is_refused() -> None:
    """Preempted after 100 tokens, 1,000 of input would be 1,100 to compute at once: more than the budget."""
    scheduler = {
        "chunked_prefill": False, "max_num_seqs": 8, "max_num_batched_tokens": 1024, "num_kv_blocks": 500,
    }  # fmt: skip
    refused = serve(workload=constant(1000, 400, 8), scheduler=scheduler).metrics()
    assert (refused["completed"], refused["rejected"]) == (0, 8)
    served = serve(workload=constant(600, 400, 8), scheduler=scheduler).metrics()
    assert served["completed"] == 8
    assert served["preemptions"] > 0


def test_an_autoscaler_replaces_what_was_lost() -> None:
    """Down to no replica at all, with fewer waiting than would start another."""
    workload = {**constant(100, 400, 3, "1 /s"), "arrivals": {"process": "poisson", "rate": "1 /s"}}
    found = serve(
        workload=workload, autoscaler={"max_replicas": 2, "interval": "1 s"},
        faults=[{"kind": "replica_loss", "at": "2 s"}],
    )  # fmt: skip
    assert found.metrics()["completed"] == 3


def test_rejections_do_not_hide_an_overload() -> None:
    """20 /s of 1,000 tokens on four slots cannot be kept up; the long ones that are refused do not help."""
    workload = {
        "arrivals": {"process": "poisson", "rate": "20 /s"}, "output_tokens": 50, "num_requests": 4000,
        "input_tokens": {"distribution": "exponential", "mean": 1000},
    }  # fmt: skip
    slow = Engine(LinearStepTimes(fixed_ns=10_000_000, per_prefill_token_ns=20_000), 10_000, 1, 0.0, 1000.0, 4)
    for longest in (None, 1500, 900):
        got = serve(slow, workload=workload, scheduler={"max_num_seqs": 4, "max_model_len": longest}).metrics()
        assert got["unstable"]


def test_a_user_in_a_loop_goes_on_after_a_refusal() -> None:
    found = serve(
        workload={
            "arrivals": {"process": "closed_loop", "concurrency": 8}, "output_tokens": 50, "num_requests": 400,
            "input_tokens": {"distribution": "exponential", "mean": 500},
        },
        scheduler={"max_model_len": 1500},
    ).metrics()  # fmt: skip
    assert found["requests"] == 400
    assert found["rejected"] > 10


@pytest.mark.parametrize("acceptance", [(), (0.8,), (0.8, 0.6, 0.4)])
def test_a_decode_pool_never_holds_more_than_it_has(acceptance: tuple[float, ...]) -> None:
    """A sequence that comes with its KV cache decodes at once: the blocks of its first step are asked for too."""
    workload = {
        "arrivals": {"process": "poisson", "rate": "60 /s"}, "num_requests": 60,
        "input_tokens": {"distribution": "lognormal", "mean": 300, "cv": 1.2, "max": 1500},
        "output_tokens": {"distribution": "gamma", "mean": 60, "cv": 0.8},
    }  # fmt: skip
    scheduler = {"num_kv_blocks": 2000, "block_tokens": 1, "max_num_seqs": 32, "max_num_batched_tokens": 2048}
    for seed in range(40):
        found = serve(
            {"prefill": ENGINE, "decode": ENGINE}, workload=workload, scheduler=scheduler, prefill={"replicas": 2},
            decode={"replicas": 1}, kv_link=KvLink(1e9), acceptance=acceptance, seed=seed,
        )  # fmt: skip
        assert found.metrics()["completed"] + found.metrics()["rejected"] == 60


def test_epoch_clocks_of_any_trace_start_with_it(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    rows = [{"arrival_s": 1.7e9 + at, "input_tokens": 100, "output_tokens": 5} for at in range(20)]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    workload = {"trace": str(path), "format": "jsonl"}
    found = serve(workload=workload)
    assert found.records.numpy("arrival")[[0, -1]].tolist() == [0, 19_000_000_000]
    assert serve(workload={**workload, "duration": "5 s"}).metrics()["requests"] == 6
    late = [{**row, "arrival_s": 100.0 + at} for at, row in enumerate(rows)]
    path.write_text("\n".join(json.dumps(row) for row in late), encoding="utf-8")
    with pytest.raises(WorkloadError, match="expected one request at least"):
        serve(workload={**workload, "duration": "5 s"})


@pytest.mark.parametrize("tp", [1, 8])
def test_a_draft_layer_is_cut_as_the_layers_are(tp: int) -> None:
    """DeepSeek-V3's MTP layer is one of its MoE layers: its experts are cut with theirs, whatever cuts them."""
    model = model_spec("deepseek-v3")
    deployment = Deployment.model_validate({"num_gpus": 8, "tp_size": tp, "ep_size": 8 // tp})
    layer = weight_bytes(model, deployment)["expert_weights"] / model.num_moe_layers
    assert 1.0 * layer < draft_bytes(model, deployment) < 1.0 * layer + 0.6e9
    assert np.isfinite(layer)
