"""Random numbers by counter: a draw depends on (seed, stream, indices), never on the order of calls."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15

# streams
ARRIVAL, INPUT, OUTPUT, CLASS, SESSION, THINK, ACCEPT, TOOL, NEW_TOKENS = range(1, 10)


def mix(value: int) -> int:
    """Return SplitMix64's output function of one 64-bit word.

    Source: Steele, Lea, Flood, OOPSLA 2014, figure 17 (variant 13 of Stafford).
    """
    value &= _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def key(seed: int, stream: int, index: int = 0) -> int:
    """Return the 64-bit key of one stream of one entity (request, session)."""
    return mix(mix(mix(seed + _GOLDEN) + stream * _GOLDEN) + index * _GOLDEN)


def uniforms(of: int, start: int, count: int) -> npt.NDArray[np.float64]:
    """Return draws ``start .. start + count - 1`` of the stream with key ``of``, in (0, 1) [count]."""
    with np.errstate(over="ignore"):
        word = np.arange(start + 1, start + count + 1, dtype=np.uint64) * np.uint64(_GOLDEN) + np.uint64(of)
        word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        word ^= word >> np.uint64(31)
    return ((word >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def generator(seed: int, stream: int, chunk: int = 0) -> np.random.Generator:
    """Return a generator for one chunk of one stream: chunks may be drawn in any order."""
    return np.random.Generator(np.random.Philox(key=[key(seed, stream), chunk]))
