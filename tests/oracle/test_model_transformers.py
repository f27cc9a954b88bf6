"""Equality with transformers' LongCat-Flash over many small random configs, full, prefilled and cached."""

import random

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from longcat_sim.errors import ModelError  # noqa: E402
from longcat_sim.model import AttentionVariant, LatentCache, LongcatFlash  # noqa: E402
from longcat_sim.model.loading import SafetensorsFolder, hf_state_dict, save_pretrained  # noqa: E402
from longcat_sim.specs.model import ModelSpec, model_spec  # noqa: E402

torch.set_num_threads(1)
TOLERANCE = 1e-4  # logits, fp32; the two implementations order their sums differently


def random_config(seed: int):
    from transformers import LongcatFlashConfig

    rng = random.Random(seed)
    heads = rng.choice([1, 2, 3, 4])
    rope = rng.choice([4, 8, 16])
    routed, zero = rng.choice([3, 8, 17]), rng.choice([0, 2, 8])
    return LongcatFlashConfig(
        hidden_size=rng.choice([32, 48, 96]),
        num_layers=rng.choice([1, 2, 3]),
        vocab_size=rng.choice([50, 131]),
        num_attention_heads=heads,
        q_lora_rank=rng.choice([8, 24]),
        kv_lora_rank=rng.choice([8, 32]),
        qk_nope_head_dim=rng.choice([8, 16, 24]),
        qk_rope_head_dim=rope,
        head_dim=rope,
        v_head_dim=rng.choice([8, 16, 40]),
        ffn_hidden_size=rng.choice([32, 80]),
        expert_ffn_hidden_size=rng.choice([8, 24]),
        n_routed_experts=routed,
        zero_expert_num=zero,
        moe_topk=rng.randint(2, min(6, routed + zero)),  # transformers 5.23 fails with one choice (a squeeze too many)
        routed_scaling_factor=rng.choice([1.0, 6.0]),
        rms_norm_eps=rng.choice([1e-5, 1e-6]),
        rope_parameters={"rope_type": "default", "rope_theta": rng.choice([1e4, 1e7])},
        initializer_range=0.1,
        max_position_embeddings=512,
    )


def pair(seed: int, **kwargs):
    from transformers import LongcatFlashForCausalLM

    config = random_config(seed)
    torch.manual_seed(seed)
    theirs = LongcatFlashForCausalLM(config).eval()
    with torch.no_grad():
        for name, value in theirs.named_parameters():
            if "norm" in name:  # ones would hide a misplaced norm
                value.uniform_(0.5, 1.5)
        for layer in theirs.model.layers:  # zeros would hide a misplaced bias
            layer.mlp.router.e_score_correction_bias.normal_(0, 0.05)
    ours = LongcatFlash(ModelSpec.from_hf_config(config.to_dict()), **kwargs).eval()
    ours.load_hf_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("seed", range(24))
