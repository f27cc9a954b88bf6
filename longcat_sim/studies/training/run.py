"""``train``: one run on text, with checkpoints, a progress bar, a loss plot, and a model folder at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longcat_sim.errors import TrainingError
from longcat_sim.records.files import check_outputs, write_text
from longcat_sim.specs.model import ModelSpec, model_spec

if TYPE_CHECKING:
    from longcat_sim.model.training import TrainConfig, Trainer

PLOT_EVERY_S = 30.0
"""Seconds between two writes of the loss plot while training."""


@dataclass(frozen=True)
class TrainResult:
    """What a run left behind."""

    out: Path
    steps: int
    tokens: int
    loss: float
    """Mean training loss of the last 20 steps, nats per byte."""
    held_out_loss: float
    ffn_experts: list[float]
    """Mean FFN experts per token and layer, last 20 steps."""
    ffn_experts_std: list[float]
    acceptance: float | None
    """Greedy acceptance of the MTP head's draft on held-out text; None without the head."""
    wall_s: float
    resumed_at: int
    """Step that the run went on from; 0 for a new one."""
    remarks: tuple[str, ...]
    history: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """Return the result, history apart, as a JSON document."""
        return {
            "out": str(self.out), "steps": self.steps, "tokens": self.tokens, "loss_nats_per_byte": self.loss,
            "held_out_loss_nats_per_byte": self.held_out_loss, "ffn_experts_per_token": self.ffn_experts,
            "ffn_experts_per_token_std": self.ffn_experts_std, "mtp_acceptance": self.acceptance,
            "wall_s": self.wall_s, "resumed_at_step": self.resumed_at, "remarks": list(self.remarks),
        }  # fmt: skip

    def __str__(self) -> str:
        experts = ", ".join(
            f"{mean:.2f} ± {std:.2f}" for mean, std in zip(self.ffn_experts, self.ffn_experts_std, strict=True)
        )
        accepted = (
            "" if self.acceptance is None else f"\nMTP draft accepted  {self.acceptance:.1%} (held-out text, greedy)"
        )
        return (
            f"steps               {self.steps} ({self.tokens:,} tokens)\n"
            f"loss                {self.loss:.4f} nats per byte; held out {self.held_out_loss:.4f}\n"
            f"FFN experts a token {experts} (mean ± std over tokens, by layer){accepted}\n"
            f"written to          {self.out}"
        )


def _bar(trainer: Trainer) -> tuple[Callable[[Trainer, dict[str, Any]], None], Callable[[], None]]:
    """Return a progress callback with a bar on stderr, and its end."""
    from tqdm import tqdm

    bar = tqdm(
        total=trainer.config.steps, initial=trainer.step_done, unit="step", file=sys.stderr, dynamic_ncols=True,
        desc="train",
    )  # fmt: skip

    def tick(_: Trainer, row: dict[str, Any]) -> None:
        used = sum(row["ffn_experts"]) / len(row["ffn_experts"])
        bar.set_postfix_str(f"loss {row['loss']:.3f}, FFN experts {used:.2f}", refresh=False)
        bar.update(1)

    return tick, bar.close


