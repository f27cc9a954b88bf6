"""Associative recall from scratch: does training with top-k attention help top-k decoding?

Key-value pairs, then queries that ask for the value of a key. A small model learns it densely; from there one copy
goes on with top-k attention in training (native top-k), another with dense attention for as many steps. Both are then
tested under dense and top-k attention, on the trained length and on three times as many pairs.

The model: two layers, no positions, keys mixed with those of the token before (learned per head), which lets a value
answer for its key.

Shape letters: B sequences, T tokens, C hidden width, H heads, D head width, P pairs, Q queries.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longcat_sim.model.sparse import Keep, topk_attention
from longcat_sim.model.sparse.fidelity import entropy
from longcat_sim.model.sparse.select import head_scores, probabilities

KEYS = 64
VALUES = 64
PAIRS = 16
LONGER = 48
QUERIES = 32
BATCH = 32
LEARNING_RATE = 3e-3
DECODES = (0, 8, 4, 2, 1)  # keys kept when tested; 0 is dense


class Attention(nn.Module):
    """Multi-head attention; ``keep`` is the one switch between dense and top-k, in training and after."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.shift = nn.Parameter(torch.zeros(heads, 1, 1))

    def forward(self, x_BTC: Tensor, keep: Keep | None, seen: list[Tensor] | None) -> Tensor:
        """Return the block's output; append the dense attention's entropy [B, H, T] to ``seen`` if given."""
        B, T, C = x_BTC.shape
        q, k, v = (y.view(B, T, self.heads, -1).transpose(1, 2) for y in self.qkv(x_BTC).chunk(3, dim=-1))
        share = torch.sigmoid(self.shift)
        k = (1 - share) * k + share * F.pad(k, (0, 0, 1, 0))[:, :, :T]
        if seen is not None:
            future = torch.ones(T, T, dtype=torch.bool, device=x_BTC.device).triu(1)
            scores = head_scores(q, k, q.shape[-1] ** -0.5)
            seen.append(entropy(probabilities(scores.masked_fill(future, -torch.inf))))
        y = topk_attention(q, k, v, keep or Keep(ratio=1.0))
        return self.out(y.transpose(1, 2).reshape(B, T, C))


class RecallModel(nn.Module):
    """Embedding, layers of attention and MLP, a head over the values."""

    def __init__(self, width: int = 32, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(KEYS + VALUES, width)
        self.attention = nn.ModuleList(Attention(width, heads) for _ in range(layers))
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(2 * layers + 1))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)) for _ in range(layers)
        )
        self.head = nn.Linear(width, VALUES, bias=False)

    def forward(self, tokens_BT: Tensor, keep: Keep | None = None, seen: list[Tensor] | None = None) -> Tensor:
        """Return logits over the values [B, T, VALUES]."""
        x = self.embed(tokens_BT)
        for i, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            x = x + attention(self.norms[2 * i](x), keep, seen)
            x = x + mlp(self.norms[2 * i + 1](x))
        return self.head(self.norms[-1](x))


def batch_of(generator: torch.Generator, pairs: int, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    """Return tokens [B, 2P + Q] and the value asked for by each query [B, Q]."""
    keys = torch.rand(batch, KEYS, generator=generator).argsort(-1)[:, :pairs]
    values = torch.randint(VALUES, (batch, pairs), generator=generator)
    asked = torch.randint(pairs, (batch, QUERIES), generator=generator)
    told = torch.stack([keys, values + KEYS], -1).flatten(1)
    return torch.cat([told, keys.gather(1, asked)], 1), values.gather(1, asked)


def train(model: RecallModel, generator: torch.Generator, steps: int, keep: Keep | None) -> float:
    """Train in place and return the mean loss of the last ten steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    losses = []
    for _ in range(steps):
        tokens, answers = batch_of(generator, PAIRS)
        loss = F.cross_entropy(model(tokens, keep)[:, -QUERIES:].flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-10:]) / len(losses[-10:])


@torch.inference_mode()
def accuracy(model: RecallModel, seed: int, pairs: int, kept: int, batches: int) -> float:
    """Return the share of queries answered right when ``kept`` keys are attended (0: all)."""
    generator = torch.Generator().manual_seed(seed)
    keep = Keep(count=kept) if kept else None
    right = 0.0
    for _ in range(batches):
        tokens, answers = batch_of(generator, pairs)
        right += float((model(tokens, keep)[:, -QUERIES:].argmax(-1) == answers).float().mean())
    return right / batches


@torch.inference_mode()
def attention_entropy(model: RecallModel, seed: int, pairs: int) -> float:
    """Return the mean entropy of dense attention at the queries, in nats, over layers and heads."""
    seen: list[Tensor] = []
    model(batch_of(torch.Generator().manual_seed(seed), pairs)[0], None, seen)
    return float(torch.stack(seen)[..., -QUERIES:].mean())


def recall_run(seed: int, *, dense_steps: int = 250, more_steps: int = 80, kept: int = 2, batches: int = 4) -> dict:
    """Train the three models of one seed and return accuracy by model, pairs and decode, and entropies.

    The two copies see the same batches.
    """
    torch.manual_seed(seed)
    data = torch.Generator().manual_seed(10_000 + seed)
    models = {"base": RecallModel()}
    losses = {"base": train(models["base"], data, dense_steps, None)}
    for name, keep in (("dense_control", None), ("topk_sft", Keep(count=kept))):
        models[name] = copy.deepcopy(models["base"])
        losses[name] = train(models[name], torch.Generator().manual_seed(20_000 + seed), more_steps, keep)
    test = 30_000 + seed
    result: dict[str, Any] = {"seed": seed, "kept_in_training": kept, "loss": losses, "accuracy": {}, "entropy": {}}
    for name, model in models.items():
        model.eval()
        result["accuracy"][name] = {
            str(pairs): {str(k or "dense"): accuracy(model, test, pairs, k, batches) for k in DECODES}
            for pairs in (PAIRS, LONGER)
        }
        result["entropy"][name] = {str(pairs): attention_entropy(model, test, pairs) for pairs in (PAIRS, LONGER)}
    return result
