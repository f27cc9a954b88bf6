"""Speed on a GPU beside transformers' LongCat-Flash: same sizes and dtype, random weights, kernels as they are called.

Ratios of one run. Theirs expands all latents in every step; both launch kernel by kernel.
"""

import json

import pytest

torch = pytest.importorskip("torch")
if not torch.cuda.is_available():
    pytest.skip("needs CUDA", allow_module_level=True)
pytest.importorskip("transformers")

from longcat_sim.model import LatentCache, LongcatFlash  # noqa: E402
from longcat_sim.specs.model import model_spec  # noqa: E402

SIZES = (
    "hidden_size", "num_layers", "vocab_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "ffn_hidden_size", "expert_ffn_hidden_size",
    "n_routed_experts", "zero_expert_num", "moe_topk",
)  # fmt: skip
BATCH, CONTEXT = 16, 2048


def seconds(call, repeats=5):
    """Return the least seconds of a call, by events."""
    best = float("inf")
    for _ in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) * 1e-3)
    return best


@torch.inference_mode()
def test_speed_beside_transformers(capsys):
    from transformers import DynamicCache, LongcatFlashConfig, LongcatFlashForCausalLM

    spec = model_spec("longcat-1layer-32e").replace(vocab_size=4096)
    sizes = {key: getattr(spec, key) for key in SIZES}
    config = LongcatFlashConfig(**sizes, head_dim=spec.qk_rope_head_dim, dtype=torch.bfloat16)
    with torch.device("cuda"):
        theirs = LongcatFlashForCausalLM(config).to(torch.bfloat16).eval()
    ours = LongcatFlash(spec, device="cuda", dtype=torch.bfloat16, seed=0)
    tokens = torch.randint(0, spec.vocab_size, (1, 1024), device="cuda")
    cache = LatentCache(spec, num_sequences=BATCH, max_tokens=CONTEXT + 16, device="cuda", dtype=torch.bfloat16)
    cache.pool.normal_(0.0, 0.1)
    cache.lengths = [CONTEXT] * BATCH
    their_cache = DynamicCache()
    for i in range(spec.num_attention_sublayers):
        latent = torch.randn(BATCH, 1, CONTEXT, spec.kv_lora_rank, device="cuda", dtype=torch.bfloat16)
        rope = torch.randn(BATCH, 1, CONTEXT, spec.qk_rope_head_dim, device="cuda", dtype=torch.bfloat16)
        their_cache.update(latent, rope, i)
    one = torch.randint(0, spec.vocab_size, (BATCH, 1), device="cuda")
    row = {
        "prefill_ratio": seconds(lambda: theirs(tokens, use_cache=False, logits_to_keep=1))
        / seconds(lambda: ours(tokens, last_token_only=True)),
        "decode_ratio": seconds(lambda: theirs(one, past_key_values=their_cache, use_cache=True))
        / seconds(lambda: ours.decode(one, cache)),
    }
    with capsys.disabled():
        print("\n" + json.dumps({key: float(f"{value:.3g}") for key, value in row.items()}))
    assert row["prefill_ratio"] >= 1.0
    assert row["decode_ratio"] >= 1.5
