"""Parameter groups with the width rules, and the init that belongs to them.

Rules of "Adam LR Full Align" with s = width / proxy width: init variance and learning rate are both divided by s for
hidden and unembedding matrices; the embedding keeps its own. Source: LongCat-Flash Technical Report, arXiv
2509.01322v2, Table 1 (after Everett et al., arXiv 2407.05872). Norm gains, which the table does not name, keep the
embedding's rate.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from longcat_sim.model.longcat import LongcatFlash
from longcat_sim.model.training.config import TrainConfig

Role = Literal["embedding", "norm", "hidden", "unembedding"]


def role_of(name: str) -> Role:
    """Return what the width rule calls a parameter; the router counts as hidden (its fan-in is the width)."""
    if name.startswith("embedding."):
        return "embedding"
    if name.startswith("head."):
        return "unembedding"
    return "norm" if is_norm(name) else "hidden"


def is_norm(name: str) -> bool:
    """Return whether a parameter is the gain of a norm."""
    return "norm" in name.split(".")[-2] or "_norm." in name


def width_factor(config: TrainConfig, hidden_size: int) -> float:
    """Return s: the width over the proxy's, or 1 where no rule is asked for."""
    if config.transfer == "none" or not config.proxy_width:
        return 1.0
    return hidden_size / config.proxy_width


@torch.no_grad()
def init_for_training(model: LongcatFlash, config: TrainConfig) -> None:
    """Draw the weights of ``config.seed`` with the standard deviations of the recipe (N(0, std); norms one)."""
    model.init_weights(config.seed)
    drawn = model.spec.initializer_range
    hidden = config.hidden_std / width_factor(config, model.spec.hidden_size) ** 0.5
    for name, parameter in model.named_parameters():
        role = role_of(name)
        if role != "norm":
            parameter.mul_((config.embedding_std if role == "embedding" else hidden) / drawn)


def parameter_groups(model: nn.Module, config: TrainConfig, hidden_size: int) -> list[dict]:
    """Return optimiser groups; each has ``rate_factor``, its share of the scheduled learning rate."""
    s = width_factor(config, hidden_size)
    groups: dict[tuple[float, float], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        role = role_of(name)
        factor = 1.0 if role in ("embedding", "norm") else 1.0 / s
        decay = 0.0 if role in ("embedding", "norm") else config.weight_decay
        groups.setdefault((factor, decay), []).append((name, parameter))
    return [
        {
            "params": [p for _, p in members],
            "names": [n for n, _ in members],
            "rate_factor": factor,
            "weight_decay": decay,
        }
        for (factor, decay), members in groups.items()
    ]


def make_optimizer(model: nn.Module, config: TrainConfig, hidden_size: int) -> torch.optim.AdamW:
    """Return AdamW over ``parameter_groups``."""
    return torch.optim.AdamW(
        parameter_groups(model, config, hidden_size), lr=config.learning_rate, betas=config.betas, eps=config.epsilon,
        foreach=True,
    )  # fmt: skip


def optimizer_tensors(optimizer: torch.optim.AdamW) -> dict[str, torch.Tensor]:
    """Return the optimiser's state as flat tensors named ``<parameter>/<moment>``."""
    out = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                out[f"{name}/{key}"] = value
    return out


def restore_optimizer(optimizer: torch.optim.AdamW, tensors: dict[str, torch.Tensor]) -> None:
    """Put back what ``optimizer_tensors`` returned."""
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            kept = {key.rsplit("/", 1)[1]: value for key, value in tensors.items() if key.rsplit("/", 1)[0] == name}
            if kept:
                optimizer.state[parameter] = {key: value.clone() for key, value in kept.items()}
