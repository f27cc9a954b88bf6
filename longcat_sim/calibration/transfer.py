"""How far a law may be off when it is carried to other hardware, another precision or another kernel variant."""

from __future__ import annotations

import math

from longcat_sim.calibration.fitted import FittedLaw
from longcat_sim.calibration.laws import Device
from longcat_sim.specs.hardware import HardwareSpec

CPU_CACHE_BYTES = 1e6
"""Cache of a device whose profile names none (assumed: one core's L2)."""
TRANSFER_ERROR: dict[str, float] = {
    "gemm": 0.20,
    "grouped_gemm": 0.19,
    "bmm": 0.94,
    "mla_decode": 0.39,
    "gqa_decode": 0.27,
    "attention_prefill": 0.11,
    "elementwise": 0.34,
    "indexer": 0.37,
    "sparse_mla": 0.45,
    "topk": 0.05,
}
"""Kind -> median |error| of predicting an unseen system from two others, the worst precision and kernel of
H100 + H200 -> B200 and A100 + H200 -> H100 (`validate --section transfer`, 2026-11-26)."""
OTHER_TRANSFER_ERROR = 0.31
"""For kinds not in the table: the middle of it."""
PRECISION_ERROR = 0.25
VARIANT_ERROR = 0.25
FEW_POINTS_ERROR = 0.12
"""Assumed: a law that answers for another precision, another kernel variant, or that rests on fewer than five sizes."""
SHEET_ERROR = 0.77
"""Standard deviation of log(measured / data-sheet roofline), kinds weighted alike: 113,207 H100 points of 15 kinds
(aiconfigurator-core 0.12.0). The median ratio there is 1.65; the point estimate stays the data sheet's."""
OTHER_MAKER_ERROR = 0.5
"""Median |error| of NVIDIA's laws on an Intel Arc Pro B60, the only other maker whose kernel times we found
(aiconfigurator-core 0.12.0, vLLM 0.20 tables): products 0.2, attention prefill 0.4, decode 0.6 to 1.1."""
ROUNDED = 0.01
"""Octaves by which data sheets of one device differ (an H800's memory: 3.35 or 3.352 TB/s). Assumed."""
NORMAL_FROM_MEDIAN = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""


def device_of(hardware: HardwareSpec, dtype: str) -> Device:
    """Return the figures of a data sheet that laws of ``dtype`` need.

    Raises:
        SpecError: the data sheet has no peak for ``dtype``.
    """
    return Device(
        hardware.peak_flop_per_s(dtype),
        hardware.memory_bandwidth,
        float(hardware.sm_count or 1),
        hardware.l2 or CPU_CACHE_BYTES,
    )


def transfer_spread(
    law: FittedLaw, device: Device, dtype: str, variant: str, *, other_cores: bool = False, other_maker: bool = False
) -> float:
    """Return the standard deviation (log) to add to a law that answers for ``device``, ``dtype`` and ``variant``.

    ``device`` is the target's data sheet at the law's own dtype. The error of a full change of generation (a factor
    of two in a peak) is scaled down for smaller changes of the same cores.
    """
    octaves = max(
        abs(math.log2(device.peak / law.reference.peak)),
        abs(math.log2(device.bandwidth / law.reference.bandwidth)),
        abs(math.log2(device.sm_count / law.reference.sm_count)),
    )
    generation = 1.0 if other_cores else min(1.0, octaves) if octaves > ROUNDED else 0.0
    parts = [generation * TRANSFER_ERROR.get(law.kind, OTHER_TRANSFER_ERROR)]
    if other_maker:
        parts.append(OTHER_MAKER_ERROR)
    if law.dtype != dtype:
        parts.append(PRECISION_ERROR)
    if not law.residuals_:
        parts.append(FEW_POINTS_ERROR)
    if law.variant not in ("", variant):
        parts.append(VARIANT_ERROR)
    return NORMAL_FROM_MEDIAN * math.hypot(*parts)
