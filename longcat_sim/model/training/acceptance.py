"""How often a trained MTP head's draft is accepted, on held-out text and on the model's own continuation."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longcat_sim.errors import TrainingError
from longcat_sim.model.cache import LatentCache
from longcat_sim.model.longcat import LongcatFlash
from longcat_sim.model.training.losses import mtp_logits


@dataclass(frozen=True)
class Acceptance:
    """Acceptance of the one drafted token [sequences] each: means per sequence, so that intervals can be drawn."""

    greedy: Tensor
    """Draft = arg max of the head, accepted where it is the model's own arg max; on the given text."""
    sampled: Tensor
    """Speculative sampling at temperature 1: sum min(p, q). Source: Leviathan et al., arXiv 2211.17192, Eq. 3.6."""
    generated: Tensor
    """As ``greedy``, on what the model itself writes (greedily) after a prompt: what decoding sees."""


@torch.no_grad()
def measure_acceptance(
    model: LongcatFlash, text_BS: Tensor, *, prompt_tokens: int = 32, new_tokens: int = 64
) -> Acceptance:
    """Return the acceptance on held-out text [B, S].

    Raises:
        TrainingError: a model without the MTP head.
    """
    if model.mtp is None:
        raise TrainingError("acceptance: expected a model built with mtp=True; got one without the head")
    greedy, sampled = _agreement(model, text_BS)
    written = continuation(model, text_BS[:, :prompt_tokens], new_tokens)
    generated, _ = _agreement(model, written, start=prompt_tokens - 1)
    return Acceptance(greedy, sampled, generated)


def _agreement(model: LongcatFlash, text_BS: Tensor, start: int = 0) -> tuple[Tensor, Tensor]:
    B, S = model.check_tokens(text_BS)
    hidden_BSH = model.run_layers(text_BS, model.step(B, S)).view(B, S, -1)
    target = model.head(hidden_BSH)[:, 1:]
    draft = mtp_logits(model, text_BS, hidden_BSH)
    same = (target.argmax(-1) == draft.argmax(-1)).float()[:, start:]
    overlap = torch.minimum(target.softmax(-1), draft.softmax(-1)).sum(-1)[:, start:]
    return same.mean(1), overlap.mean(1)


@torch.no_grad()
def continuation(model: LongcatFlash, prompt_BS: Tensor, new_tokens: int) -> Tensor:
    """Return the prompt and what the model writes after it, greedily, from its cache [B, S + new]."""
    B, S = prompt_BS.shape
    cache = LatentCache(model.spec, num_sequences=B, max_tokens=S + new_tokens, device=model.device, dtype=model.dtype)
    token = model.prefill(prompt_BS, cache).argmax(-1, keepdim=True)
    out = [prompt_BS, token]
    for _ in range(new_tokens - 1):
        token = model.decode(token, cache)[:, -1].argmax(-1, keepdim=True)
        out.append(token)
    return torch.cat(out, dim=1)
