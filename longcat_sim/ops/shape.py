"""``OpShape``: an op of a step graph whose sizes may be numbers or arrays, so that one graph serves many steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from longcat_sim.ops.op import KINDS, FloatArray, Op, OpArrays, OpTimesLike, item_bytes, op


@dataclass(frozen=True)
class OpShape:
    """One op of a segment; sizes are numbers, or arrays [layers, draws, ranks] that broadcast.

    ``group`` is the number of ranks that meet at a barrier when the op ends (1: none).
    """

    name: str
    kind: str
    dims: Mapping[str, Any] = field(hash=False)
    dtype: str = "bf16"
    variant: str = ""
    group: int = 1

    @property
    def is_collective(self) -> bool:
        """Whether the op moves data between ranks."""
        return KINDS[self.kind].is_collective

    def typical(self) -> Op:
        """Return the op at the mean of each size."""
        return op(
            self.kind,
            dtype=self.dtype,
            variant=self.variant,
            **{name: float(np.mean(size)) for name, size in self.dims.items()},
        )

    def seconds(self, op_times: OpTimesLike) -> FloatArray:
        """Return the time alone for every combination of sizes (the sizes' broadcast shape; () for numbers)."""
        sizes = {name: np.asarray(size, dtype=float) for name, size in self.dims.items()}
        shape = np.broadcast_shapes(*(size.shape for size in sizes.values()))
        if shape == ():
            return np.asarray(op_times.seconds(self.typical()))
        table = np.stack([np.broadcast_to(sizes[name], shape).ravel() for name in KINDS[self.kind].dims])
        # loads repeat: price each distinct op once
        distinct, where = _unique_columns(table)
        dims = dict(zip(KINDS[self.kind].dims, distinct, strict=True))
        seconds = op_times.seconds_many(OpArrays(self.kind, dims, self.dtype, self.variant))
        return np.asarray(seconds, dtype=float)[where].reshape(shape)


def _unique_columns(table: FloatArray) -> tuple[FloatArray, Any]:
    """Return (distinct columns, index of each column among them); hashing columns is faster than np.unique(axis=1)."""
    varying = [i for i, row in enumerate(table) if row.size and np.any(row != row[0])]
    if not varying:
        return table[:, :1], np.zeros(table.shape[1], dtype=int)
    key = np.zeros(table.shape[1])
    weights = np.random.default_rng(0).standard_normal(len(varying))
    for weight, i in zip(weights, varying, strict=True):
        key += weight * table[i]
    _, first, where = np.unique(key, return_index=True, return_inverse=True)
    return table[:, first], where


def message_bytes(copies: Any, hidden: int, dtype: str) -> Any:
    """Return the bytes of ``copies`` token rows on a link; block formats carry one fp32 scale per 128 values.

    Source: DeepEP README @dd758ca (7,168 fp8 values travel as 7,392 bytes).
    """
    scales = 4.0 * hidden / 128 if dtype in ("fp8", "fp4", "nvfp4") else 0.0
    return copies * (item_bytes(dtype) * hidden + scales)