@torch.inference_mode()
def test_logits_equal(seed):
    theirs, ours = pair(seed)
    tokens = torch.randint(0, ours.spec.vocab_size, (3, 70))
    expected = theirs(tokens).logits
    assert expected.std() > 0.01
    torch.testing.assert_close(ours(tokens), expected, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(ours(tokens, last_token_only=True), expected[:, -1], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", ["absorbed", "naive"])
@pytest.mark.parametrize("seed", range(24, 32))
@torch.inference_mode()
def test_prefill_and_decode_equal_the_full_pass(seed, kind):
    theirs, ours = pair(seed)
    tokens = torch.randint(0, ours.spec.vocab_size, (3, 40))
    expected = theirs(tokens).logits
    cache = LatentCache(ours.spec, num_sequences=3, max_tokens=40, block_tokens=7)
    variant = AttentionVariant(kind)
    torch.testing.assert_close(ours.prefill(tokens[:, :9], cache), expected[:, 8], atol=TOLERANCE, rtol=0)
    # a second chunk, three tokens at once, then one by one
    torch.testing.assert_close(ours.prefill(tokens[:, 9:30], cache), expected[:, 29], atol=TOLERANCE, rtol=0)
    several = ours.decode(tokens[:, 30:33], cache, variant=variant)
    torch.testing.assert_close(several, expected[:, 30:33], atol=TOLERANCE, rtol=0)
    for at in range(33, 40):
        one = ours.decode(tokens[:, at : at + 1], cache, variant=variant)
        torch.testing.assert_close(one[:, 0], expected[:, at], atol=TOLERANCE, rtol=0)


@torch.inference_mode()
def test_ragged_batches_decode_as_alone():
    theirs, ours = pair(40)
    lengths = [5, 33, 17]
    prompts = [torch.randint(0, ours.spec.vocab_size, (1, n + 4)) for n in lengths]
    cache = LatentCache(ours.spec, num_sequences=3, num_blocks=20, block_tokens=4)
    for slot, (prompt, n) in enumerate(zip(prompts, lengths, strict=True)):
        ours.prefill(prompt[:, :n], cache, [slot])
    for at in range(4):
        new = torch.cat([prompt[:, n + at : n + at + 1] for prompt, n in zip(prompts, lengths, strict=True)])
        got = ours.decode(new, cache)
        for row, (prompt, n) in enumerate(zip(prompts, lengths, strict=True)):
            expected = theirs(prompt[:, : n + at + 1]).logits[0, -1]
            torch.testing.assert_close(got[row, 0], expected, atol=TOLERANCE, rtol=0)


@torch.inference_mode()
def test_chosen_experts_equal():
    theirs, ours = pair(3)
    tokens = torch.randint(0, ours.spec.vocab_size, (2, 50))
    scores = theirs(tokens, output_router_logits=True).router_logits
    with ours.record_routing() as trace:
        ours(tokens)
    recorded = trace()
    assert recorded.experts.shape == (ours.spec.num_layers, 100, ours.spec.moe_topk)
    for layer, logits in enumerate(scores):
        biased = logits.softmax(-1) + theirs.model.layers[layer].mlp.router.e_score_correction_bias
        expected = biased.topk(ours.spec.moe_topk, -1).indices.sort(-1).values
        assert torch.equal(torch.from_numpy(recorded.experts[layer]).long().sort(-1).values, expected)


def test_published_config_has_560_66_billion_parameters():
    model = LongcatFlash("longcat-flash", device="meta", dtype=torch.bfloat16)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert total == model_spec("longcat-flash").num_parameters
    assert total == pytest.approx(560.66e9, rel=2e-5)
    with_mtp = LongcatFlash("longcat-flash", device="meta", dtype=torch.bfloat16, mtp=True)
    assert sum(p.numel() for p in with_mtp.parameters()) - total == model_spec("longcat-flash").mtp_parameters


@torch.inference_mode()
def test_published_shard_names_and_files(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    theirs, ours = pair(5, mtp=False)
    config = random_config(5).to_dict()
    source = LongcatFlash(ours.spec, mtp=True, seed=1)
    source.load_hf_state_dict({**hf_state_dict(source), **hf_state_dict(ours)})
    state = {name: tensor.contiguous() for name, tensor in hf_state_dict(source).items()}
    names = sorted(state)
    half = len(names) // 2
    for part, chosen in enumerate([names[:half], names[half:]]):
        safetensors.save_file({n: state[n] for n in chosen}, tmp_path / f"model-0000{part + 1}-of-00002.safetensors")
    import json

    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = LongcatFlash.from_pretrained(tmp_path)
    assert loaded.mtp is not None
    tokens = torch.randint(0, ours.spec.vocab_size, (2, 30))
    torch.testing.assert_close(loaded(tokens), theirs(tokens).logits, atol=TOLERANCE, rtol=0)
    save_pretrained(loaded, tmp_path / "again", config)
    written = safetensors.load_file(tmp_path / "again" / "model.safetensors")
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], state[name]) for name in names)
    assert all(torch.equal(SafetensorsFolder(tmp_path)[name], state[name]) for name in names)


def test_wrong_weights_name_every_fault(tmp_path):
    _, ours = pair(1)
    state = dict(hf_state_dict(ours))
    del state["model.layers.0.mlps.1.up_proj.weight"], state["model.norm.weight"]
    state["lm_head.weight"] = torch.zeros(3, 4)
    state["model.layers.0.bogus"] = torch.zeros(1)
    before = ours.embedding.weight.clone()
    state["model.embed_tokens.weight"] = before + 1
    with pytest.raises(ModelError) as error:
        ours.load_hf_state_dict(state)
    text = str(error.value)
    assert len(error.value.faults) == 4
    assert "model.layers.0.mlps.1.up_proj.weight" in text
    assert "model.norm.weight" in text
    assert f"expected shape {list(ours.head.weight.shape)}; got [3, 4]" in text
    assert "model.layers.0.bogus" in text
    assert torch.equal(ours.embedding.weight, before)  # nothing is copied from a faulty set
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="pickles"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((1000).to_bytes(8, "little") + b"{}")
    with pytest.raises(ModelError, match="cut short"):
        SafetensorsFolder(tmp_path)
