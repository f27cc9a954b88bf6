"""Rows of published tables that are measuring accidents: dropped by one rule that knows no fit, and counted."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from longcat_sim.calibration.laws import LAWS
from longcat_sim.calibration.op_times import points_of
from longcat_sim.ops.op import FloatArray
from longcat_sim.records.measurement import Measurement

SLOWER = 1.5
"""A row is an accident where another that is at least as large in every size took this much less: whoever runs it could
pad to the larger one. Such rows are autotuners that fell back (mla_decode, H100: batch 8, context 4: 1,510 us between
neighbours of 13 us) or a busy machine."""
RARE = 0.05
"""Accidents are rare: where the rule meets a larger share of a table, its kernels differ by size, and all rows stay."""
MOST_CELLS = 10_000_000
STREAMING = ("gemm", "grouped_gemm", "bmm", "mla_decode", "gqa_decode")
"""Kinds that read weights or KV cache, which no step finds in the device's cache: a whole step passed since."""
FASTEST_READ = 0.95
"""Share of the memory's peak that no cold read exceeds: the best product of seven HBM GPUs reaches 0.90 to 0.94."""


def without_warm(rows: Sequence[Measurement], bandwidth: float) -> tuple[list[Measurement], dict[str, int]]:
    """Return the rows that the device's memory can have fed, and how many were dropped per kind, dtype and variant.

    Tables are made by loops over a few copies of the weights. Where the copies fit into the cache the row is faster
    than the memory (RTX PRO 6000, 128 MB of L2: up to 2.5 times, L40S: 4.5 times), and no step sees that time.
    """
    kept: list[Measurement] = []
    dropped: dict[str, int] = defaultdict(int)
    for row in rows:
        if row.op.kind in STREAMING and row.op.memory_bytes > FASTEST_READ * bandwidth * row.median_s:
            dropped[" ".join(filter(None, (row.op.kind, row.op.dtype, row.op.variant)))] += 1
        else:
            kept.append(row)
    return kept, dict(dropped)


def without_accidents(rows: Sequence[Measurement]) -> tuple[list[Measurement], dict[str, int]]:
    """Return the rows that are no accidents, and how many were dropped per kind, dtype and variant."""
    grouped: dict[tuple[str, str, str], list[Measurement]] = defaultdict(list)
    for row in rows:
        grouped[row.op.kind, row.op.dtype, row.op.variant].append(row)
    kept: list[Measurement] = []
    dropped: dict[str, int] = {}
    for key, group in grouped.items():
        accident = accidents(*points_of(key[0], group)) if key[0] in LAWS else np.zeros(len(group), bool)
        if 0 < accident.sum() <= RARE * len(group):
            dropped[" ".join(filter(None, key))] = int(accident.sum())
            group = [row for row, bad in zip(group, accident, strict=True) if not bad]
        kept += group
    return kept, dropped


def accidents(coordinates: Sequence[FloatArray], seconds: FloatArray) -> Any:
    """Return which rows [N] took ``SLOWER`` times as long as one that is at least as large in every size."""
    axes = [np.unique(axis) for axis in coordinates]
    shape = tuple(len(axis) for axis in axes)
    if np.prod(shape, dtype=float) > MOST_CELLS:
        return np.zeros(len(seconds), bool)
    cell = tuple(np.searchsorted(axis, at) for axis, at in zip(axes, coordinates, strict=True))
    fastest = np.full(shape, np.inf)
    np.minimum.at(fastest, cell, seconds)
    for axis in range(len(shape)):  # of this size and all larger ones
        fastest = np.flip(np.minimum.accumulate(np.flip(fastest, axis), axis=axis), axis)
    return seconds > SLOWER * fastest[cell]
