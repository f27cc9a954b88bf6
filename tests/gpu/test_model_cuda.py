"""The model on CUDA: equal to itself on the CPU, grouped products equal to expert by expert, no wait for the device."""

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

from longcat_sim.model import LatentCache, LongcatFlash  # noqa: E402
from longcat_sim.model.longcat import ABSORBED  # noqa: E402
from longcat_sim.model.moe import sort_rows, zero_experts  # noqa: E402
from longcat_sim.specs.model import model_spec  # noqa: E402

TINY = model_spec("longcat-tiny")


@torch.inference_mode()
def test_fp32_equals_the_cpu():
    cpu = LongcatFlash(TINY, seed=0)
    gpu = LongcatFlash(TINY, device="cuda")
    gpu.load_state_dict(cpu.state_dict())
    torch.backends.cuda.matmul.allow_tf32 = False
    tokens = torch.randint(0, TINY.vocab_size, (2, 90))
    torch.testing.assert_close(gpu(tokens.cuda()).cpu(), cpu(tokens), atol=1e-3, rtol=0)
    cache = LatentCache(TINY, num_sequences=2, max_tokens=100, device="cuda")
    gpu.prefill(tokens[:, :80].cuda(), cache)
    torch.testing.assert_close(gpu.decode(tokens[:, 80:].cuda(), cache).cpu(), cpu(tokens)[:, 80:], atol=1e-3, rtol=0)


@torch.inference_mode()
def test_grouped_product_equals_expert_by_expert_without_waiting():
    spec = TINY.replace(hidden_size=256, expert_ffn_hidden_size=128)
    model = LongcatFlash(spec, device="cuda", dtype=torch.bfloat16, seed=0)
    layer = model.layers[0]
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16)
    layer.experts(x, sort_rows(layer.router(x), 16), torch.zeros_like(x))  # warm up
    torch.cuda.set_sync_debug_mode("error")
    try:
        routing = layer.router(x)
        rows = sort_rows(routing, 16)
        got = layer.experts(x, rows, zero_experts(x, routing, 16))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = layer.experts._expert_by_expert(x, rows, rows.counts.tolist(), zero_experts(x, routing, 16))
    torch.testing.assert_close(got.float(), expected.float(), atol=0.05, rtol=0.05)


def bf16_model(**changes):
    spec = TINY.replace(hidden_size=256, expert_ffn_hidden_size=128, **changes)
    return LongcatFlash(spec, device="cuda", dtype=torch.bfloat16, seed=0)


@torch.inference_mode()
def test_absorbed_equals_naive_in_bf16():
    model = bf16_model()
    tokens = torch.randint(0, TINY.vocab_size, (3, 62), device="cuda")  # 62 is no multiple of 8
    cache = LatentCache(model.spec, num_sequences=3, max_tokens=80, device="cuda", dtype=torch.bfloat16)
    model.prefill(tokens[:, :61], cache)
    got, expected = model.decode(tokens[:, 61:], cache)[:, 0].float(), model(tokens)[:, -1].float()
    assert float((got - expected).norm() / expected.norm()) < 0.03


@torch.inference_mode()
def test_exchanges_that_loop_back_change_nothing():
    from longcat_sim.model.loop_back import LoopBack, by_few, paced

    model = bf16_model()
    tokens = torch.randint(0, TINY.vocab_size, (16, 1), device="cuda")
    cache = LatentCache(model.spec, num_sequences=16, max_tokens=40, device="cuda", dtype=torch.bfloat16)
    cache.pool.normal_(0.0, 0.1)
    cache.lengths = [32] * 16
    step = model.step(16, 1, cache, None, ABSORBED)
    plain = model.run_layers(tokens, step).float()
    for how in ("none", "sbo"):
        for exchange in (by_few(4), paced(50e-6)):
            with LoopBack(model, how, exchange):
                got = model.run_layers(tokens, step).float()
            assert float((got - plain).norm() / plain.norm()) < 0.02, how


@torch.inference_mode()
def test_a_few_sms_copy_every_byte():
    from longcat_sim.model.few_sms import copy_by_few

    for count, sms in ((16, 1), (100_002, 3), (40_000_000, 20)):
        source = torch.randn(count, device="cuda").to(torch.bfloat16)
        target = torch.full_like(source, float("nan"))
        copy_by_few(source, target, sms)
        assert torch.equal(source, target)


def test_what_waits_is_not_captured_and_the_rest_is():
    from longcat_sim.profiling.timing import Clock, _waits

    x = torch.randn(1 << 20, device="cuda")
    assert _waits(lambda: float(x.sum()))
    assert not _waits(lambda: x + 1)
    seconds = Clock(torch.device("cuda")).sample(lambda: x + 1, 0.01)
    assert not seconds.probes
    assert all(1e-6 < one < 1e-4 for one in seconds.flat)  # a kernel, not its launch
    torch.randn(4, device="cuda")


def test_every_kind_of_op_runs(tmp_path):
    from longcat_sim.profiling.campaign import run_campaign
    from longcat_sim.profiling.suites import SMALL, SUITES
    from longcat_sim.records.measurement import load_measurements

    names = [*SUITES, "contention", "model-step", "overlap"]
    out = tmp_path / "m.jsonl"
    plan = tuple((name, "longcat-1layer-32e", 1.0) for name in names)
    found = run_campaign(out, device="cuda", budget_s=60.0, plan=plan, grid=SMALL)
    assert not found.failed, found.failed
    rows = load_measurements(out)
    kinds = {kind for kinds in SUITES.values() for kind in kinds}
    assert kinds <= {row.op.kind for row in rows}
    assert {(step.phase, step.overlap) for step in rows.steps} == {
        ("decode", ""), ("prefill", ""), ("decode", "none"), ("decode", "sbo"),
    }  # fmt: skip
