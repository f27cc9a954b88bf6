"""``Roofline``: op times from a data sheet alone, with the efficiencies that analytic tools assume."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from longcat_sim.errors import SpecError, UnmeasuredOpError
from longcat_sim.ops.op import KINDS, FloatArray, Op, OpArrays, ResourceShares, Tag
from longcat_sim.specs.hardware import HardwareSpec, Link, ScaleUp

COMPUTE_EFFICIENCY = 0.8
MEMORY_EFFICIENCY = 0.8
LINK_EFFICIENCY = 0.8
"""Source: defaults of two public analytic tools, alibaba/InferSim hardware/gpu.py @f2293da (hbm, nvlink and rdma
0.8) and NVIDIA aiconfigurator-core 0.12.0 systems/*.yaml (memory 0.8). Unofficial corrections there, unmeasured."""
KERNEL_FLOOR_S = 3e-6
"""Fixed time of one kernel. Source: aiconfigurator-core 0.12.0 h100_sxm.yaml, mem_empirical_constant_latency."""
COLLECTIVE_FLOOR_S = 10e-6
"""Start of a transfer where a link's profile has no latency. Source: as above, p2p_latency."""


@dataclass(frozen=True)
class Roofline:
    """Times from the data sheet: a floor plus the slower of FLOP over peak and bytes over bandwidth.

    Every figure it gives is tagged ``datasheet``: nobody measured it.
    """

    hardware: HardwareSpec
    compute_efficiency: float = COMPUTE_EFFICIENCY
    memory_efficiency: float = MEMORY_EFFICIENCY
    link_efficiency: float = LINK_EFFICIENCY
    kernel_floor_s: float = KERNEL_FLOOR_S

    def seconds(self, op: Op) -> float:
        """Return the time of one op, alone on the device.

        Raises:
            UnmeasuredOpError: the data sheet lacks the peak or the link that the op needs.
        """
        return _roofline_seconds(_Key(self), op)

    def seconds_many(self, ops: OpArrays) -> FloatArray:
        """Return the times of many ops of one kind [N].

        Raises:
            UnmeasuredOpError: as ``seconds``.
        """
        if KINDS[ops.kind].is_collective:
            return self._collective(ops.kind, ops.dims["message_bytes"], ops.dims["ranks"])
        if ops.kind == "host":
            return np.zeros(len(ops))  # hidden: the engines that we model schedule ahead (arXiv 2509.01322v2, 6.2.1)
        compute = ops.flop / (self._peak(ops.kind, ops.dtype) * self.compute_efficiency)
        memory = ops.memory_bytes / (self.hardware.memory_bandwidth * self.memory_efficiency)
        return np.where(ops.memory_bytes > 0, self.kernel_floor_s, 0.0) + np.maximum(compute, memory)

    def demand(self, op: Op) -> ResourceShares:
        """Return what the op uses of the matrix units, memory and links while it runs alone."""
        seconds = self.seconds(op)
        if seconds <= 0:
            return ResourceShares()
        if op.is_collective:
            memory = min(1.0, op.memory_bytes / (self.hardware.memory_bandwidth * seconds))
            return self.links_demand(op, seconds)._replace(memory=memory)
        compute = op.flop / (self._peak(op.kind, op.dtype) * self.compute_efficiency)
        memory = op.memory_bytes / (self.hardware.memory_bandwidth * self.memory_efficiency)
        return ResourceShares(sm=min(1.0, compute / seconds), memory=min(1.0, memory / seconds))

    def links_demand(self, op: Op, seconds: float) -> ResourceShares:
        """Return what a collective that takes ``seconds`` alone uses of each link: the bytes that cross it over those
        that could."""
        moved = link_passes(op.kind) * op.message_bytes / seconds
        inside, outside = link_shares(op["ranks"], self.hardware)
        return ResourceShares(
            scale_up=min(1.0, moved * inside / self._rate(self.hardware.scale_up)),
            scale_out=min(1.0, moved * outside / self._rate(self.hardware.scale_out)),
        )

    def tag(self, op: Op) -> Tag:
        """Return ``datasheet``."""
        return "datasheet"

    def _peak(self, kind: str, dtype: str) -> float:
        try:
            return self.hardware.peak_flop_per_s(dtype)
        except SpecError as error:
            raise UnmeasuredOpError(
                f"hardware {self.hardware.name}: {kind} in {dtype}: neither measured nor in the data sheet; {error}"
            ) from None

    @staticmethod
    def _rate(link: Link | None) -> float:
        return math.inf if link is None else link.bandwidth

    def _collective(self, kind: str, message_bytes: FloatArray, ranks: FloatArray) -> FloatArray:
        """Return latency plus bytes over the busiest link [N].

        An all-reduce moves its bytes twice (reduce-scatter, then all-gather).
        """
        up, out = self.hardware.scale_up, self.hardware.scale_out
        times = []
        for size, group in zip(np.atleast_1d(message_bytes), np.atleast_1d(ranks), strict=True):
            inside, outside = link_shares(float(group), self.hardware)
            if kind == "send":
                inside, outside = (1.0, 0.0) if group <= self.hardware.domain_size and up else (0.0, 1.0)
            missing = [name for name, share, link in (("scale_up", inside, up), ("scale_out", outside, out))
                       if share > 0 and link is None]  # fmt: skip
            if missing:
                raise UnmeasuredOpError(
                    f"hardware {self.hardware.name}: {kind} over {group:g} ranks: expected {missing[0]} in the data "
                    f"sheet, such as {missing[0]}: {{bandwidth: 50 GB/s, latency: 5 us}}; it is missing; add it, or "
                    "use fewer ranks"
                )
            passes = link_passes(kind)
            spent = [
                (link.latency or COLLECTIVE_FLOOR_S) + passes * share * size / (link.bandwidth * self.link_efficiency)
                for share, link in ((inside, up), (outside, out))
                if share > 0 and isinstance(link, Link | ScaleUp)
            ]
            times.append(max(spent, default=0.0))
        return np.array(times)


def link_passes(kind: str) -> float:
    """Return how often a collective's bytes cross its links: an all-reduce is a reduce-scatter, then an all-gather."""
    return 2.0 if kind == "all_reduce" else 1.0


def link_shares(ranks: float, hardware: HardwareSpec) -> tuple[float, float]:
    """Return the shares of a message over ``ranks`` that stay in the scale-up domain and that leave it; what a rank
    sends to itself is in neither."""
    domain = hardware.domain_size
    if ranks <= 1:
        return 0.0, 0.0
    inside = min(ranks, domain)
    return (inside - 1) / ranks, (ranks - inside) / ranks


class _Key:
    """Hashable by identity, so that a frozen data sheet with dictionaries can key a cache."""

    __slots__ = ("roofline",)

    def __init__(self, roofline: Roofline) -> None:
        self.roofline = roofline

    def __hash__(self) -> int:
        return id(self.roofline)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and other.roofline is self.roofline


@lru_cache(maxsize=65536)
def _roofline_seconds(key: _Key, op: Op) -> float:
    arrays = {name: np.array([size]) for name, size in op.dims.items()}
    return float(key.roofline.seconds_many(OpArrays(op.kind, arrays, op.dtype, op.variant))[0])
