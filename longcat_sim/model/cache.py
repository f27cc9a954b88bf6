"""``LatentCache``: the paged cache of MLA latents and rotated rope keys; nothing else is kept per token.

One pool [attention blocks, pages, page tokens, C + R]; a page table per sequence. Pages of a sequence that was reserved
at once lie side by side, and a batch of such sequences is then read in place, without gathering.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from longcat_sim.errors import ModelError
from longcat_sim.specs.model import ModelSpec

READ_MULTIPLE = 8
"""A GPU's products need rows of 16 bytes: an H100's decode step of 128 sequences over 1,001 positions took 3.4 ms
before this, and takes 2.9 (``validate --section gpu-campaign``)."""


@dataclass(frozen=True)
class CachePlan:
    """Where one pass writes and reads, worked out once and shared by all its attention blocks."""

    slots: tuple[int, ...]
    write_T: Tensor
    """Row of the flattened pool for each new token."""
    longest: int
    """Positions of the longest sequence after the write."""
    readable: int
    """Positions that a read returns: ``longest``, on a GPU rounded up within the pages (``READ_MULTIPLE``)."""
    lengths: tuple[int, ...]
    """Positions of each sequence after the write."""
    first_page: int
    page_stride: int
    """Pages from one sequence to the next where the batch can be read in place, else -1."""
    pages_BP: Tensor | None
    """Page table, where it cannot."""


class LatentCache:
    """Latents of ``num_sequences`` sequences in ``num_blocks`` pages of ``block_tokens`` tokens."""

    def __init__(
        self,
        spec: ModelSpec,
        *,
        num_sequences: int,
        max_tokens: int | None = None,
        num_blocks: int | None = None,
        block_tokens: int = 64,
        mtp: bool = False,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Allocate the pool: ``max_tokens`` reserved for each sequence, or ``num_blocks`` pages taken on demand.

        Raises:
            ModelError: neither or both of ``max_tokens`` and ``num_blocks``, or a size below 1.
        """
        if (max_tokens is None) == (num_blocks is None):
            raise ModelError("cache: expected one of max_tokens (per sequence) and num_blocks; got both or neither")
        if num_blocks is None:
            num_blocks = num_sequences * math.ceil((max_tokens or 0) / block_tokens)
        for name, value in (("num_sequences", num_sequences), ("block_tokens", block_tokens), ("size", num_blocks)):
            if value < 1:
                raise ModelError(f"cache: {name}: expected at least 1; got {value}")
        self.block_tokens, self.num_blocks = block_tokens, num_blocks
        self.num_sublayers = spec.num_attention_sublayers + (spec.num_nextn_predict_layers if mtp else 0)
        self.width = spec.kv_values_per_token()
        self.pool = torch.zeros(self.num_sublayers, num_blocks, block_tokens, self.width, device=device, dtype=dtype)
        self.lengths: list[int] = [0] * num_sequences
        self._pages: list[list[int]] = [[] for _ in range(num_sequences)]
        self._free = list(range(num_blocks))
        if max_tokens is not None:
            for slot in range(num_sequences):
                self.reserve(slot, max_tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of the pool."""
        return self.pool.nbytes

    @property
    def free_tokens(self) -> int:
        """Tokens that the free pages can take."""
        return len(self._free) * self.block_tokens

    def reserve(self, slot: int, tokens: int) -> None:
        """Give sequence ``slot`` pages for ``tokens`` positions in all, side by side where possible.

        Raises:
            ModelError: no such sequence, or too few free pages.
        """
        if not 0 <= slot < len(self._pages):
            raise ModelError(f"cache: sequence: expected 0..{len(self._pages) - 1}; got {slot}")
        pages = self._pages[slot]
        missing = math.ceil(tokens / self.block_tokens) - len(pages)
        if missing <= 0:
            return
        if missing > len(self._free):
            raise ModelError(
                f"cache full: sequence {slot} with {self.lengths[slot]} tokens needs {missing} more blocks of "
                f"{self.block_tokens} tokens for {tokens}; {len(self._free)} of {self.num_blocks} are free; "
                "release sequences or build the cache larger"
            )
        start = self._run_of(missing, after=pages[-1] if pages else None)
        taken = self._free[start : start + missing]
        del self._free[start : start + missing]
        pages.extend(taken)

    def _run_of(self, count: int, after: int | None) -> int:
        """Return the index in the free list of ``count`` pages that lie side by side, else of any."""
        free = self._free
        if after is not None and after + 1 in free:
            at = free.index(after + 1)
            if at + count <= len(free) and free[at + count - 1] == after + count:
                return at
        for at in range(len(free) - count + 1):
            if free[at + count - 1] - free[at] == count - 1:
                return at
        return 0

    def truncate(self, slot: int, length: int) -> None:
        """Forget the positions of ``slot`` from ``length`` on; its pages stay reserved."""
        if not 0 <= length <= self.lengths[slot]:
            raise ModelError(f"cache: length: expected 0..{self.lengths[slot]} for sequence {slot}; got {length}")
        self.lengths[slot] = length

    def release(self, slot: int) -> None:
        """Forget sequence ``slot`` and free its pages."""
        self._free = sorted(self._free + self._pages[slot])
        self._pages[slot], self.lengths[slot] = [], 0

    def extend(self, slots: Sequence[int], tokens: int) -> CachePlan:
        """Grow each of ``slots`` by ``tokens`` positions and return where to write and read.

        Raises:
            ModelError: the cache is full (nothing is grown then).
        """
        for slot in slots:
            self.reserve(slot, self.lengths[slot] + tokens)
        rows = [
            self._pages[slot][at // self.block_tokens] * self.block_tokens + at % self.block_tokens
            for slot in slots
            for at in range(self.lengths[slot], self.lengths[slot] + tokens)
        ]
        for slot in slots:
            self.lengths[slot] += tokens
        return self._plan(slots, rows)

    def at_end(self, slots: Sequence[int], tokens: int) -> CachePlan:
        """Return where the last ``tokens`` positions of ``slots`` lie, without growing."""
        rows = [
            self._pages[slot][at // self.block_tokens] * self.block_tokens + at % self.block_tokens
            for slot in slots
            for at in range(self.lengths[slot] - tokens, self.lengths[slot])
        ]
        return self._plan(slots, rows)

    def _plan(self, slots: Sequence[int], rows: list[int]) -> CachePlan:
        device = self.pool.device
        lengths = tuple(self.lengths[slot] for slot in slots)
        longest = max(lengths)
        count = math.ceil(longest / self.block_tokens)
        firsts = [self._pages[slot][0] for slot in slots]
        stride = firsts[1] - firsts[0] if len(firsts) > 1 else count
        in_place = (
            stride > 0
            and all(b - a == stride for a, b in pairwise(firsts))
            and all(
                page == pages[0] + i for pages in map(self._pages.__getitem__, slots) for i, page in enumerate(pages)
            )
            and firsts[-1] + count <= self.num_blocks
        )
        table = None
        if not in_place:
            padded = [(self._pages[slot] + [0] * count)[:count] for slot in slots]
            table = torch.tensor(padded, device=device)
        write = torch.tensor(rows, device=device)
        readable = longest
        if device.type != "cpu":
            readable = min(math.ceil(longest / READ_MULTIPLE) * READ_MULTIPLE, count * self.block_tokens)
        return CachePlan(tuple(slots), write, longest, readable, lengths, firsts[0], stride if in_place else -1, table)

    def write(self, sublayer: int, plan: CachePlan, latent_TD: Tensor) -> None:
        """Store the new tokens' latents [T, C + R]."""
        self.pool[sublayer].view(-1, self.width).index_copy_(0, plan.write_T, latent_TD.to(self.pool.dtype))

    def read(self, sublayer: int, plan: CachePlan) -> Tensor:
        """Return the latents of the plan's sequences [B, L, C + R]; rows beyond a sequence's length are undefined."""
        pool = self.pool[sublayer]
        page = self.block_tokens * self.width
        if plan.pages_BP is None:
            return pool.as_strided(
                (len(plan.slots), plan.readable, self.width),
                (plan.page_stride * page, self.width, 1),
                pool.storage_offset() + plan.first_page * page,
            )
        return pool[plan.pages_BP].view(len(plan.slots), -1, self.width)[:, : plan.readable]
