"""``TrainConfig``: everything that decides a run besides the model and the text, and its checks."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from longcat_sim.errors import TrainingError
from longcat_sim.specs.model import ModelSpec

BYTE_VOCABULARY = 256


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of a run. The report publishes few of these: those marked *ours* were chosen here."""

    steps: int = 600
    sequences: int = 8
    """Sequences of a batch; ours."""
    tokens: int = 128
    """Tokens of a sequence; ours."""
    seed: int = 0
    learning_rate: float = 1e-2
    """Peak, of a tensor whose width factor is 1; ours."""
    warmup_steps: int = 40
    schedule: Literal["constant", "cosine"] = "cosine"
    final_learning_rate: float = 0.1
    """Share of the peak that the cosine ends at; ours."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Not in the report; the values of DeepSeek-V3, arXiv 2412.19437v2, section 4.2."""
    epsilon: float = 1e-16
    """Source: arXiv 2509.01322v2, section 3.1.3."""
    weight_decay: float = 0.1
    """Not in the report; of matrices only. Value of DeepSeek-V3, arXiv 2412.19437v2, section 4.2."""
    clip_norm: float = 1.0
    """Not in the report; value of DeepSeek-V3, arXiv 2412.19437v2, section 4.2. 0 turns it off."""
    loss_scale: float = 1.0
    """Factor on all losses before the backward pass: shrinks the gradient's RMS as size does. For experiments."""

    proxy_width: int = 64
    """Hidden size that learning rate and init were chosen at; ours. 0: the model's own (every width factor is 1)."""
    transfer: Literal["full_align", "none"] = "full_align"
    """Rules of the width factor; ``none`` carries rate and init over unchanged."""
    embedding_std: float = 1.0
    """Init of the embedding; ours."""
    hidden_std: float = 0.1
    """Init of all other matrices at the proxy's width; ours."""

    bias_rate: float = 1.0
    """mu of Eq. 2; ours (not in the report). 0 turns the controller off."""
    bias_final: float = 0.3
    """Share of mu that is left at the last step; the report says that a decay helps, not which; ours."""
    bias_every: int = 1
    """Steps between two updates of the bias; the report advises fewer updates for small batches."""
    balance: float = 5e-4
    """alpha of the balance loss; ours, chosen so that R_g stays under 0.1."""
    balance_groups: int = 4
    """D: groups (devices) of FFN experts; ours."""
    z_loss: float = 1e-5
    """lambda of the hidden z-loss; ours ("very small" in the report)."""

    mtp_from: float = 1.0
    """Share of the run after which the MTP head is trained; 1 leaves it out."""
    mtp_weight: float = 0.3
    """Weight of its loss. Not in the report; value of DeepSeek-V3, arXiv 2412.19437v2, section 4.2."""

    deterministic: bool = False
    threads: int = 1
    """CPU threads in deterministic mode: the number is part of what is repeated."""

    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    watch_every: int = 20
    """Steps between two looks at R_g and router similarity (each costs a backward pass)."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a batch."""
        return self.sequences * self.tokens

    @property
    def mtp_step(self) -> int:
        """First step that trains the MTP head."""
        return round(self.mtp_from * self.steps)

    def replace(self, **changes: Any) -> TrainConfig:
        """Return a copy with some settings changed."""
        return replace(self, **changes)

    def learning_rate_at(self, step: int) -> float:
        """Return the rate of ``step`` (0 is the first): linear warm-up, then constant or cosine."""
        import math

        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        low = self.final_learning_rate
        return self.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))

    def bias_rate_at(self, step: int) -> float:
        """Return mu of ``step``: it falls geometrically to ``bias_final`` of its start."""
        if not self.bias_rate:
            return 0.0
        return float(self.bias_rate * self.bias_final ** (step / max(1, self.steps - 1)))

    def check(self, spec: ModelSpec) -> None:
        """Check the settings, and against ``spec``.

        Raises:
            TrainingError: all faults at once.
        """
        faults = []
        for name in ("steps", "sequences", "tokens", "balance_groups", "bias_every", "checkpoint_every", "threads",
                     "keep_checkpoints", "watch_every"):  # fmt: skip
            if getattr(self, name) < 1:
                faults.append(f"{name}: expected a whole number >= 1, such as 1; got {getattr(self, name)}")
        for name in ("learning_rate", "epsilon", "embedding_std", "hidden_std", "loss_scale", "bias_final"):
            if not getattr(self, name) > 0:
                faults.append(f"{name}: expected a number above 0; got {getattr(self, name)}")
        for name in ("bias_rate", "balance", "z_loss", "mtp_weight", "weight_decay", "clip_norm", "proxy_width",
                     "warmup_steps"):  # fmt: skip
            if not getattr(self, name) >= 0:
                faults.append(f"{name}: expected 0 (off) or more; got {getattr(self, name)}")
        if self.tokens < 4:
            faults.append(f"tokens: expected at least 4 tokens of a sequence (targets lie ahead); got {self.tokens}")
        if not 0 <= self.mtp_from <= 1:
            faults.append(f"mtp_from: expected a share of the run, 0..1; got {self.mtp_from}")
        if self.schedule not in ("constant", "cosine"):
            faults.append(f"schedule: expected constant or cosine; got {self.schedule!r}")
        if self.transfer not in ("full_align", "none"):
            faults.append(f"transfer: expected full_align or none; got {self.transfer!r}")
        if spec.layer_kind != "longcat":
            faults.append(f"model: expected a longcat_flash spec, such as longcat-tiny; got {spec.model_type}")
        elif self.balance_groups >= 1 and spec.n_routed_experts % self.balance_groups:
            faults.append(
                f"balance_groups must divide n_routed_experts: {spec.n_routed_experts} % {self.balance_groups} = "
                f"{spec.n_routed_experts % self.balance_groups}"
            )
        if spec.vocab_size < BYTE_VOCABULARY:
            faults.append(f"vocab_size: expected at least 256 (training text is bytes); got {spec.vocab_size}")
        if self.mtp_from < 1 and not spec.num_nextn_predict_layers:
            faults.append("mtp_from: expected 1 (off) for a model with num_nextn_predict_layers = 0, or a model with 1")
        if self.tokens > spec.max_position_embeddings:
            faults.append(
                f"tokens: expected at most max_position_embeddings = {spec.max_position_embeddings}; got {self.tokens}"
            )
        if faults:
            raise TrainingError(faults)

    def identity(self, spec: ModelSpec, corpus_digest: str = "") -> dict[str, Any]:
        """Return what a checkpoint must agree on to be continued: all but how often things are written and watched."""
        mine = asdict(self)
        for free in ("checkpoint_every", "keep_checkpoints"):
            mine.pop(free)
        mine["betas"] = list(self.betas)
        model = {k: v for k, v in spec.model_dump(mode="json").items() if k not in ("name", "source")}
        return {"model": model, "training": mine, "corpus": corpus_digest}


def digest(document: Any) -> str:
    """Return a short hash of a JSON document."""
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()[:16]
