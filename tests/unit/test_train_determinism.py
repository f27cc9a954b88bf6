"""The deterministic mode, and what the model's hooks and the MTP loss see."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

from longcat_sim.errors import TrainingError
from longcat_sim.model import LongcatFlash
from longcat_sim.model.training import TextCorpus, TrainConfig, Trainer
from longcat_sim.model.training.acceptance import continuation, measure_acceptance
from longcat_sim.model.training.determinism import deterministic_mode
from longcat_sim.model.training.losses import hidden_z_loss, mtp_logits
from longcat_sim.model.training.watch import Watch
from longcat_sim.studies.training.sizes import small_spec

SPEC = small_spec(32, 2, experts=8, zero=4, topk=3, expert_width=16)
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def corpus() -> TextCorpus:
    text = b"abcdefgh" * 20_000  # a cycle: the next byte follows from the last, and so does the one after
    return TextCorpus({"cycle": text}, {"cycle": 1.0})


def run(corpus: TextCorpus, **changes: object) -> Trainer:
    config = TrainConfig(
        steps=6, sequences=2, tokens=16, warmup_steps=2, mtp_from=0.5, balance_groups=2, deterministic=True
    ).replace(**changes)
    trainer = Trainer(LongcatFlash(SPEC, mtp=True), config, corpus)
    trainer.run()
    return trainer


def test_two_runs_are_equal_bit_by_bit(corpus: TextCorpus) -> None:
    a, b = run(corpus), run(corpus)
    assert [row["loss"].hex() for row in a.history] == [row["loss"].hex() for row in b.history]
    assert [row.get("mtp") for row in a.history] == [row.get("mtp") for row in b.history]
    mine, theirs = a.tensors(), b.tensors()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    other = run(corpus, seed=1).tensors()
    assert not torch.equal(mine["model/head.weight"], other["model/head.weight"])


def test_mode_puts_everything_back() -> None:
    before = torch.get_num_threads()

    def inside() -> None:
        with deterministic_mode(2):
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.get_num_threads() == 2
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        inside()
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == before
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ


def test_watch_sees_the_tensors_of_the_pass() -> None:
    model = LongcatFlash(SPEC, seed=0)
    tokens = torch.arange(32).view(2, 16)
    watch = Watch()
    with watch.on(model):
        hidden = model.run_layers(tokens, model.step(2, 16))
    assert len(watch.routings) == 2
    assert watch.routings[0].scores_TE is not None
    assert torch.allclose(watch.routings[0].scores_TE.sum(-1), torch.ones(32))
    assert watch.last_hidden_TH is not None
    assert torch.equal(model.norm(watch.last_hidden_TH), hidden)
    hidden_z_loss(watch.last_hidden_TH).backward()
    assert model.layers[0].router.weight.grad is not None
    model.run_layers(tokens, model.step(2, 16))
    assert len(watch.routings) == 2, "the hooks are gone"


def test_mtp_head_learns_the_token_after_next(corpus: TextCorpus) -> None:
    """On a cycle of eight bytes both heads end near zero loss, and drafts are accepted."""
    trainer = run(corpus, steps=90, mtp_from=0.2, learning_rate=1e-2, sequences=4)
    tail = trainer.history[-5:]
    assert "mtp" not in trainer.history[17]
    assert "mtp" in trainer.history[18]
    assert np.mean([row["loss"] for row in tail]) < 0.2
    assert np.mean([row["mtp"] for row in tail]) < 0.3
    text = corpus.held_out("cycle", 4, 32)[:, :-1]
    found = measure_acceptance(trainer.model, text, prompt_tokens=8, new_tokens=16)
    assert float(found.greedy.mean()) > 0.9
    assert float(found.generated.mean()) > 0.9
    assert 0.7 < float(found.sampled.mean()) <= 1.0
    written = continuation(trainer.model, text[:, :8], 16)
    assert torch.equal(written[:, :16], text[:, :16])


def test_mtp_looks_no_further_than_the_next_token() -> None:
    """Changing token t + 2 must not change the draft for it."""
    model = LongcatFlash(SPEC, mtp=True, seed=0)
    tokens = torch.randint(0, 256, (1, 12), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[0, 8] = (changed[0, 8] + 1) % 256

    def drafts(of: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return mtp_logits(model, of, model.run_layers(of, model.step(1, 12)).view(1, 12, -1))[0]

    a, b = drafts(tokens), drafts(changed)
    # position t drafts t + 2: 6 drafts token 8; experts with another number of rows round differently
    torch.testing.assert_close(a[:7], b[:7], atol=1e-5, rtol=0)
    assert (a[7] - b[7]).abs().max() > 1e-3  # 7 knows token 8


def test_acceptance_needs_the_head() -> None:
    with pytest.raises(TrainingError, match="mtp=True"):
        measure_acceptance(LongcatFlash(SPEC, seed=0), torch.zeros(1, 8, dtype=torch.long))
