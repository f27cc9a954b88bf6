"""Where ops run and in what: tensors of small random values, and weights that rotate through a pool as layers do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count as count_from
from itertools import cycle

import torch
from torch import Tensor

POOL_BYTES = {"cpu": 256 << 20, "cuda": 4 << 30}
"""Weights are cut from a pool of this size in turn: more than a last-level cache holds, several times over where one
weight fills much of it."""
STRIDE_BYTES = 40 << 20
"""Each op starts this much further on, where the ops before it have not just read. Without it decode steps of one
sequence came out at a quarter of their time."""
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Place:
    """Where and in what to run."""

    device: torch.device
    dtype: torch.dtype

    def values(self, *shape: int) -> Tensor:
        """Return a tensor of small random values."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype).mul_(0.02)

    def copies(self, *shape: int) -> Iterator[Tensor]:
        """Return an endless turn through tensors of ``shape`` that together outgrow a cache: views of one pool."""
        size = math.prod(shape)
        pool = _pool(self.device, self.dtype, max(POOL_BYTES[self.device.type] // self.dtype.itemsize, size))
        count = max(1, len(pool) // size)
        first = next(_starts) * (STRIDE_BYTES // self.dtype.itemsize) // size
        order = [(first + at) % count for at in range(min(count, 512))]
        return cycle([pool[at * size : (at + 1) * size].view(shape) for at in order])


_starts = count_from(0)


@lru_cache(maxsize=2)
def _pool(device: torch.device, dtype: torch.dtype, size: int) -> Tensor:
    return torch.randn(size, device=device, dtype=dtype).mul_(0.02)
