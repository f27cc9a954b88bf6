"""The simulated step against context, with and without an indexer."""

from __future__ import annotations

import pytest

from longcat_sim.specs.scenario import scenario
from longcat_sim.studies.topk.context_price import price_against_context


def step(sequences: int) -> dict:
    return {"draws": 1, "step": {"phase": "decode", "sequences_per_gpu": sequences, "context_tokens": 4096}}


@pytest.mark.slow
def test_sparse_is_flat_and_crosses_earlier_with_more_sequences() -> None:
    contexts = (2048, 8192, 32768, 131072)
    few, many = (price_against_context(scenario("deepseek-v3.2-h800-decode", step(n)), contexts) for n in (16, 64))
    for found in (few, many):
        dense, sparse = ([row[f"{name}_s"] for row in found["rows"]] for name in ("dense", "sparse"))
        assert dense == sorted(dense)
        assert dense[-1] / dense[0] > 2  # every key is read
        assert sparse[-1] / sparse[0] < dense[-1] / dense[0]  # 2,048 keys are, and the indexer's small ones
        assert found["rows"][0]["dense_over_sparse"] < 1  # all 2,048 keys are kept and the indexer comes on top
    assert not many["rows"][-1]["fits"]
    assert many["crossover_tokens"] < few["crossover_tokens"]
    assert 2048 < many["crossover_tokens"] < 131072


@pytest.mark.slow
def test_longcat_flash_is_lent_an_indexer() -> None:
    found = price_against_context(scenario("longcat-flash-h800-decode", step(16)), (4096, 131072))
    assert found["is_indexer_lent"]
    assert found["index_topk"] == 2048
    assert found["rows"][0]["dense_over_sparse"] < 1 < found["rows"][1]["dense_over_sparse"]


def test_what_cannot_be_priced() -> None:
    with pytest.raises(ValueError, match="contexts"):
        price_against_context(scenario("deepseek-v3.2-h800-decode", step(16)), (4096, 2048))
    with pytest.raises(ValueError, match="MLA"):
        price_against_context(scenario("deepseek-v3.2-h800-decode", {"model": "qwen3-235b-a22b", **step(16)}))
