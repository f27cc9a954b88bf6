"""Links between the cards of one engine: the time of NCCL's and vLLM's collectives, from a law or from measurements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from longcat_sim.calibration.profile_tables import Curve, interpolate
from longcat_sim.errors import MeasurementError

ONE_SHOT_BYTES = 8 << 20
"""Largest message of vLLM's own all-reduce; NCCL takes the longer ones. Source: vLLM ``CustomAllreduce.max_size``."""
OPS = ("all_reduce", "all_gather", "reduce_scatter")


class Link(Protocol):
    """What an engine asks of its link."""

    def all_reduce_us(self, message_bytes: float, ranks: int) -> float:
        """Return the time of one all-reduce of a message that every rank holds."""

    def all_gather_us(self, bytes_per_rank: float, ranks: int) -> float:
        """Return the time of one all-gather of equal parts."""

    def reduce_scatter_us(self, bytes_per_rank: float, ranks: int) -> float:
        """Return the time of one reduce-scatter that leaves ``bytes_per_rank`` on each rank."""

    def exchange_us(self, message_bytes: float) -> float:
        """Return the time in which two ranks read each other's message once."""

    def gather_group_us(self, tensors: Sequence[Sequence[float]]) -> float:
        """Return all-gathers of several tensors that are issued as one group; each gives the bytes of every rank."""

    def scatter_parts_us(self, parts: Sequence[float]) -> float:
        """Return a reduce-scatter that leaves these bytes on the ranks."""


def _pace(parts: Sequence[float]) -> float:
    """Return the equal part whose ring is as long as that of unequal ones: a rank receives all parts but its own."""
    return (sum(parts) - min(parts)) / (len(parts) - 1)


@dataclass(frozen=True)
class Collective:
    """Ring algorithms over a link with one latency per hop; a group of collectives is launched, and waits, once.

    One bandwidth stands for both directions together, as where cards talk through the host bridge: unequal parts take
    the time of their mean.
    """

    bytes_per_s: float
    latency_s: float

    def ring_us(self, bytes_per_hop: float, hops: int) -> float:
        """Return the time of ``hops`` rounds that each send ``bytes_per_hop`` to the neighbour."""
        return hops * (self.latency_s + bytes_per_hop / self.bytes_per_s) * 1e6 if hops else 0.0

    def all_reduce_us(self, message_bytes: float, ranks: int) -> float:
        """Return a ring all-reduce. Source: Patarasuk and Yuan, J. Parallel Distrib. Comput. 69 (2009)."""
        return self.ring_us(message_bytes / ranks, 2 * (ranks - 1))

    def all_gather_us(self, bytes_per_rank: float, ranks: int) -> float:
        """Return a ring all-gather of equal parts."""
        return self.ring_us(bytes_per_rank, ranks - 1)

    def reduce_scatter_us(self, bytes_per_rank: float, ranks: int) -> float:
        """Return a ring reduce-scatter: as many hops of as many bytes as the all-gather."""
        return self.ring_us(bytes_per_rank, ranks - 1)

    def exchange_us(self, message_bytes: float) -> float:
        """Return one hop of the whole message."""
        return self.ring_us(message_bytes, 1)

    def gather_group_us(self, tensors: Sequence[Sequence[float]]) -> float:
        """Return one all-gather of all tensors together."""
        ranks = len(tensors[0])
        return self.all_gather_us(sum(sum(parts) for parts in tensors) / ranks, ranks)

    def scatter_parts_us(self, parts: Sequence[float]) -> float:
        """Return a reduce-scatter of the mean part."""
        return self.reduce_scatter_us(sum(parts) / len(parts), len(parts))


@dataclass(frozen=True)
class RingLaws:
    """A ring law for each collective (``collective_links`` of a deployment)."""

    laws: Mapping[str, Collective]

    def all_reduce_us(self, message_bytes: float, ranks: int) -> float:
        """Return an all-reduce by its own law."""
        return self.laws["all_reduce"].all_reduce_us(message_bytes, ranks)

    def all_gather_us(self, bytes_per_rank: float, ranks: int) -> float:
        """Return an all-gather by its own law."""
        return self.laws["all_gather"].all_gather_us(bytes_per_rank, ranks)

    def reduce_scatter_us(self, bytes_per_rank: float, ranks: int) -> float:
        """Return a reduce-scatter by its own law."""
        return self.laws["reduce_scatter"].reduce_scatter_us(bytes_per_rank, ranks)

    def exchange_us(self, message_bytes: float) -> float:
        """Return one hop of the whole message, by the all-reduce's law."""
        return self.laws["all_reduce"].exchange_us(message_bytes)

    def gather_group_us(self, tensors: Sequence[Sequence[float]]) -> float:
        """Return grouped all-gathers by their own law."""
        return self.laws["all_gather"].gather_group_us(tensors)

    def scatter_parts_us(self, parts: Sequence[float]) -> float:
        """Return a reduce-scatter by its own law."""
        return self.laws["reduce_scatter"].scatter_parts_us(parts)


