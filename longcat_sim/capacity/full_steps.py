"""Steps of a prefill replica with prompts always waiting: what its capacity is.

Ranks wait for each other in every step, so a prompt costs what the step takes on the rank with the most tokens, or with
the longest prompt to attend to: half as much again as evenly spread prompts would, where their lengths vary by 1.5
times their mean (LongCat-Flash on 16 H800: the engine brings 25.1 prompts/s through, these steps 24.2, even ones 37.9).
"""

from __future__ import annotations

from itertools import cycle

import numpy as np

from longcat_sim.capacity.traffic import Traffic
from longcat_sim.ops.op import FloatArray
from longcat_sim.simulation.serving.ranked import fullest_ranks, rank_share
from longcat_sim.specs.serve import Scheduler

FILLING, FULL_STEPS = 32, 256
"""Steps of a queue that never ends which are not looked at, for the first hold beginnings of prompts only, and which
are: their mean is that of twice as many within 5 %, where prompts vary by 1.5 times their mean."""


def full_steps(traffic: Traffic, scheduler: Scheduler, ranks: int) -> FloatArray:
    """Return (step, its tokens, tokens and pairs of query and key of a rank that the others may wait for) of the steps
    of a prefill replica with prompts always waiting [N, 4]: first come first served, as the engine fills them."""
    budget = scheduler.max_num_batched_tokens
    most = rank_share(budget, ranks) if scheduler.chunked_prefill else budget
    limit = min(scheduler.long_prefill_token_threshold or budget, most)
    waiting = cycle(zip(traffic.inputs.astype(int).tolist(), traffic.computed.astype(int).tolist(), strict=True))
    left: list[tuple[int, int]] = []  # of each prompt under way: tokens to compute, tokens before them
    rows: list[tuple[float, ...]] = []
    for number in range(FILLING + FULL_STEPS):
        room, after = budget, []
        chunks: list[tuple[int, int]] = []
        while room > 0:
            if left:
                tokens, before = left.pop(0)
            else:
                prompt, tokens = next(waiting)
                before = prompt - tokens
            count = min(tokens, limit, room)
            if not scheduler.chunked_prefill and count < tokens and chunks:
                after.append((tokens, before))
                break
            chunks.append((count, count * before + (count * (count + 1) >> 1)))
            room -= count
            if scheduler.chunked_prefill and count < tokens:
                after.append((tokens - count, before + count))
        left = after + left
        if number >= FILLING:
            total = sum(count for count, _ in chunks)
            rows += [(number, total, *rank) for rank in fullest_ranks(chunks, ranks, most)]
    return np.array(rows, dtype=float)


def seconds_per_token(full: FloatArray, full_s: FloatArray) -> float:
    """Return the seconds of a prompt token in full steps, each as long as on the slowest rank; 0 without any."""
    if not len(full):
        return 0.0
    _, first = np.unique(full[:, 0], return_index=True)
    return float(np.maximum.reduceat(full_s, first).sum() / full[first, 1].sum())
