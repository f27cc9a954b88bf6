"""Checkpoints: resume bit for bit, corrupt files, other configs, a full disk, an empty corpus."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest
import torch

from longcat_sim.errors import TrainingError, UserError
from longcat_sim.model import LongcatFlash
from longcat_sim.model.training import TextCorpus, TrainConfig, Trainer, read_corpus
from longcat_sim.model.training import checkpoint as checkpoint_module
from longcat_sim.model.training.checkpoint import checkpoints, read_checkpoint
from longcat_sim.model.training.growth import grow
from longcat_sim.studies.training import train
from longcat_sim.studies.training.sizes import small_spec

SPEC = small_spec(32, 1, experts=8, zero=4, topk=3, expert_width=16)
CONFIG = TrainConfig(
    steps=8, sequences=2, tokens=16, warmup_steps=2, mtp_from=0.5, checkpoint_every=3, watch_every=4, balance_groups=2
)


@pytest.fixture(scope="module")
def corpus() -> TextCorpus:
    rng = np.random.default_rng(0)
    words = [bytes(rng.integers(97, 123, rng.integers(2, 9)).astype(np.uint8)) for _ in range(50)]
    text = b" ".join(words[i] for i in rng.integers(0, 50, 40_000))
    return TextCorpus({"words": text[:150_000], "tail": text[-70_000:]}, {"words": 0.6, "tail": 0.4})


def trainer(corpus: TextCorpus, **changes: object) -> Trainer:
    torch.set_num_threads(1)
    return Trainer(LongcatFlash(SPEC, mtp=True), CONFIG.replace(**changes), corpus)


def equal(a: Trainer, b: Trainer) -> bool:
    mine, theirs = a.tensors(), b.tensors()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("stop", [3, 6])  # before and after the MTP head joins (step 4)
def test_resume_continues_bit_for_bit(corpus: TextCorpus, tmp_path: Path, stop: int) -> None:
    whole = trainer(corpus)
    whole.run()
    first = trainer(corpus)
    first.run(until=stop, folder=tmp_path)
    second = trainer(corpus)
    assert second.resume(tmp_path)
    assert second.step_done == stop
    second.run(folder=tmp_path)
    assert equal(whole, second)
    assert [row["loss"] for row in second.history] == [row["loss"] for row in whole.history]
    assert len(checkpoints(tmp_path)) == CONFIG.keep_checkpoints


def test_corrupt_checkpoint_is_named_and_the_one_before_is_used(corpus: TextCorpus, tmp_path: Path) -> None:
    first = trainer(corpus)
    first.run(folder=tmp_path)
    newest, before = checkpoints(tmp_path)
    data = bytearray(newest.read_bytes())
    data[-5] ^= 1  # one flipped bit
    newest.write_bytes(data)
    second = trainer(corpus)
    assert second.resume(tmp_path)
    assert second.step_done == 6
    assert str(newest) in second.remarks[0]
    assert "hash" in second.remarks[0]
    assert str(before) in second.remarks[1]
    second.run(folder=tmp_path)
    assert equal(first, second)
    for path in checkpoints(tmp_path):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(TrainingError, match="at least one readable checkpoint") as fault:
        trainer(corpus).resume(tmp_path)
    assert len(fault.value.faults) == 3
    newest.write_bytes(b"")
    with pytest.raises(TrainingError, match="cut short"):
        read_checkpoint(newest)


def test_checkpoint_of_another_run_is_refused(corpus: TextCorpus, tmp_path: Path) -> None:
    trainer(corpus).run(until=3, folder=tmp_path)
    with pytest.raises(TrainingError, match=r"training.seed: this run 1, the checkpoint 0"):
        trainer(corpus, seed=1).resume(tmp_path)
    other = Trainer(LongcatFlash(SPEC.replace(num_layers=2), mtp=True), CONFIG, corpus)
    with pytest.raises(TrainingError, match=r"model.num_layers: this run 2, the checkpoint 1"):
        other.resume(tmp_path)
    text = TextCorpus({"words": corpus.texts["words"]}, {"words": 1.0})
    with pytest.raises(TrainingError, match="corpus: this run"):
        Trainer(LongcatFlash(SPEC, mtp=True), CONFIG, text).resume(tmp_path)
    assert trainer(corpus, checkpoint_every=2).resume(tmp_path)  # how often is not what the run is


def test_full_disk_loses_nothing(corpus: TextCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(corpus)
    run.run(until=3, folder=tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    class Full:
        def __init__(self, path: Path, *, binary: bool) -> None:
            self.inner = atomic(path, binary=binary)

        def __enter__(self) -> Full:
            self.file = self.inner.__enter__()
            return self

        def __exit__(self, *fault: object) -> object:
            return self.inner.__exit__(*fault)

        def write(self, data: bytes) -> None:
            self.file.write(data[: len(data) // 2])
            if len(data) > 2000:
                raise OSError(errno.ENOSPC, "No space left on device")

    atomic = checkpoint_module.atomic
    monkeypatch.setattr(checkpoint_module, "atomic", Full)
    with pytest.raises(TrainingError, match="the disk is full") as fault:
        run.run(folder=tmp_path)
    assert "untouched" in str(fault.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.undo()
    again = trainer(corpus)
    assert again.resume(tmp_path)
    again.run()
    whole = trainer(corpus)
    whole.run()
    assert equal(whole, again)


def test_growth_keeps_counters_weights_and_moments(corpus: TextCorpus) -> None:
    small = trainer(corpus, mtp_from=0.0)
    small.run(until=4)
    grown = grow(small, 3)
    assert grown.model.spec.num_layers == 3
    assert (grown.step_done, grown.tokens_seen, len(grown.history)) == (4, 4 * 32, 4)
    old, new = small.tensors(), grown.tensors()
    for i in range(3):
        for name in ("router.weight", "experts.down", "router.e_score_correction_bias"):
            assert torch.equal(new[f"model/layers.{i}.{name}"], old[f"model/layers.0.{name}"])
        moment = "attention.1.q_up.weight/exp_avg_sq"
        assert torch.equal(new[f"adam/layers.{i}.{moment}"], old[f"adam/layers.0.{moment}"])
    assert torch.equal(new["model/head.weight"], old["model/head.weight"])
    row = grown.step()
    assert row["step"] == 4
    assert row["learning_rate"] == CONFIG.learning_rate_at(4)
    with pytest.raises(TrainingError, match="factor of at least 2"):
        grow(small, 1)


def test_diverging_run_says_where(corpus: TextCorpus) -> None:
    run = trainer(corpus)
    run.run(until=2)
    with torch.no_grad():
        run.model.head.weight.fill_(float("inf"))
    with pytest.raises(TrainingError, match="step 2: expected a finite loss"):
        run.step()


def test_scaled_loss_gives_the_same_run_without_epsilon(corpus: TextCorpus) -> None:
    """Adam with epsilon 1e-16 and clipping by a scaled norm do not notice a factor of 2^-20 on all gradients."""
    plain, scaled = trainer(corpus, epsilon=1e-30), trainer(corpus, epsilon=1e-30, loss_scale=2.0**-20)
    plain.run()
    scaled.run()
    assert [row["loss"] for row in scaled.history] == pytest.approx([row["loss"] for row in plain.history], rel=1e-5)
    norms = [[row["gradient_norm"] for row in run.history] for run in (plain, scaled)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    assert max(norms[0]) > CONFIG.clip_norm, "some step was clipped"


def test_empty_or_missing_corpus(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TrainingError) as fault:
        read_corpus([tmp_path / "a.txt", tmp_path / "empty", tmp_path / "none.txt"])
    assert len(fault.value.faults) == 3
    assert "got 5" in fault.value.faults[0]
    with pytest.raises(TrainingError, match="at least one path"):
        read_corpus([])
    with pytest.raises(TrainingError, match="expected text; got none"):
        TextCorpus({}, {})


def test_batches_repeat_keep_the_mix_and_spare_held_out_text(corpus: TextCorpus) -> None:
    assert torch.equal(corpus.batch(1, 7, 4, 16), corpus.batch(1, 7, 4, 16))
    assert not torch.equal(corpus.batch(1, 7, 4, 16), corpus.batch(1, 8, 4, 16))
    assert not torch.equal(corpus.batch(1, 7, 4, 16), corpus.batch(2, 7, 4, 16))
    text = np.frombuffer(corpus.texts["words"], np.uint8)
    held = corpus.held_out("words", 8, 200)
    for row in held.numpy().astype(np.uint8):
        at = corpus.texts["words"].find(row.tobytes())
        assert at // 4096 % 16 == 15, "held-out text is of every sixteenth block"
    for step in range(40):
        for row in corpus.batch(0, step, 4, 200).numpy().astype(np.uint8):
            at = corpus.texts["words"].find(row.tobytes())
            assert at < 0 or at // 4096 % 16 != 15
    assert len(text) == 150_000


def test_train_writes_and_goes_on(corpus: TextCorpus, tmp_path: Path) -> None:
    source = tmp_path / "text"
    source.mkdir()
    (source / "a.txt").write_bytes(corpus.texts["words"])
    seen = []
    config = CONFIG.replace(steps=6)
    done = train(
        SPEC, tmp_path / "out", config=config, corpus=[source], progress=lambda _, row: seen.append(row["step"])
    )
    assert seen == list(range(6))
    assert done.steps == 6
    assert done.tokens == 6 * 32
    assert 0 <= (done.acceptance or 0) <= 1
    assert "plotly" in (tmp_path / "out" / "loss.html").read_text()
    loaded = LongcatFlash.from_pretrained(tmp_path / "out" / "model")
    assert loaded.mtp is not None
    text = read_corpus([source]).held_out_mix(32, config.tokens)
    with torch.no_grad():
        logits = loaded(text[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())
    assert float(loss) == pytest.approx(done.held_out_loss, rel=1e-5)
    again = train(SPEC, tmp_path / "out", config=config, corpus=[source], progress=False)
    assert again.resumed_at == 6
    assert again.held_out_loss == done.held_out_loss
    with pytest.raises(UserError, match="expected a folder that can be written"):
        train(SPEC, source / "a.txt", config=config, progress=False)