def train(
    spec: ModelSpec | str,
    out: Path,
    *,
    config: TrainConfig | None = None,
    corpus: Sequence[Path] = (),
    device: str = "cpu",
    fresh: bool = False,
    progress: bool | Callable[[Trainer, dict[str, Any]], None] = True,
) -> TrainResult:
    """Train a model (a spec or a packaged name) and write it to ``out``: run again after a stop, it goes on.

    ``out`` holds ``checkpoints/``, ``loss.html``, ``log.jsonl``, ``result.json`` and ``model/`` (config.json and
    safetensors, as published). ``corpus`` names text files or folders, one domain each; without any, the text that
    comes with Python. ``fresh`` forgets earlier checkpoints. ``progress``: a bar on stderr, nothing, or a callable.

    Raises:
        TrainingError: settings, text or checkpoints that cannot be used, a full disk, a loss that is not finite.
        UserError: ``out`` cannot be written.
    """
    from longcat_sim.model import LongcatFlash
    from longcat_sim.model.loading import save_pretrained
    from longcat_sim.model.training import TrainConfig, Trainer, library_corpus, read_corpus
    from longcat_sim.model.training.acceptance import measure_acceptance
    from longcat_sim.model.training.checkpoint import checkpoints

    spec = model_spec(spec) if isinstance(spec, str) else spec
    config = config or TrainConfig(mtp_from=0.5 if spec.num_nextn_predict_layers else 1.0)
    config.check(spec)
    out = Path(out)
    check_outputs(folders={"--out": out})
    text = read_corpus(corpus) if corpus else library_corpus()
    if device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            raise TrainingError(f"device: expected cpu or a GPU that torch sees; got {device!r}; use cpu")
    began = time.perf_counter()
    trainer = Trainer(LongcatFlash(spec, device=device, mtp=config.mtp_from < 1, seed=config.seed), config, text)
    folder = out / "checkpoints"
    if fresh:
        for path in checkpoints(folder):
            path.unlink()
    trainer.resume(folder)
    resumed_at = trainer.step_done
    for remark in trainer.remarks:
        print(f"remark: {remark}", file=sys.stderr)

    tick, close = _bar(trainer) if progress is True else (progress or (lambda *_: None), lambda: None)
    last_plot = [time.perf_counter()]

    def after_step(of: Trainer, row: dict[str, Any]) -> None:
        tick(of, row)
        if time.perf_counter() - last_plot[0] > PLOT_EVERY_S:
            last_plot[0] = time.perf_counter()
            _write_plot(of, out)

    try:
        trainer.run(folder=folder, progress=after_step)
    finally:
        close()
        if trainer.history:
            _write_plot(trainer, out)
    acceptance = None
    if config.mtp_from < 1:
        held_out = text.held_out_mix(24, min(config.tokens, 128)).to(trainer.model.device)
        acceptance = float(measure_acceptance(trainer.model, held_out[:, :-1]).greedy.mean())
    tail = trainer.history[-20:]
    layers = range(len(tail[-1]["ffn_experts"]))
    result = TrainResult(
        out=out,
        steps=trainer.step_done,
        tokens=trainer.tokens_seen,
        loss=sum(row["loss"] for row in tail) / len(tail),
        held_out_loss=trainer.evaluate(text.held_out_mix(32, config.tokens).to(trainer.model.device)),
        ffn_experts=[sum(row["ffn_experts"][i] for row in tail) / len(tail) for i in layers],
        ffn_experts_std=[sum(row["ffn_experts_std"][i] for row in tail) / len(tail) for i in layers],
        acceptance=acceptance,
        wall_s=time.perf_counter() - began,
        resumed_at=resumed_at,
        remarks=tuple(trainer.remarks),
        history=trainer.history,
    )
    import json

    try:
        save_pretrained(trainer.model, out / "model", config_json(spec))
        write_text(out / "log.jsonl", "".join(json.dumps(row) + "\n" for row in trainer.history))
        write_text(out / "result.json", json.dumps(result.to_json(), indent=1))
    except OSError as error:
        raise TrainingError(
            f"{out}: expected to write the result; {error.strerror}; the checkpoints are kept"
        ) from None
    return result


def config_json(spec: ModelSpec) -> dict[str, Any]:
    """Return the spec as a published ``config.json`` of LongCat-Flash."""
    own = ("name", "source", "head_dim", "expected_ffn_experts", "num_key_value_heads", "rope_type")
    return {k: v for k, v in spec.model_dump(mode="json").items() if k not in own and v not in ((), [])}


def _write_plot(trainer: Trainer, out: Path) -> None:
    """Write ``loss.html``; a plot that cannot be written must not end a run."""
    from longcat_sim.figures.report import Report
    from longcat_sim.figures.training import budget_figure, loss_figure

    report = Report(f"Training {trainer.model.spec.name or 'a model'}: step {trainer.step_done}")
    report.figure(loss_figure(trainer.history))
    report.figure(budget_figure(trainer.history, trainer.model.spec.expected_ffn_experts))
    try:
        write_text(out / "loss.html", report.html())
    except OSError as error:
        print(f"remark: {out / 'loss.html'}: not written; {error.strerror}", file=sys.stderr)
