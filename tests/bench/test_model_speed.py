"""Speed beside transformers' LongCat-Flash: same weights, one thread, fp32, last-token logits; ratios of one run.

What limits each side, from the arithmetic: prefill is products (ours should near the GEMM peak; transformers scans the
one-hot mask [experts, K, tokens] once per expert and runs attention unfused, v being narrower than q and k). Decode
reads weights and latents once (ours); transformers expands every latent to keys and values in every step.
"""

import json
import time

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from longcat_sim.model import LatentCache, LongcatFlash  # noqa: E402
from longcat_sim.specs.model import ModelSpec, model_spec  # noqa: E402

pytestmark = pytest.mark.slow
BATCH, PROMPT, CONTEXT = 8, 512, 2048
SIZES = (
    "hidden_size", "num_layers", "vocab_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank",
    "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "ffn_hidden_size", "expert_ffn_hidden_size",
    "n_routed_experts", "zero_expert_num", "moe_topk",
)  # fmt: skip


def interleaved(calls, repeats):
    """Return the least seconds of each call, the calls taking turns."""
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - start)
    return best


def both(spec: ModelSpec):
    from transformers import LongcatFlashConfig, LongcatFlashForCausalLM

    config = LongcatFlashConfig(**{key: getattr(spec, key) for key in SIZES}, head_dim=spec.qk_rope_head_dim)
    torch.manual_seed(0)
    theirs = LongcatFlashForCausalLM(config).eval()
    ours = LongcatFlash(spec).eval()
    ours.load_hf_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize(
    ("name", "prefill_least", "decode_least"), [("longcat-cpu-256e", 1.5, 5.0), ("longcat-cpu-64e", 1.0, 10.0)]
)
@torch.inference_mode()
def test_speed_beside_transformers(name, prefill_least, decode_least, capsys):
    from transformers import DynamicCache

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        spec = model_spec(name)
        ours, theirs = both(spec)
        tokens = torch.randint(0, spec.vocab_size, (BATCH, PROMPT))
        square = torch.randn(1536, 1536)
        found = interleaved(
            {
                "ours": lambda: ours(tokens, last_token_only=True),
                "theirs": lambda: theirs(tokens, use_cache=False, logits_to_keep=1),
                "gemm": lambda: square @ square,
            },
            2,
        )
        # both caches hold the same latents
        latents = torch.randn(spec.num_attention_sublayers, BATCH, CONTEXT, spec.kv_values_per_token())
        cache, their_cache = LatentCache(spec, num_sequences=BATCH, max_tokens=CONTEXT + 16), DynamicCache()
        plan = cache.extend(range(BATCH), CONTEXT)
        for i, latent in enumerate(latents):
            cache.write(i, plan, latent.flatten(0, 1))
            c, rope = latent[:, None].split([spec.kv_lora_rank, spec.qk_rope_head_dim], dim=-1)
            their_cache.update(c.clone(), rope.clone(), i)
        last = tokens[:, -1:]
        logits = {}

        def decode_ours():
            logits["ours"] = ours.decode(last, cache)

        def decode_theirs():
            logits["theirs"] = theirs(last, past_key_values=their_cache, use_cache=True).logits

        decode = interleaved({"ours": decode_ours, "theirs": decode_theirs}, 6)
        torch.testing.assert_close(logits["ours"], logits["theirs"], atol=1e-4, rtol=0)
    finally:
        torch.set_num_threads(threads)
    by_part = spec.flop_per_token((PROMPT + 1) / 2, phase="prefill")
    flop = BATCH * (PROMPT * (sum(by_part.values()) - by_part["head"]) + by_part["head"])
    peak = 2 * 1536**3 / found["gemm"]
    weights = sum(p.nbytes for p in ours.parameters())
    row = {
        "model": name,
        "prefill_ours_s": found["ours"],
        "prefill_transformers_s": found["theirs"],
        "prefill_ratio": found["theirs"] / found["ours"],
        "prefill_share_of_gemm_peak": flop / found["ours"] / peak,
        "gemm_peak_flop_per_s": peak,
        "decode_ours_s": decode["ours"],
        "decode_transformers_s": decode["theirs"],
        "decode_ratio": decode["theirs"] / decode["ours"],
        "decode_weight_bytes": weights,
    }
    with capsys.disabled():
        print("\n" + json.dumps({key: v if isinstance(v, str) else float(f"{v:.4g}") for key, v in row.items()}))
    assert row["prefill_ratio"] >= prefill_least
    assert row["decode_ratio"] >= decode_least


@torch.inference_mode()
def test_memory_of_a_decode_step(capsys):
    from torch.profiler import profile

    spec = model_spec("longcat-cpu-256e")
    model = LongcatFlash(spec, seed=0)
    cache = LatentCache(spec, num_sequences=BATCH, max_tokens=CONTEXT + 16)
    cache.extend(range(BATCH), CONTEXT)
    tokens = torch.zeros(BATCH, 1, dtype=torch.long)
    model.decode(tokens, cache)
    with profile(profile_memory=True) as seen:
        model.decode(tokens, cache)
    raw = seen.profiler.kineto_results.events()  # events() keeps only what is allocated outside of ops
    changes = sorted((event.start_ns(), event.nbytes()) for event in raw if event.name() == "[memory]")
    live = peak = 0
    for _, change in changes:
        live += change
        peak = max(peak, live)
    largest = max(change for _, change in changes)
    held = sum(p.nbytes for p in model.parameters()) + cache.nbytes
    # activations of one layer: residual, both FFN inners, queries, scores, expert rows
    rows = BATCH * spec.moe_topk
    layer = 4 * (
        BATCH * (8 * spec.hidden_size + 3 * spec.ffn_hidden_size + 2 * spec.num_attention_heads * spec.qk_head_dim)
        + BATCH * spec.num_attention_heads * CONTEXT
        + rows * (2 * spec.hidden_size + 3 * spec.expert_ffn_hidden_size)
    )
    with capsys.disabled():
        print(f"\ndecode step: weights + cache {held / 1e6:.1f} MB, peak of temporaries {peak / 1e6:.2f} MB, ", end="")
        print(f"largest tensor {largest / 1e6:.2f} MB, ratio {(held + peak) / (held + layer):.4f}")
    assert largest > BATCH * spec.hidden_size * 4  # the profile does see the step's tensors
    assert largest < BATCH * spec.n_routed_experts * spec.hidden_size * 4 / 4
    assert peak < 1.3 * layer  # stricter than with weights and cache on both sides
