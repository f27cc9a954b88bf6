"""Lightning indexers trained on the frozen language model, one per layer, and what their choice is worth.

Two stages as in DeepSeek sparse attention: KL to the head-summed attention over the whole context, then over the kept
keys only. Tested on other text: precision against per-head, group and shared exact sets, mass, and predictions.

Source: DeepSeek-V3.2-Exp report, eq. 1 to 4. Sizes and steps are ours, for a 135M model on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longcat_sim.model.layers import Rotary, rotate
from longcat_sim.model.sparse import ExactSelector, Keep, LightningIndexer, Rows, index_scores, rows_of, topk_indices
from longcat_sim.model.sparse.fidelity import attention_fidelity, retrieval_precision
from longcat_sim.model.sparse.index_training import attention_target, dense_stage_loss, sparse_stage_loss
from longcat_sim.studies.topk.smollm2 import Look, SmolLM2
from longcat_sim.studies.topk.windows import APPROXIMATE_RATIO, SHARINGS, Window

HEADS, WIDTH, ROTATED = 8, 32, 16
QUERIES = 64
"""Queries of one training step."""
EARLIEST = 128
"""First position that is trained on: near the start every key is kept."""
LEARNING_RATE = 1e-2


class LayerIndexer:
    """The indexer of one layer with its rotary table. It works on detached tensors by construction."""

    def __init__(self, model: SmolLM2, layer: int, seed: int) -> None:
        torch.manual_seed(seed)
        self.model, self.layer = model, layer
        hidden = model.embedding.shape[1]
        self.module = LightningIndexer(
            hidden_size=hidden, query_size=hidden, index_n_heads=HEADS, index_head_dim=WIDTH, qk_rope_head_dim=ROTATED
        )
        self.rope = Rotary(ROTATED, model.rope.theta)

    def scores(self, hidden_1NC: Tensor, positions_Q: Tensor) -> Tensor:
        """Return index scores [1, Q, N] of the queries at ``positions_Q``."""
        N = hidden_1NC.shape[1]
        k = self.module.keys(hidden_1NC, *self.rope.at(torch.arange(N), N))
        at = hidden_1NC[:, positions_Q]
        q = self.module.queries(at, *self.rope.at(positions_Q, N))
        return index_scores(q, k, self.module.weights(at), chunk_bytes=2**28)

    def attention_queries(self, hidden_1NC: Tensor, positions_Q: Tensor) -> Tensor:
        """Return the frozen model's own queries [1, H, Q, D] at these positions."""
        heads, width = self.model.num_heads, self.model.head_dim
        weight = self.model.layers[self.layer][1][: heads * width]
        q = F.linear(hidden_1NC[:, positions_Q], weight).unflatten(-1, (heads, width)).transpose(1, 2)
        return rotate(q, *self.model.rope.at(positions_Q, hidden_1NC.shape[1]))

    def train(self, texts: Sequence[tuple[Tensor, Tensor]], dense_steps: int, sparse_steps: int) -> dict[str, float]:
        """Train on (hidden [1, N, C], keys [1, G, N, D]) of each text; return the last losses of both stages."""
        steps = dense_steps + sparse_steps
        optimizer = torch.optim.AdamW(self.module.parameters(), lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.2)
        draws = torch.Generator().manual_seed(self.layer)
        losses: list[float] = []
        for step in range(steps):
            hidden, keys = texts[step % len(texts)]
            N = hidden.shape[1]
            positions = torch.randint(min(EARLIEST, N // 2), N, (QUERIES,), generator=draws).sort().values
            rows = _rows(positions, N)
            q = self.attention_queries(hidden, positions)
            target = attention_target(q, keys, rows, self.model.head_dim**-0.5)
            scores = self.scores(hidden, positions)
            if step < dense_steps:
                loss = dense_stage_loss(scores, target, rows)
            else:
                loss = sparse_stage_loss(scores, target, topk_indices(scores.detach()[:, None], rows)[:, 0])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        dense, sparse = losses[:dense_steps][-5:], losses[dense_steps:][-5:]
        return {
            "dense_stage_kl_nats": sum(dense) / max(1, len(dense)),
            "sparse_stage_kl_nats": sum(sparse) / max(1, len(sparse)),
        }


def _rows(positions: Tensor, keys: int, ratio: float = APPROXIMATE_RATIO) -> Rows:
    return rows_of(
        Keep(ratio=ratio), batch=1, queries=len(positions), keys=keys, positions=positions, device=positions.device
    )


def indexer_study(
    model: SmolLM2,
    training: Sequence[Tensor],
    testing: Sequence[Tensor],
    *,
    context_tokens: int,
    dense_steps: int,
    sparse_steps: int,
    ratios: Sequence[float] = (0.01, 0.05, 0.1),
) -> dict[str, Any]:
    """Train one indexer per layer on the training texts and test them on the others."""
    contexts = [model.prefill(tokens[:context_tokens], keep_hidden=True) for tokens in training]
    for context in contexts:
        context.v_L1GND.clear()  # only queries and keys are imitated
    indexers, losses = [], []
    for layer in range(model.num_layers):
        indexer = LayerIndexer(model, layer, seed=layer)
        # cloned: tensors of inference mode cannot be saved for a backward pass
        texts = [(c.hidden_L1NC[layer].clone(), c.k_L1GND[layer].clone()) for c in contexts]
        losses.append(indexer.train(texts, dense_steps, sparse_steps))
        indexers.append(indexer)
    contexts.clear()
    windows = [_test(model, indexers, tokens, context_tokens, ratios) for tokens in testing]
    return {
        "indexer": {"heads": HEADS, "width": WIDTH, "rotated": ROTATED, "parameters_per_layer":
                    sum(p.numel() for p in indexers[0].module.parameters())},
        "dense_steps": dense_steps, "sparse_steps": sparse_steps, "training_windows": len(training),
        "context_tokens": context_tokens, "losses_by_layer": losses, "windows": windows,
    }  # fmt: skip


@torch.inference_mode()
def _test(
    model: SmolLM2, indexers: Sequence[LayerIndexer], tokens: Tensor, context_tokens: int, ratios: Sequence[float]
) -> dict[str, Any]:
    window = Window(model, tokens, context_tokens, keep_hidden=True)
    past = window.context

    def choose(look: Look, rows: Rows) -> Tensor:
        hidden = torch.cat([past.hidden_L1NC[look.layer], look.hidden_1TC], 1)
        return topk_indices(indexers[look.layer].scores(hidden, look.rows.position_BQ[0])[:, None], rows)

    layers: list[dict[str, float]] = []

    def measure(look: Look) -> None:
        rows = _rows(look.rows.position_BQ[0], look.k_1GND.shape[2])
        q, k, v, scale = look.q_1HTD, look.k_1GND, look.v_1GND, look.scale
        chosen = choose(look, rows)
        exact = {sharing: ExactSelector(sharing).select(q, k, rows, scale) for sharing in SHARINGS}
        best = attention_fidelity(q, k, v, exact["all"], rows, scale)
        row = {
            f"precision_against_{sharing}": float(
                retrieval_precision(chosen, exact[sharing], model.num_heads, k.shape[2]).mean()
            )
            for sharing in SHARINGS
        }
        row["mass"] = float(attention_fidelity(q, k, v, chosen, rows, scale).mass.mean())
        row["mass_of_exact_shared"] = float(best.mass.mean())
        row["precision_of_exact_shared"] = float(best.precision.mean())
        layers.append(row)

    window.logits(measure)  # dense: every layer is measured on the dense model's own states
    return {
        "by_layer": layers,
        "settings": [
            {"family": "indexer", "ratio": ratio, "sharing": "all", "kept":
             Keep(ratio=ratio).of_context(context_tokens), **window.score(Keep(ratio=ratio), choose)}
            for ratio in ratios
        ],
    }  # fmt: skip
