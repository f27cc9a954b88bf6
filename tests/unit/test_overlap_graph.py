"""The op graph of a step: FLOP, bytes and counts that follow from the published sizes; schedules and their faults."""

import warnings

import numpy as np
import pytest

from longcat_sim.calibration.roofline import Roofline
from longcat_sim.errors import MemoryFitError, ScheduleError, SpecError
from longcat_sim.ops.attention import StepSize
from longcat_sim.ops.graph import LayerLoad, layer_segments, step_graph
from longcat_sim.ops.schedules import SCHEDULES, Schedule, schedule
from longcat_sim.simulation.step import simulate_step, step_memory, step_seconds_many
from longcat_sim.specs.deployment import OVERLAPS, Deployment
from longcat_sim.specs.hardware import load_hardware
from longcat_sim.specs.model import model_spec
from longcat_sim.specs.scenario import scenario


def flop(segments, kinds):
    return sum(float(op.typical().flop) for ops in segments.values() for op in ops if op.kind in kinds)


@pytest.mark.parametrize(("name", "kind"), [("longcat-flash", "longcat"), ("deepseek-v3", "moe")])
def test_a_layer_costs_the_flop_of_its_parameters(name, kind):
    model = model_spec(name)
    rows = 64.0
    load = LayerLoad(rows * model.expected_ffn_experts, rows * model.expected_ffn_experts, 4.0)
    segments = layer_segments(
        model, Deployment(num_gpus=128, ep_size=128), StepSize("decode", rows, 1.0, 4096.0), kind, load
    )
    weights = model.attention_parameters - model.q_lora_rank - model.kv_lora_rank
    dense = 2 * model.ffn_parameters if kind == "longcat" else model.shared_expert_parameters
    blocks = 2 if kind == "longcat" else 1
    expected = 2 * rows * (blocks * weights + dense + model.expected_ffn_experts * model.expert_parameters)
    assert flop(segments, ("gemm", "bmm", "grouped_gemm")) == pytest.approx(expected, rel=1e-12)
    core = blocks * 2 * rows * model.num_attention_heads * 4096 * (2 * 512 + 64)
    assert flop(segments, ("mla_decode",)) == pytest.approx(core, rel=1e-12)


def test_dispatch_moves_what_deepep_says():
    model = model_spec("deepseek-v3")
    load = LayerLoad(128 * 8.0, 128 * 8.0, 2.0)
    segments = layer_segments(
        model, Deployment(num_gpus=128, ep_size=128), StepSize("decode", 128.0, 1.0, 4096.0), "moe", load
    )
    assert segments["dispatch"][0].typical().message_bytes == 128 * 8 * 7392  # fp8 with a scale per 128
    assert segments["combine"][0].typical().message_bytes == 128 * 8 * 14336


def test_tensor_parallel_ffn_gathers_and_scatters_whole_rows():
    model = model_spec("longcat-flash")
    load = LayerLoad(100.0, 100.0, 4.0)
    cut = Deployment(num_gpus=128, ep_size=128, dense_tp_size=4)
    segments = layer_segments(model, cut, StepSize("decode", 10.0, 2.0, 100.0), "longcat", load)
    gather = next(op for op in segments["ffn0"] if op.kind == "all_gather").typical()
    assert (gather["message_bytes"], gather["ranks"]) == (20 * 4 * 6144 * 2, 4)
    product = next(op for op in segments["ffn0"] if op.name == "ffn0 gate_up").typical()
    assert (product["m"], product["n"], product["k"]) == (80, 2 * 12288 / 4, 6144)


def test_a_step_holds_every_layer_the_head_and_the_draft():
    model = model_spec("deepseek-v3")
    load = LayerLoad(100.0, 100.0, 4.0)
    blocks = step_graph(
        model, Deployment(num_gpus=128, ep_size=128), StepSize("decode", 8.0, 2.0, 4096.0), load, draft_tokens=1
    )
    assert [(b.name, b.count) for b in blocks] == [
        ("embedding", 1), ("dense", 3), ("moe", 58), ("head", 1), ("draft input", 1), ("draft", 1), ("draft head", 1),
    ]  # fmt: skip


def test_prefill_expands_the_latent_and_attends_causally():
    model = model_spec("deepseek-v3")
    size = StepSize("prefill", 2.0, 3072.0, 4096.0)  # 1,024 tokens of each prompt are cached
    load = LayerLoad(100.0, 100.0, 4.0, 50.0)
    segments = layer_segments(model, Deployment(num_gpus=32, ep_size=32), size, "moe", load)
    kv_b = next(op for op in segments["attn_proj"] if op.name == "kv_b").typical()
    assert kv_b["m"] == 2 * 4096
    pairs = 3072 * 1024 + 3072 * 3073 / 2
    assert flop(segments, ("attention_prefill",)) == pytest.approx(2 * 2 * 128 * pairs * (192 + 128))
    assert segments["dispatch"][0].variant == "normal"


def test_every_schedule_is_sound_and_faults_are_named():
    for plan in SCHEDULES.values():
        plan.check()
    looped = Schedule("bad", "dense", {"compute": ("attn_core", "attn_proj", "ffn")})
    with pytest.raises(ScheduleError, match="cycle"):
        looped.check()
    with pytest.raises(ScheduleError, match="ffn is missing"):
        Schedule("bad", "dense", {"compute": ("attn_proj", "attn_core")}).check()
    with pytest.raises(ScheduleError, match="expected one of none, sbo, tbo"):
        schedule("sbo_engine", "moe")


