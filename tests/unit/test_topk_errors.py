"""What a user can get wrong names the argument."""

from __future__ import annotations

import pytest
import torch

from longcat_sim.model.sparse import (
    BlockSelector,
    ExactSelector,
    IndexerSelector,
    Keep,
    LightningIndexer,
    SyntheticSelector,
    index_scores,
    topk_attention,
)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Keep(count=0), "count"),
        (lambda: Keep(count=-3), "count"),
        (lambda: Keep(count=2.5), "count"),  # type: ignore[arg-type]
        (lambda: Keep(ratio=0.0), "ratio"),
        (lambda: Keep(ratio=1.01), "ratio"),
        (lambda: Keep(ratio=float("nan")), "ratio"),
        (lambda: Keep(), "ratio and count"),
        (lambda: Keep(ratio=0.1, count=3), "ratio and count"),
        (lambda: Keep(ratio=0.1).of_context(0), "context"),
        (lambda: SyntheticSelector(1.2), "precision"),
        (lambda: SyntheticSelector(-0.1), "precision"),
        (lambda: SyntheticSelector(float("nan")), "precision"),
        (lambda: SyntheticSelector(0.5, "best"), "miss"),  # type: ignore[arg-type]
        (lambda: SyntheticSelector(0.5, always_keep=-1), "always_keep"),
        (lambda: ExactSelector("layer"), "sharing"),  # type: ignore[arg-type]
        (lambda: BlockSelector(page_tokens=0), "page_tokens"),
        (lambda: BlockSelector("median"), "rule"),  # type: ignore[arg-type]
        (lambda: LightningIndexer(hidden_size=0, query_size=8), "hidden_size"),
        (lambda: LightningIndexer(hidden_size=8, query_size=8, index_head_dim=4), "qk_rope_head_dim"),
    ],
)
def test_arguments(make, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        make()


def run(q_shape=(1, 4, 2, 8), k_shape=(1, 2, 10, 8), v_shape=(1, 2, 10, 8), **kwargs):
    return topk_attention(torch.randn(q_shape), torch.randn(k_shape), torch.randn(v_shape), Keep(count=3), **kwargs)


@pytest.mark.parametrize(
    ("shapes", "names"),
    [
        ({"k_shape": (1, 2, 0, 8), "v_shape": (1, 2, 0, 8)}, "context"),
        ({"k_shape": (1, 3, 10, 8), "v_shape": (1, 3, 10, 8)}, "divide"),
        ({"k_shape": (1, 2, 10, 6)}, "width"),
        ({"v_shape": (1, 2, 9, 8)}, "agree"),
        ({"q_shape": (1, 4, 8)}, "4 dims"),
        ({"q_shape": (1, 4, 11, 8)}, "positions"),
        ({"positions": torch.tensor([3, 10])}, "positions"),
        ({"positions": torch.tensor([-1, 3])}, "positions"),
    ],
)
def test_shapes(shapes: dict, names: str) -> None:
    with pytest.raises(ValueError, match=names):
        run(**shapes)


@pytest.mark.parametrize("sharing", ["head", "group", "all"])
def test_nan_scores(sharing: str) -> None:
    q, k, v = torch.randn(1, 4, 1, 8), torch.randn(1, 2, 10, 8), torch.randn(1, 2, 10, 8)
    k[0, 1, 3, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        topk_attention(q, k, v, Keep(count=3), selector=ExactSelector(sharing))


def test_indexer_dims() -> None:
    with pytest.raises(ValueError, match="indexer"):
        index_scores(torch.randn(1, 2, 3, 8), torch.randn(1, 10, 7), torch.randn(1, 2, 3))
    with pytest.raises(ValueError, match="indexer"):
        index_scores(torch.randn(1, 2, 3, 8), torch.randn(1, 10, 8), torch.randn(1, 2, 4))
    short = IndexerSelector(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3), torch.randn(1, 9, 8))
    with pytest.raises(ValueError, match="indexer"):
        run(selector=short)
    bad = IndexerSelector(torch.full((1, 2, 3, 8), float("nan")), torch.randn(1, 2, 3), torch.randn(1, 10, 8))
    with pytest.raises(ValueError, match="NaN"):
        run(selector=bad)
    indexer = LightningIndexer(hidden_size=8, query_size=8, index_head_dim=16, qk_rope_head_dim=8)
    with pytest.raises(ValueError, match="cos"):
        indexer.keys(torch.randn(1, 4, 8), torch.ones(4, 3), torch.ones(4, 3))
