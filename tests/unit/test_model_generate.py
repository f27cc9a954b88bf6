"""Generation: drafts change nothing but the number of steps; top-k attention is exact; text in, text out."""

import itertools

import pytest

torch = pytest.importorskip("torch")

from longcat_sim.errors import ModelError  # noqa: E402
from longcat_sim.model import AttentionVariant, LatentCache, LongcatFlash  # noqa: E402
from longcat_sim.model.attention import keep_topk  # noqa: E402
from longcat_sim.model.generate import generate  # noqa: E402
from longcat_sim.model.tokenizer import ByteTokenizer  # noqa: E402
from longcat_sim.specs.model import model_spec  # noqa: E402

torch.set_num_threads(1)
# A small vocabulary makes untrained drafts right now and then; large weights make logits differ.
FEW_WORDS = model_spec("longcat-tiny").replace(vocab_size=4, hidden_size=32, initializer_range=0.6)


@pytest.mark.parametrize("drafts", [1, 2, 3])
def test_greedy_drafts_change_no_token(drafts):
    # fp64: one token at a time and several at once sum in another order, and a tie must not flip
    model = LongcatFlash(FEW_WORDS, mtp=True, dtype=torch.float64, seed=3)
    prompts = [[0, 1, 2, 3, 0], [3], [1, 1, 2, 0, 0, 3, 2, 1]]
    plain = generate(model, prompts, 40)
    drafted = generate(model, prompts, 40, draft_tokens=drafts)
    assert drafted.tokens == plain.tokens
    assert all(len(tokens) == 40 for tokens in plain.tokens)
    assert len({tuple(t) for t in plain.tokens}) > 1
    assert drafted.accepted[0] > 0
    assert drafted.accepted[0] < drafted.drafted[0]
    assert drafted.steps < plain.steps
    # what is accepted at one position is what is tested at the next
    assert drafted.drafted[1:] == drafted.accepted[:-1]


def test_plain_greedy_equals_the_uncached_model():
    model = LongcatFlash(FEW_WORDS, dtype=torch.float64, seed=3)
    prompt = [0, 1, 2]
    made = generate(model, [prompt], 12).tokens[0]
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(12):
            tokens.append(int(model(torch.tensor([tokens]), last_token_only=True).argmax()))
    assert made == tokens[3:]


@pytest.mark.slow
@pytest.mark.parametrize("drafts", [0, 1, 2])
def test_sampling_with_drafts_keeps_the_distribution(drafts):
    spec = FEW_WORDS.replace(hidden_size=64, initializer_range=0.15)
    model = LongcatFlash(spec, mtp=True, dtype=torch.float64, seed=5)
    prompt, count, temperature = [2, 0, 1], 4000, 0.7
    made = generate(model, [prompt] * count, 3, temperature=temperature, draft_tokens=drafts, seed=drafts)
    seen = torch.zeros(4, 4, 4)
    for tokens in made.tokens:
        seen[tuple(tokens)] += 1
    triples = torch.tensor(list(itertools.product(range(4), repeat=3)))
    with torch.inference_mode():
        full = torch.cat([torch.tensor(prompt).expand(64, 3), triples], dim=1)
        chance = (model(full) / temperature).softmax(-1)[:, 2:5].gather(2, triples[..., None])[..., 0].prod(1)
    assert float(chance.sum()) == pytest.approx(1.0)
    expected = chance * count
    chi_squared = float(((seen.flatten() - expected) ** 2 / expected).sum())
    # 63 degrees of freedom: 99.9 % of draws of the right distribution lie below 103.4
    assert chi_squared < 103.4
    assert float(expected.max() / expected.min()) > 3  # a uniform sampler would fail


def test_generation_reads_text_with_any_attention():
    tokenizer = ByteTokenizer(512)
    model = LongcatFlash("longcat-tiny", seed=0, mtp=True)
    prompt = tokenizer.encode("LongCat: ÄÖ 猫")
    dense = generate(model, [prompt], 8)
    for variant in (
        AttentionVariant("naive"),
        AttentionVariant("topk", topk=1000),
        AttentionVariant("topk", topk=1000, share_heads=True),
    ):
        assert generate(model, [prompt], 8, variant=variant).tokens == dense.tokens
    assert tokenizer.decode(prompt) == "LongCat: ÄÖ 猫"
    assert generate(model, [prompt], 8, stop_token=dense.tokens[0][2]).tokens[0] == dense.tokens[0][:3]


def test_topk_keeps_exactly_the_largest():
    scores = torch.randn(2, 3, 4, 50)
    own = keep_topk(scores, 7, share_heads=False)
    assert (torch.isfinite(own).sum(-1) == 7).all()
    assert torch.equal(own.max(-1).values, scores.max(-1).values)
    assert (own.masked_fill(own == -torch.inf, torch.inf).min(-1).values >= scores.sort(-1).values[..., -7]).all()
    shared = torch.isfinite(keep_topk(scores, 7, share_heads=True))
    assert (shared == shared[:, :, :1]).all()
    assert (shared.sum(-1) == 7).all()


def test_topk_attention_equals_a_masked_softmax():
    spec = model_spec("longcat-tiny")
    model = LongcatFlash(spec, seed=1, dtype=torch.float64)
    tokens = torch.randint(0, 512, (2, 60))
    with torch.inference_mode():
        caches = [LatentCache(spec, num_sequences=2, max_tokens=80, dtype=torch.float64) for _ in range(3)]
        for cache in caches:
            model.prefill(tokens, cache)
        new = torch.tensor([[5], [6]])
        dense = model.decode(new, caches[0])
        all_kept = model.decode(new, caches[1], variant=AttentionVariant("topk", topk=61))
        few_kept = model.decode(new, caches[2], variant=AttentionVariant("topk", topk=4))
    torch.testing.assert_close(all_kept, dense)
    assert not torch.allclose(few_kept, dense, atol=1e-6)


def test_wrong_requests():
    model = LongcatFlash("longcat-tiny", seed=0)
    for prompts in ([], [[]]):
        with pytest.raises(ModelError, match="prompts"):
            generate(model, prompts, 4)
    with pytest.raises(ModelError, match="mtp=True"):
        generate(model, [[1]], 4, draft_tokens=1)
    with pytest.raises(ModelError, match=r"ids 0..511"):
        generate(model, [[512]], 4)
    with pytest.raises(ModelError, match="at least 1; got 0"):
        generate(model, [[1]], 0)
    with pytest.raises(ModelError, match="topk must be >= 1"):
        AttentionVariant("topk")
    with pytest.raises(ModelError, match="at least 258"):
        ByteTokenizer(100)
    small = LatentCache(model.spec, num_sequences=1, num_blocks=2, block_tokens=4)
    with pytest.raises(ModelError, match="cache full: sequence 0 with 8 tokens needs 1 more blocks of 4"):
        generate(model, [[1, 2, 3, 4, 5]], 10, cache=small)
