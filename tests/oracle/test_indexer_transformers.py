"""The lightning indexer against the DeepSeek-V3.2 module of transformers."""

from __future__ import annotations

import pytest
import torch

from longcat_sim.model.layers import Rotary
from longcat_sim.model.sparse import Keep, LightningIndexer, rows_of, topk_indices

transformers = pytest.importorskip("transformers")
modeling = pytest.importorskip("transformers.models.deepseek_v32.modeling_deepseek_v32")


def config(**changes: int):
    sizes = {
        "hidden_size": 48, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 4, "num_hidden_layers": 1,
        "index_n_heads": 5, "index_head_dim": 20, "index_topk": 7, "intermediate_size": 32, "n_routed_experts": 8,
        "moe_intermediate_size": 16, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "vocab_size": 64,
    }  # fmt: skip
    return transformers.DeepseekV32Config(**{**sizes, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"index_n_heads": 1, "index_topk": 3},
        {"index_head_dim": 8, "index_topk": 31},
        {"hidden_size": 96, "index_topk": 64},
    ],
)
def test_same_choice_as_transformers(changes: dict[str, int]) -> None:
    torch.manual_seed(sum(map(ord, str(changes))))
    cfg = config(**changes)
    theirs = modeling.DeepseekV32Indexer(cfg, 0)
    with torch.no_grad():
        theirs.k_norm.weight.uniform_(0.5, 1.5)
        theirs.k_norm.bias.normal_()
    ours = LightningIndexer(
        hidden_size=cfg.hidden_size, query_size=cfg.q_lora_rank, index_n_heads=cfg.index_n_heads,
        index_head_dim=cfg.index_head_dim, qk_rope_head_dim=cfg.qk_rope_head_dim,
    )  # fmt: skip
    ours.load_state_dict(theirs.state_dict())  # the names agree
    T = 40
    hidden, latent = torch.randn(2, T, cfg.hidden_size), torch.randn(2, T, cfg.q_lora_rank)
    positions = torch.arange(T)
    rope = modeling.DeepseekV32RotaryEmbedding(cfg)
    mask = torch.ones(T, T, dtype=torch.bool).tril()[None].expand(2, T, T)
    want = theirs(hidden, latent, rope(hidden, positions[None].expand(2, T)), mask, positions[None])
    cos, sin = Rotary(cfg.qk_rope_head_dim, 10000.0).at(positions, T - 1)
    with torch.no_grad():
        scores = ours(hidden, latent, cos, sin)
    rows = rows_of(Keep(count=cfg.index_topk), batch=2, queries=T, keys=T, positions=None, device=hidden.device)
    got = topk_indices(scores[:, None], rows)[:, 0]
    for b in range(2):
        for t in range(T):
            kept = min(cfg.index_topk, t + 1)
            mine, others = got[b, t, :kept], want[b, t, :kept].long()
            torch.testing.assert_close(  # by value: ties may come in any order
                scores[b, t, mine].sort().values, scores[b, t, others].sort().values, rtol=1e-5, atol=1e-6
            )
            assert bool((got[b, t, kept:] == -1).all())


def test_both_rotary_layouts_differ_and_depend_on_distance_only() -> None:
    torch.manual_seed(0)
    hidden, latent = torch.randn(1, 6, 16), torch.randn(1, 6, 12)
    state = None
    outcome = []
    for is_interleaved in (False, True):
        indexer = LightningIndexer(
            hidden_size=16, query_size=12, index_n_heads=3, index_head_dim=10, qk_rope_head_dim=6,
            is_interleaved=is_interleaved,
        )  # fmt: skip
        state = state or indexer.state_dict()
        indexer.load_state_dict(state)
        table = Rotary(6, 100.0)
        with torch.no_grad():
            near = indexer(hidden, latent, *table.at(torch.arange(6), 5))
            far = indexer(hidden, latent, *table.at(torch.arange(6) + 50, 55))
        torch.testing.assert_close(near, far, rtol=1e-4, atol=1e-5)
        outcome.append(near)
    assert not torch.allclose(outcome[0], outcome[1], atol=1e-3)


def test_scores_keep_under_a_common_rotation() -> None:
    """The Hadamard rotation of the published code is orthogonal: leaving it out changes nothing."""
    from longcat_sim.model.sparse import index_scores

    torch.manual_seed(0)
    q, k, w = torch.randn(1, 4, 3, 16), torch.randn(1, 30, 16), torch.randn(1, 4, 3)
    turn = torch.linalg.qr(torch.randn(16, 16)).Q
    torch.testing.assert_close(index_scores(q @ turn, k @ turn, w), index_scores(q, k, w), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(index_scores(q, k, w, chunk_bytes=1), index_scores(q, k, w))  # chunks of 64 keys
