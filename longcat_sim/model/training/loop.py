"""``Trainer``: one step of the recipe after another, each a function of weights, moments, settings and step number."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longcat_sim.errors import TrainingError
from longcat_sim.model.longcat import LongcatFlash
from longcat_sim.model.training.checkpoint import (
    Checkpoint,
    checkpoint_path,
    newest_usable,
    prune,
    write_checkpoint,
)
from longcat_sim.model.training.config import TrainConfig
from longcat_sim.model.training.controller import BudgetController
from longcat_sim.model.training.corpus import Corpus
from longcat_sim.model.training.determinism import deterministic_mode
from longcat_sim.model.training.losses import (
    balance_loss,
    hidden_z_loss,
    mtp_logits,
    router_gradient_ratio,
    router_similarity,
    token_loss,
)
from longcat_sim.model.training.optimizer import (
    init_for_training,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
)
from longcat_sim.model.training.watch import Watch, layers_of

Row = dict[str, Any]
"""One step's log: ``step``, ``loss`` and what else was looked at."""


class Trainer:
    """A model, its optimiser, its controller and its text. Build, then ``run`` or ``step``."""

    def __init__(self, model: LongcatFlash, config: TrainConfig, corpus: Corpus, *, init: bool = True) -> None:
        config.check(model.spec)
        if config.mtp_from < 1 and model.mtp is None:
            raise TrainingError("mtp_from: expected a model built with mtp=True, or 1 (off)")
        self.model, self.config, self.corpus = model, config, corpus
        self.controller = BudgetController(model.spec)
        if init:
            init_for_training(model, config)
        self.optimizer = make_optimizer(model, config, model.spec.hidden_size)
        self.step_done = 0
        self.tokens_seen = 0
        self.history: list[Row] = []
        self.remarks: list[str] = []

    @property
    def biases(self) -> list[Tensor]:
        """Each router's bias [E]."""
        return [layer.router.e_score_correction_bias for layer in layers_of(self.model)]

    # --- one step ----------------------------------------------------------------------------------------------

    def losses(self, text_BS: Tensor, watch: Watch, *, with_mtp: bool) -> dict[str, Tensor]:
        """Return the losses of a batch [B, S + 1] by name, unweighted."""
        config, model = self.config, self.model
        tokens, targets = text_BS[:, :-1], text_BS[:, 1:]
        B, S = model.check_tokens(tokens)
        with watch.on(model):
            hidden_BSH = model.run_layers(tokens, model.step(B, S)).view(B, S, -1)
        out = {"loss": token_loss(model.head(hidden_BSH), targets)}
        if config.balance:
            spec, groups = model.spec, config.balance_groups
            out["balance"] = torch.stack([balance_loss(r, spec, groups) for r in watch.routings]).sum()
        if config.z_loss:
            assert watch.last_hidden_TH is not None
            out["z"] = hidden_z_loss(watch.last_hidden_TH)
        if with_mtp:
            # position t knows token t + 1 and predicts t + 2, which is the target of t + 1
            out["mtp"] = token_loss(mtp_logits(model, tokens, hidden_BSH), targets[:, 1:])
        return out

    def step(self) -> Row:
        """Do one step and return its log.

        Raises:
            TrainingError: the loss is not finite.
        """
        config, step = self.config, self.step_done
        text = self.corpus.batch(config.seed, step, config.sequences, config.tokens).to(self.model.device)
        watch = Watch()
        losses = self.losses(text, watch, with_mtp=step >= config.mtp_step)
        weights = {"loss": 1.0, "balance": config.balance, "z": config.z_loss, "mtp": config.mtp_weight}
        row: Row = {"step": step, "tokens": self.tokens_seen + config.tokens_per_step}
        if step % config.watch_every == 0 or step == config.steps - 1:
            row |= self._look(losses["loss"], watch)
        total = config.loss_scale * torch.stack([weights[name] * value for name, value in losses.items()]).sum()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        if config.clip_norm:
            row["gradient_norm"] = self._clip(config.clip_norm * config.loss_scale) / config.loss_scale
        rate = config.learning_rate_at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate_factor"]
        self.optimizer.step()
        chosen = [routing.experts_TK for routing in watch.routings]
        if config.bias_rate and step % config.bias_every == 0:
            self.controller.update(self.biases, chosen, config.bias_rate_at(step))
        counts = torch.stack([self.controller.ffn_experts(c) for c in chosen]).float()
        assert watch.last_hidden_TH is not None
        row |= {name: float(value.detach()) for name, value in losses.items()}
        row |= {
            "ffn_experts": counts.mean(1).tolist(),
            "ffn_experts_std": counts.std(1).tolist(),
            "max_abs_hidden": float(watch.last_hidden_TH.detach().abs().max()),
            "learning_rate": rate,
        }
        if not torch.isfinite(torch.tensor(row["loss"])):
            raise TrainingError(
                f"step {step}: expected a finite loss; got {row['loss']}; lower learning_rate "
                f"({config.learning_rate:g}); the checkpoints written before are untouched"
            )
        self.step_done += 1
        self.tokens_seen += config.tokens_per_step
        self.history.append(row)
        return row

    def _clip(self, limit: float) -> float:
        """Scale all gradients to a norm of at most ``limit`` and return the norm before.

        The library's own adds 1e-6 to the norm, which is large beside the gradients of a scaled loss.
        """
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients, foreach=True)
        torch._foreach_mul_(gradients, (limit / norm).clamp(max=1.0))
        return float(norm)

    def _look(self, lm_loss: Tensor, watch: Watch) -> Row:
        """Return what is looked at now and then: R_g and router similarity of each layer."""
        config, spec = self.config, self.model.spec
        row: Row = {"router_similarity": [router_similarity(layer.router.weight) for layer in layers_of(self.model)]}
        if config.balance:
            row["gradient_ratio"] = router_gradient_ratio(
                lm_loss, watch.routings, spec, config.balance_groups, config.balance
            )
        return row

    # --- a run -------------------------------------------------------------------------------------------------

    def run(
        self,
        until: int | None = None,
        *,
        folder: Path | None = None,
        progress: Callable[[Trainer, Row], None] | None = None,
    ) -> None:
        """Train up to step ``until`` (default: the end); with ``folder`` checkpoints are written there.

        Raises:
            TrainingError: a loss that is not finite, or a checkpoint that cannot be written.
        """
        config = self.config
        until = config.steps if until is None else min(until, config.steps)
        with deterministic_mode(config.threads, on=config.deterministic):
            while self.step_done < until:
                row = self.step()
                if folder is not None and (
                    self.step_done % config.checkpoint_every == 0 or self.step_done == config.steps
                ):
                    self.save(folder)
                if progress is not None:
                    progress(self, row)

    @torch.no_grad()
    def evaluate(self, text_BS: Tensor, batch: int = 16) -> float:
        """Return the mean next-token loss in nats on a text [B, S + 1]."""
        total = 0.0
        for part in text_BS.split(batch):
            total += float(token_loss(self.model(part[:, :-1]), part[:, 1:])) * len(part)
        return total / len(text_BS)

    # --- checkpoints -------------------------------------------------------------------------------------------

    @property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must agree on to be continued."""
        return self.config.identity(self.model.spec, self.corpus.digest)

    def tensors(self) -> dict[str, Tensor]:
        """Return everything that the next step depends on."""
        weights = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        return weights | {f"adam/{name}": value for name, value in optimizer_tensors(self.optimizer).items()}

    def save(self, folder: Path) -> Path:
        """Write a checkpoint of this moment and drop the oldest beyond ``keep_checkpoints``."""
        path = checkpoint_path(Path(folder), self.step_done)
        about = {
            "identity": self.identity,
            "step": self.step_done,
            "tokens": self.tokens_seen,
            "written": time.time(),
            "history": self.history,
        }
        write_checkpoint(path, self.tensors(), about)
        prune(Path(folder), self.config.keep_checkpoints)
        return path

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint's moment."""
        split: dict[str, dict[str, Tensor]] = {"model": {}, "adam": {}}
        for name, value in checkpoint.tensors.items():
            kind, rest = name.split("/", 1)
            split[kind][rest] = value.to(self.model.device) if kind == "model" else value
        self.model.load_state_dict(split["model"])
        self.optimizer.state.clear()
        restore_optimizer(self.optimizer, split["adam"])
        about: Mapping[str, Any] = checkpoint.about
        self.step_done, self.tokens_seen = int(about["step"]), int(about["tokens"])
        self.history = list(about["history"])

    def resume(self, folder: Path) -> bool:
        """Go on from the newest readable checkpoint of ``folder``; return whether there was one.

        ``remarks`` then names each newer file that could not be read.

        Raises:
            TrainingError: checkpoints of another run, or none that can be read.
        """
        found, remarks = newest_usable(Path(folder), self.identity)
        self.remarks += remarks
        if found is None:
            return False
        if remarks:
            self.remarks.append(f"going on from {found.path} instead")
        self.restore(found)
        return True