def test_two_micro_batches_need_two_sequences():
    case = scenario("deepseek-v3-h800-decode", {"step.sequences_per_gpu": 1})
    with pytest.raises(ScheduleError, match="at least 2 sequences per GPU; got 1"):
        simulate_step(case, Roofline(case.hardware))


def test_an_overlap_without_exchange_warns():
    case = scenario(
        {
            "model": "longcat-tiny", "hardware": "h800-sxm", "deployment": {"num_gpus": 1, "overlap": "sbo"},
            "step": {"phase": "decode", "sequences_per_gpu": 4, "context_tokens": 100},
        }
    )  # fmt: skip
    with pytest.warns(UserWarning, match="no effect"):
        simulate_step(case, Roofline(case.hardware))


def test_links_that_cannot_carry_the_groups_are_refused():
    case = scenario("longcat-flash-h800-decode", {"deployment.dense_tp_size": 16})
    with pytest.raises(SpecError, match="dense_tp_size: expected at most 8"):
        simulate_step(case, Roofline(case.hardware))


def test_memory_adds_up_and_says_what_would_fit():
    case = scenario("longcat-flash-h800-decode", {"step.context_spread": 0})
    found = step_memory(case)
    # report: 4.2 GB of experts at EP128, 3.2 GB of dense FFN at TP4; 64,512 B of KV cache per token
    assert found.parts["expert_weights"] == pytest.approx(4.23e9, rel=0.01)
    assert found.parts["dense_ffn_weights"] == pytest.approx(3.17e9, rel=0.01)
    # the drafting layer's attention keeps a cache of its own beside those of 28 layers x 2
    assert found.parts["kv_cache"] == pytest.approx(96 * 5000 * 64512 * 57 / 56)
    assert step_memory(case.what_if({"speculative": {}})).parts["kv_cache"] == 96 * 5000 * 64512
    assert found.fits
    big = case.what_if({"step.context_tokens": 20000})
    with pytest.raises(MemoryFitError, match=r"GB too much .* at most \d+ sequences per GPU"):
        simulate_step(big, Roofline(big.hardware))


def test_many_steps_at_once_equal_one_by_one():
    case = scenario("deepseek-v3-h800-decode", {"model.num_layers": 12, "deployment.ep_size": 16})
    case = case.what_if({"deployment.num_gpus": 16})
    times = Roofline(case.hardware)
    batch, context = np.array([16.0, 64.0, 128.0]), np.array([1000.0, 4096.0, 2000.0])
    together = step_seconds_many(case, times, batch, context)
    for b, c, seconds in zip(batch, context, together, strict=True):
        one = case.what_if({"step.sequences_per_gpu": float(b), "step.context_tokens": float(c)})
        assert seconds == pytest.approx(simulate_step(one, times, check=False).step_s, rel=2e-3)


def test_figures_and_trace_of_a_step():
    from longcat_sim.figures.breakdown import breakdown_figure
    from longcat_sim.figures.timeline import layer_timeline
    from longcat_sim.records.span import chrome_trace

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case = scenario("longcat-flash-h800-decode", {"model.num_layers": 4, "deployment.ep_size": 16})
        case = case.what_if({"deployment.num_gpus": 16})
        result = simulate_step(case, Roofline(load_hardware("h800-sxm")), check=False)
    assert sum(result.breakdown.parts().values()) == pytest.approx(result.step_s, rel=1e-6)
    figure = layer_timeline(result, ranks=(0, 1))
    assert {"exchange", "experts", "attention"} <= {trace.name for trace in figure.data}
    assert sum(len(trace.x) for trace in figure.data) == 2 * len(result.layer_ops())
    assert breakdown_figure({"sbo": result}).data[0].x[0] > 0
    events = chrome_trace(result.spans(ranks=[0], layers=[1]))["traceEvents"]
    arrows = [event for event in events if event["ph"] in "sf"]
    assert len(arrows) == 4  # dispatch -> experts -> combine: two arrows, each with a start and an end


@pytest.mark.parametrize("name", ["longcat-flash", "qwen3-32b"])
def test_a_narrower_cache_is_read_by_decode_kernels_and_not_by_prefill(name):
    def core(phase: str, cache: str) -> tuple[str, float]:
        precision = {"weights": "bf16", "attention": "bf16", "kv_cache": cache}
        deployment = Deployment.model_validate({"num_gpus": 1, "precision": precision})
        size = StepSize(phase, 8, 1 if phase == "decode" else 4096, 4096)
        blocks = step_graph(model_spec(name), deployment, size, LayerLoad(8, 8, 8))
        shapes = [shape for block in blocks for part in block.parts for ops in part.values() for shape in ops]
        found = next(shape.typical() for shape in shapes if shape.name == "attention core")
        return found.dtype, found.memory_bytes

    wide, narrow = core("decode", "bf16"), core("decode", "fp8")
    assert (wide[0], narrow[0]) == ("bf16", "fp8")
    assert narrow[1] == pytest.approx(wide[1] / 2, rel=0.05)
    assert core("prefill", "fp8") == core("prefill", "bf16")


def test_a_scenario_takes_the_schedules_that_there_are() -> None:
    assert {(name, layer) for layer, names in OVERLAPS.items() for name in names} == {
        (name, layer) for name, layer in SCHEDULES if layer != "dense"
    }
    for names in OVERLAPS.values():
        for name in names:
            assert schedule(name, "dense").name in ("none", "tbo")
