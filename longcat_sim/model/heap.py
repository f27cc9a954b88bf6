"""The process keeps the memory it frees, as a GPU's caching allocator does.

The C library maps every large tensor afresh and gives it back when it is freed, until it has learned better,
and the first touch of each page is then a fault: prefill attention of 8 x 128 tokens took 2.2 times its usual time in
the first round of a profile, and a step's time hung on what had run before it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4
"""Parameters of glibc's ``mallopt``. Source: malloc.h."""
NEVER, DEFAULT_MMAPS = 2**31 - 1, 65536
LEARNED_MMAP_BYTES, LEARNED_TRIM_BYTES = 32 << 20, 64 << 20
"""The largest threshold; glibc's default; and what its thresholds grow to in a process that frees large arrays, which
they do no longer once they were set: left at 128 KiB, each 4 MiB array afterwards took 40 times as long. Source:
mallopt(3)."""


def keep_freed_memory() -> bool:
    """Let this process keep what its main thread frees; return whether its C library can (glibc)."""
    return _set(M_MMAP_MAX, 0) and _set(M_TRIM_THRESHOLD, NEVER)


_blocks = 0
"""How many ``freed_memory_kept`` are open, one inside the other."""


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep what is freed inside; at the end give it back and let the C library do as it would."""
    global _blocks
    kept = keep_freed_memory()
    _blocks += 1
    try:
        yield
    finally:
        _blocks -= 1
        if kept and not _blocks:
            _set(M_MMAP_MAX, DEFAULT_MMAPS)
            _set(M_MMAP_THRESHOLD, LEARNED_MMAP_BYTES)
            _set(M_TRIM_THRESHOLD, LEARNED_TRIM_BYTES)
            ctypes.CDLL(None).malloc_trim(0)


def _set(parameter: int, value: int) -> bool:
    try:
        return bool(ctypes.CDLL(None).mallopt(parameter, value))
    except (AttributeError, OSError, TypeError):  # another C library
        return False
