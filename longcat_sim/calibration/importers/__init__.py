"""Read measurements that others published: tables in YAML, and the parquet tables of ``aiconfigurator-core``."""

from __future__ import annotations

from longcat_sim.ops.op import op
from longcat_sim.records.measurement import Measurement


def published(kind: str, seconds: float, source: str, *, dtype: str, variant: str = "", **dims: float) -> Measurement:
    """Return a published time as a measurement; tables give one figure per point, so the spread is 0."""
    return Measurement(
        op=op(kind, dtype=dtype, variant=variant, **dims),
        median_s=seconds,
        p10_s=seconds,
        p90_s=seconds,
        count=1,
        suite="table",
        source=source,
    )