@dataclass(frozen=True)
class MeasuredLink:
    """Times of collectives measured over message sizes between two ranks; straight lines between the sizes.

    With more ranks a ring makes more hops of smaller parts; the hop is the two-rank measurement of that part. Of groups
    and of unequal parts nothing was measured: collectives of a group follow one another, and the rank that receives
    most sets the pace.
    """

    curves: Mapping[str, Curve]
    """Operation -> (bytes, us): the whole message of an all-reduce, one rank's part of the others."""

    def _us(self, op: str, size: float) -> float:
        return interpolate(self.curves[op], size)

    def all_reduce_us(self, message_bytes: float, ranks: int) -> float:
        """Return an all-reduce: two hops of half a message between two ranks."""
        return (ranks - 1) * self._us("all_reduce", 2 * message_bytes / ranks) if ranks > 1 else 0.0

    def all_gather_us(self, bytes_per_rank: float, ranks: int) -> float:
        """Return an all-gather: one hop between two ranks."""
        return (ranks - 1) * self._us("all_gather", bytes_per_rank)

    def reduce_scatter_us(self, bytes_per_rank: float, ranks: int) -> float:
        """Return a reduce-scatter: one hop between two ranks."""
        return (ranks - 1) * self._us("reduce_scatter", bytes_per_rank)

    def exchange_us(self, message_bytes: float) -> float:
        """Return the all-gather of two whole messages, in which each rank reads the other's."""
        return self._us("all_gather", message_bytes)

    def gather_group_us(self, tensors: Sequence[Sequence[float]]) -> float:
        """Return the all-gathers one after another."""
        return sum(self.all_gather_us(_pace(parts), len(parts)) for parts in tensors)

    def scatter_parts_us(self, parts: Sequence[float]) -> float:
        """Return the reduce-scatter at the pace of the rank that receives most."""
        return self.reduce_scatter_us(_pace(parts), len(parts))


PCIE5_PAIR = MeasuredLink(
    {
        "all_reduce": (
            (4096, 16384, 65536, 131072, 262144, 524288, 1048576, 2097152, 4194304, 8388608, 16777216, 20971520),
            (12.7, 13.9, 14.8, 17.4, 21.7, 29.8, 41.0, 67.3, 124.9, 240.6, 471.1, 587.1),
        ),
        "all_gather": (
            (4096, 16384, 65536, 131072, 262144, 524288, 1048576, 2097152, 4194304, 8388608, 16777216, 20971520),
            (10.5, 11.9, 13.6, 16.8, 18.8, 26.9, 45.8, 76.3, 142.3, 277.4, 546.2, 682.9),
        ),
        "reduce_scatter": (
            (4096, 16384, 65536, 131072, 262144, 524288, 1048576, 2097152, 4194304, 8388608, 16777216, 20971520),
            (9.8, 11.3, 12.7, 15.6, 21.1, 29.4, 49.3, 88.4, 166.6, 324.5, 635.4, 786.5),
        ),
    }
)
"""NCCL between two cards on PCIe 5 x16 with peer-to-peer access, replayed from CUDA graphs: what a deployment gets that
says nothing of its links. Source: casys-kaist/LLMServingSim profiler/perf/RTXPRO6000/hardware.yaml @1b2cc02
(2026-09-26, NCCL alone, no engine; ACS and IOMMU off)."""


def measured_link(document: Mapping[str, Any], where: str) -> Link | None:
    """Return the link of a ``hardware.yaml``: its samples, else its fitted pair of bandwidth and latency.

    Raises:
        MeasurementError: the samples cannot be read.
    """
    interconnect = (document.get("measured") or {}).get("interconnect") or {}
    samples = interconnect.get("samples") or []
    if samples and interconnect.get("npus", 2) == 2:
        curves: dict[str, dict[float, float]] = {op: {} for op in OPS}
        try:
            for sample in samples:
                if sample["collective"] in curves:
                    curves[sample["collective"]][float(sample["bytes"])] = float(
                        sample.get("us_graphed") or sample["us"]
                    )
        except (KeyError, TypeError, ValueError) as fault:
            raise MeasurementError(
                f"{where}: measured.interconnect.samples: expected entries such as {{collective: all_reduce, bytes: "
                f"4096, us: 12.7}}; got {fault}; mend them or leave the file out"
            ) from None
        if all(len(points) > 1 for points in curves.values()):
            return MeasuredLink({op: (sorted(p), [p[size] for size in sorted(p)]) for op, p in curves.items()})
    defaults = document.get("defaults") or {}
    given = [defaults.get(key) for key in ("link_bw", "link_latency")]
    values = [entry.get("value") if isinstance(entry, Mapping) else entry for entry in given]
    return law_link(dict(zip(("link_bw", "link_latency"), values, strict=True)), -1)


def law_link(config: Mapping[str, Any], dimension: int) -> Link | None:
    """Return the link of a deployment: ``link_bw`` in GiB/s, ``link_latency`` in ns, either a list per dimension.

    Source: LLMServingSim documentation, cluster config (units, ``collective_links``).
    """

    def pick(value: Any) -> float | None:
        if isinstance(value, list):
            value = value[dimension] if value else None
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) and value >= 0 else None

    bandwidth, latency = pick(config.get("link_bw")), pick(config.get("link_latency"))
    if not bandwidth or latency is None:
        return None
    common = Collective(bandwidth * 2**30, latency / 1e9)
    own = config.get("collective_links") or {}
    if not own:
        return common
    laws = {}
    for op in OPS:
        entry = own.get(op) or {}
        laws[op] = Collective(
            (pick(entry.get("link_bw")) or bandwidth) * 2**30,
            (latency if pick(entry.get("link_latency")) is None else pick(entry.get("link_latency")) or 0.0) / 1e9,
        )
    return RingLaws(laws)
