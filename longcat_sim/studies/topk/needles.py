"""Needles: a number hidden in a page of documentation and asked for, dozens of times.

The answer is right if greedy decoding would give every one of its tokens, which one teacher-forced pass tells.

Source: the needle-in-a-haystack tasks that arXiv 2512.03494 takes from HELMET, much shortened.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from longcat_sim.model.sparse import ExactSelector, Keep, Rows
from longcat_sim.studies.topk.smollm2 import Choice, Look, SmolLM2

CITIES = (
    "Paris", "Berlin", "Madrid", "Rome", "Vienna", "Oslo", "Dublin", "Lisbon", "Athens", "Prague", "Warsaw", "Cairo",
    "Tokyo", "Seoul", "Delhi", "Lima", "Boston", "Denver", "Sydney", "Geneva",
)  # fmt: skip
SETTINGS: tuple[tuple[str, float], ...] = (
    ("dense", 1.0), ("head", 0.1), ("head", 0.05), ("head", 0.02), ("head", 0.01), ("all", 0.05), ("all", 0.01),
)  # fmt: skip
ANSWER_DIGITS = 5


def _choice(sharing: str, ratio: float) -> Choice | None:
    if sharing == "dense":
        return None
    keep, selector = Keep(ratio=ratio), ExactSelector(sharing)  # type: ignore[arg-type]

    def choose(look: Look) -> Tensor:
        rows = Rows(look.rows.position_BQ, keep.of(look.rows.position_BQ + 1))
        return selector.select(look.q_1HTD, look.k_1GND, rows, look.scale)

    return choose


def needle_prompt(model: SmolLM2, haystack: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return the prompt's tokens, up to the answer, and the answer's tokens."""
    draw = random.Random(seed)
    city, number = draw.choice(CITIES), str(draw.randrange(10 ** (ANSWER_DIGITS - 1), 10**ANSWER_DIGITS))
    at = int(len(haystack) * draw.uniform(0.05, 0.95))
    ask = f"What is the secret number for {city} mentioned in the text above?"
    opening = model.encode("<|im_start|>user\n")
    needle = model.encode(f"\n\nThe secret number for {city} is {number}.\n\n")
    closing = model.encode(f"\n\n{ask}<|im_end|>\n<|im_start|>assistant\nThe secret number for {city} is")
    answer = model.encode(f" {number}")
    return torch.cat([opening, haystack[:at], needle, haystack[at:], closing]), answer


@torch.inference_mode()
def needle_study(model: SmolLM2, text: Tensor, seeds: range, haystack_tokens: int) -> list[dict[str, Any]]:
    """Return, for each needle, the prompt's length and whether each setting finds it."""
    found = []
    for seed in seeds:
        start = random.Random(10_000 + seed).randrange(len(text) - haystack_tokens)
        prompt, answer = needle_prompt(model, text[start : start + haystack_tokens], seed)
        context = model.prefill(prompt[:-1])
        feed = torch.cat([prompt[-1:], answer[:-1]])
        right = {}
        for sharing, ratio in SETTINGS:
            logits = model.continue_with(feed, context, _choice(sharing, ratio))
            right[f"{sharing} {ratio:g}"] = bool((logits.argmax(-1) == answer).all())
        found.append({"seed": seed, "prompt_tokens": len(prompt), "right": right})
    return found
