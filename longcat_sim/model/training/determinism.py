"""A mode in which two runs give bitwise equal losses and weights.

Fixed: the library's deterministic kernels, one number of CPU threads (a sum's order depends on it), cuBLAS's
workspace, and batches drawn by counter. Source of the requirement: LongCat-Flash Technical Report, arXiv
2509.01322v2, section 5.4; of the switches: PyTorch documentation, "Reproducibility".
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.deterministic

_fills: Any = torch.utils.deterministic


@contextmanager
def deterministic_mode(threads: int = 1, *, on: bool = True) -> Iterator[None]:
    """Run the block with deterministic kernels and ``threads`` CPU threads; put everything back afterwards."""
    if not on:
        yield
        return
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        _fills.fill_uninitialized_memory,
        torch.get_num_threads(),
        torch.backends.cudnn.benchmark,
        os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    )
    try:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
        torch.use_deterministic_algorithms(True)
        # Filling fresh memory guards against reading it before it is written, which this model never does.
        _fills.fill_uninitialized_memory = False
        torch.backends.cudnn.benchmark = False
        torch.set_num_threads(threads)
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        _fills.fill_uninitialized_memory = before[2]
        torch.set_num_threads(before[3])
        torch.backends.cudnn.benchmark = before[4]
        if before[5] is None:
            os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
        else:
            os.environ["CUBLAS_WORKSPACE_CONFIG"] = before[5]
