"""Quality of sparse decoding on real text: the last tokens of a window, teacher-forced after a dense prefill.

A setting is a ratio, who shares a set, and how the set is found. Each is compared with dense attention on the same
tokens: KL and top-1 of the predictions, change of the loss, and inside each layer precision, mass and output error.

Source: arXiv 2512.03494 (full attention in prefill, top-k in decoding; precision set by hand).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longcat_sim.model.sparse import (
    BlockSelector,
    ExactSelector,
    Keep,
    Rows,
    Selector,
    Sharing,
    SyntheticSelector,
    attention_fidelity,
    logit_fidelity,
)
from longcat_sim.model.sparse.blocks import Rule
from longcat_sim.model.sparse.synthetic import Miss
from longcat_sim.studies.topk.smollm2 import Choice, Context, Look, SmolLM2

SCORED = 64
"""Tokens scored at the end of each window."""
RATIOS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
SHARINGS: tuple[Sharing, ...] = ("head", "group", "all")
PRECISIONS = (0.9, 0.8, 0.6, 0.4, 0.2)
APPROXIMATE_RATIO = 0.05
MISSES: tuple[tuple[Miss, int], ...] = (("random", 0), ("lowest", 0), ("random", 1))
"""Which members of the exact set are missed, and how many of its best never are."""
PAGE_TOKENS = 16


@dataclass(frozen=True)
class Setting:
    """One way to keep keys; ``values`` describe it in the result."""

    values: dict[str, Any]
    keep: Keep
    make: Callable[[], Selector]
    """Builds the selector anew, so that random draws repeat."""


def exact_settings(ratios: tuple[float, ...] = RATIOS) -> Iterator[Setting]:
    """Yield exact selection by ratio and sharing."""
    for ratio in ratios:
        for sharing in SHARINGS:
            yield Setting(
                {"family": "exact", "ratio": ratio, "sharing": sharing},
                Keep(ratio=ratio),
                partial(ExactSelector, sharing),
            )


def precision_settings(precisions: tuple[float, ...] = PRECISIONS) -> Iterator[Setting]:
    """Yield per-head sets with a precision, under both miss rules, and with the best key protected."""
    for precision in precisions:
        for miss, always in MISSES:
            if always and precision != 0.6:
                continue
            yield Setting(
                {"family": "precision", "ratio": APPROXIMATE_RATIO, "set_precision": precision, "miss": miss,
                 "always_keep": always},
                Keep(ratio=APPROXIMATE_RATIO),
                partial(SyntheticSelector, precision, miss, always_keep=always, seed=17),
            )  # fmt: skip


def block_settings() -> Iterator[Setting]:
    """Yield selection by page summaries."""
    rules: tuple[Rule, ...] = ("bounds", "means")
    for rule in rules:
        yield Setting(
            {"family": "blocks", "ratio": APPROXIMATE_RATIO, "rule": rule, "page_tokens": PAGE_TOKENS,
             "sharing": "group"},
            Keep(ratio=APPROXIMATE_RATIO),
            partial(BlockSelector, rule, PAGE_TOKENS, "group"),
        )  # fmt: skip


class Recorder:
    """A choice for every layer that also measures each layer's fidelity."""

    def __init__(self, keep: Keep, select: Callable[[Look, Rows], Tensor], *, is_used: bool = True) -> None:
        self.keep, self._select, self._is_used = keep, select, is_used
        self.layers: list[dict[str, Tensor]] = []
        self.violations = self.checked = 0

    def __call__(self, look: Look) -> Tensor | None:
        """Return the kept keys, or None (dense) where the choice is measured only."""
        rows = Rows(look.rows.position_BQ, self.keep.of(look.rows.position_BQ + 1))
        kept = self._select(look, rows)
        seen = attention_fidelity(look.q_1HTD, look.k_1GND, look.v_1GND, kept, rows, look.scale)
        self.layers.append({**seen.by_head(), "dropped": seen.dropped.mean((0, 2))})
        self.violations += int((seen.dropped > seen.dropped_bound + 1e-5).sum())
        self.checked += seen.dropped.numel()
        return kept if self._is_used else None

    def mean(self, name: str) -> float:
        """Return a figure's mean over layers and heads."""
        return float(torch.stack([layer[name] for layer in self.layers]).mean())


def by_selector(selector: Selector) -> Callable[[Look, Rows], Tensor]:
    """Return a choice that asks one selector in every layer."""
    return lambda look, rows: selector.select(look.q_1HTD, look.k_1GND, rows, look.scale)


class Window:
    """One window of text, prefilled: ``score`` any setting against dense attention."""

    def __init__(self, model: SmolLM2, tokens: Tensor, context_tokens: int, *, keep_hidden: bool = False) -> None:
        self.model = model
        self.inputs = tokens[context_tokens - SCORED : context_tokens]
        self.targets = tokens[context_tokens - SCORED + 1 : context_tokens + 1]
        self.context: Context = model.prefill(tokens[: context_tokens - SCORED], keep_hidden=keep_hidden)
        self.dense_logits = model.continue_with(self.inputs, self.context)
        self.dense_nll = float(F.cross_entropy(self.dense_logits, self.targets))

    def logits(self, choose: Choice) -> Tensor:
        """Return the predictions under a choice."""
        return self.model.continue_with(self.inputs, self.context, choose)

    def score(self, keep: Keep, select: Callable[[Look, Rows], Tensor]) -> dict[str, float]:
        """Return the figures of one choice on this window."""
        recorder = Recorder(keep, select)
        logits = self.logits(recorder)
        close = logit_fidelity(logits, self.dense_logits)
        return {
            "kl_nats": float(close.kl.mean()),
            "nll_change_nats": float(F.cross_entropy(logits, self.targets)) - self.dense_nll,
            "top1_same": float(close.top1_same.float().mean()),
            **{name: recorder.mean(name) for name in ("mass", "output_error", "precision", "entropy")},
        }


def score_window(
    model: SmolLM2, tokens: Tensor, context_tokens: int, settings: list[Setting], *, heads: bool = False
) -> dict[str, Any]:
    """Return the figures of every setting on one window, and the dense attention of each head if asked for."""
    window = Window(model, tokens, context_tokens)
    result: dict[str, Any] = {
        "context_tokens": context_tokens,
        "dense_nll_nats": window.dense_nll,
        "settings": [
            {**s.values, "kept": s.keep.of_context(context_tokens), **window.score(s.keep, by_selector(s.make()))}
            for s in settings
        ],
    }
    if heads:
        keep = Keep(ratio=APPROXIMATE_RATIO)
        recorder = Recorder(keep, by_selector(ExactSelector()), is_used=False)
        window.logits(recorder)
        result["heads"] = {
            "kept": keep.of_context(context_tokens),
            "entropy_nats": [layer["entropy"].tolist() for layer in recorder.layers],
            "dropped": [layer["dropped"].tolist() for layer in recorder.layers],
            "bound_violations": recorder.violations,
            "rows_checked": recorder.checked,
        }
    return result
