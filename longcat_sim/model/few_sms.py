"""A copy by few SMs of a GPU: what the kernels of an exchange do, which leave the other SMs to the products.

Needs Triton, which the CUDA builds of torch bring along; imported only where a GPU runs it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 32768, 32
"""1,024 threads of 43 registers (ptxas, sm_90): one block fills an SM, so that no two share one."""


@triton.jit
def _copy(source, target, words, block: tl.constexpr):
    stride = tl.num_programs(0) * block
    for start in range(tl.program_id(0) * block, words, stride):
        at = start + tl.arange(0, block)
        tl.store(target + at, tl.load(source + at, mask=at < words), mask=at < words)


def copy_by_few(source: Tensor, target: Tensor, sms: int) -> None:
    """Copy ``source`` to ``target`` with one thread block on each of ``sms`` SMs, on the current stream.

    Both are contiguous, of equal size, a multiple of four bytes.
    """
    words = source.view(-1).view(torch.int32)
    _copy[(sms,)](words, target.view(-1).view(torch.int32), words.numel(), block=BLOCK, num_warps=WARPS)
