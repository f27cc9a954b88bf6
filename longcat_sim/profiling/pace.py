"""The pace of a shared CPU: probes that run between samples, and how each sort of op follows them.

Neighbours take a shared CPU's caches, its memory and its clock, so that it is slower in one second than in the next,
and not every op suffers alike. By which power of each probe a sort's times go is learned from the rounds of its own
points (control variates), and its medians are then given at one pace, the mean one of the file's first suite: a step is
long, and sees the mean. On 2 shared cores with busy neighbours held-out medians of 21 sorts were 10.6 % off on average,
so 7.6 %; products 6.5 and 4.3, MLA 8.2 and 5.7, prefill attention 10.1 and 6.9 (one set of samples, with and without,
2026-11-26, no command repeats it; a quiet machine has nothing to take off).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from longcat_sim.ops.op import Op
from longcat_sim.profiling.samples import Samples, merged

PRODUCTS = ((64, 256, 256), (8, 512, 1024))
"""Rows, columns and depth of the probes: the weights of one lie in a core's own cache, those of the other (2 MiB)
beyond it. Both take as long after a step as in a loop, within 2 %, once they have run before: small ops whose code
comes from memory follow the machine closer, but took 31 to 43 us by what ran before."""
EVERY = "all"
"""Where the powers stand that sorts without any of their own follow."""
WARM = 2
"""Runs before one is timed."""
MIN_FREEDOM = 8
"""Rounds beyond each point's first, below which a sort is too thin to be asked, and follows what all do. Assumed."""
TRIMMED = 0.05
"""Share of rounds at either end of which the mean pace knows nothing: the probe was interrupted. Assumed."""


class Probes:
    """Times the probes."""

    def __init__(self) -> None:
        self._pairs = [(torch.randn(m, k), torch.randn(n, k)) for m, n, k in PRODUCTS]

    def take(self) -> tuple[float, ...]:
        """Return the seconds of each probe, the same whatever ran before."""
        found = []
        for rows, weights in self._pairs:
            for _ in range(WARM):
                F.linear(rows, weights)
            start = time.perf_counter()
            F.linear(rows, weights)
            found.append(time.perf_counter() - start)
        return tuple(found)


def mean_pace(samples: Iterable[Samples]) -> tuple[float, ...]:
    """Return the mean time of each probe over all rounds but the extreme ones; nothing where none ran."""
    from scipy.stats import trim_mean

    probes = merged(samples).probes
    return tuple(float(mean) for mean in trim_mean(probes, TRIMMED, axis=0)) if probes else ()


def sensitivity(points: Iterable[Samples]) -> tuple[float, ...]:
    """Return by which power of each probe the times of the points go; nothing where there are too few rounds.

    Least squares, no power below 0, over the logs' deviations from each point's mean: sizes have no part in it.
    """
    from scipy.optimize import nnls

    times, probes, freedom = [], [], 0
    for samples in points:
        if samples.probes and len(samples.rounds) > 1:
            seconds, paces = np.log([np.median(part) for part in samples.rounds]), np.log(samples.probes)
            times.append(seconds - seconds.mean())
            probes.append(paces - paces.mean(0))
            freedom += len(seconds) - 1
    if freedom < MIN_FREEDOM:
        return ()
    return tuple(float(power) for power in nnls(np.concatenate(probes), np.concatenate(times))[0])


def sensitivities(points: Iterable[tuple[str, Samples]]) -> dict[str, tuple[float, ...]]:
    """Return the powers of each sort from its points, and under ``EVERY`` those of all."""
    sorts: dict[str, list[Samples]] = defaultdict(list)
    for sort, samples in points:
        sorts[sort].append(samples)
    powers = {sort: sensitivity(found) for sort, found in sorts.items()}
    powers[EVERY] = sensitivity(samples for found in sorts.values() for samples in found)
    return {sort: found for sort, found in powers.items() if found}


def sort_of(item: Op) -> str:
    """Return the name under which ops are taken to follow the machine alike."""
    return " ".join(filter(None, (item.kind, item.variant)))


def slowed(now_s: Sequence[float], then_s: Sequence[float], powers: Sequence[float]) -> float:
    """Return how many times as long something takes at the pace ``now_s`` as at ``then_s``; 1 where one is unknown, or
    of other probes."""
    if not len(now_s) == len(then_s) == len(powers):
        return 1.0
    return float(np.prod([(now / then) ** power for now, then, power in zip(now_s, then_s, powers, strict=True)]))


def powers_of(sort: str, sensitivity: Mapping[str, Sequence[float]]) -> Sequence[float]:
    """Return the powers of a sort: its own, or those of all."""
    return sensitivity.get(sort) or sensitivity.get(EVERY, ())


def at_pace(samples: Samples, pace_s: Sequence[float], powers: Mapping[str, Sequence[float]], sort: str) -> Samples:
    """Return the samples of a sort at one pace; as they are where nothing is known of it."""
    if not samples.probes:
        return samples
    return samples.times([slowed(pace_s, probe, powers_of(sort, powers)) for probe in samples.probes])
