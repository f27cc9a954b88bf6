"""The model on CUDA: equal to itself on the CPU, grouped products equal to expert by expert, no wait for the device."""

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)

from longcat_sim.model import LatentCache, LongcatFlash  # noqa: E402
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
