"""Fit a packaged profile to published tables: its own, and where it has none, those of a device with the same die."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

from longcat_sim.calibration.answer import Key
from longcat_sim.calibration.artefacts import without_accidents, without_warm
from longcat_sim.calibration.collectives import CollectiveTimes
from longcat_sim.calibration.fitted import FittedLaw
from longcat_sim.calibration.importers import published
from longcat_sim.calibration.importers.aiconfigurator import BACKENDS, SYSTEMS, import_aiconfigurator
from longcat_sim.calibration.importers.exchange import read_points
from longcat_sim.calibration.importers.kernels import READERS, import_kernels
from longcat_sim.calibration.op_times import OpTimes
from longcat_sim.errors import MeasurementError
from longcat_sim.ops.op import Op
from longcat_sim.records.measurement import Measurement
from longcat_sim.specs.hardware import HardwareSpec

SAME_DIE = {"h800-sxm": "h100-sxm"}
"""Devices that differ only in what op times do not depend on (H800: narrower NVLink, same GH100 die and HBM)."""
COMMITTED_CELLS = 24000
"""Grid cells per law in a packaged profile: holds the tables of products whole."""

BORROWED: dict[str, Callable[[Op], bool]] = {
    # fp8 products, grouped products and the indexer have tables of their own; other kernels, other rates
    "gemm": lambda op: op.dtype != "fp8",
    "grouped_gemm": lambda op: False,
    "indexer": lambda op: False,
    # own table: 128 heads; the other head counts fill the 64-row tiles differently
    "mla_decode": lambda op: op.dtype != "bf16" or op["heads"] < 128,
    "gqa_decode": lambda op: False,
}
"""Which rows a device takes from its twin; kinds not named take all."""

NVLINK_KINDS = ("all_gather", "reduce_scatter", "all_reduce", "all_to_all")

H800_EXTRA = [
    published(
        "mla_decode", 2.0 * 128 * 2 * 128 * 8192 * 1088 / 660e12,
        "flashmla_h800_dense_decode: 660 TFLOPS where compute-bound (FlashMLA README @9241ae3); shape assumed",
        dtype="bf16", batch=128, queries=2, context=8192, heads=128, latent=512, rope=64,
    ),
    published(
        "sparse_mla", 2.0 * 128 * 2 * 128 * 2048 * 1088 / 410e12,
        "flashmla_sparse: 410 TFLOPS at batch 128, 128 heads, 2 queries, top-k 2048 (FlashMLA README @9241ae3)",
        dtype="fp8", batch=128, queries=2, selected=2048, heads=128, latent=512, rope=64,
    ),
]  # fmt: skip


def has_op_tables(name: str) -> bool:
    """Whether op times are published for a device or its twin."""
    return name in READERS or name in SYSTEMS or name in SAME_DIE


def devices_by_backend() -> list[str]:
    """Return the devices whose laws are all those of aiconfigurator-core's tables."""
    return [name for name in SYSTEMS if name not in READERS]


def engines_of(law: FittedLaw) -> set[str]:
    """Return the engines whose tables a law was fitted to."""
    return {name for name in BACKENDS for source in law.provenance if f"/{name}/" in source}


def published_measurements(
    device: HardwareSpec, kernels: str | Path | None, tables: str | Path | None, backend: str = ""
) -> tuple[list[Measurement], dict[Key, str], dict[str, int]]:
    """Return the published measurements for a profile, the laws that rest on another device only, and what was dropped.

    ``kernels`` is the YAML file of kernel records, ``tables`` the folder of aiconfigurator-core's tables, ``backend``
    the framework whose tables go before those that packaged profiles hold.

    Raises:
        MeasurementError: nothing is published for ``hardware``, or a source cannot be read.
    """
    hardware = device.name
    left_out: Counter[str] = Counter()
    own: list[Measurement] = []
    if hardware in READERS and kernels is not None:
        own += import_kernels(kernels, hardware, left_out=left_out)
        own += H800_EXTRA if hardware == "h800-sxm" else []
    if hardware in SYSTEMS:
        own += import_aiconfigurator(hardware, folder=tables, left_out=left_out, backend=backend)
    borrowed: list[Measurement] = []
    twin = SAME_DIE.get(hardware)
    if twin:
        found = import_aiconfigurator(twin, folder=tables)
        borrowed = [row for row in found if row.op.kind not in BORROWED or BORROWED[row.op.kind](row.op)]
    if not own and not borrowed:
        raise MeasurementError(f"hardware: expected one with published tables; got {hardware!r}; measure it yourself")
    mine = {(row.op.kind, row.op.dtype, row.op.variant) for row in own}
    theirs = {(row.op.kind, row.op.dtype, row.op.variant) for row in borrowed}
    rows: list[Measurement] = []
    for origin in (own, borrowed):  # rows of two devices do not judge each other
        cold, warm = without_warm(origin, device.memory_bandwidth)
        kept, dropped = without_accidents(cold)
        rows += kept
        left_out.update({f"{name}: faster than the memory": count for name, count in warm.items()})
        left_out.update({f"{name}: slower than a larger size": count for name, count in dropped.items()})
    return rows, {key: twin for key in theirs - mine if twin}, dict(sorted(left_out.items()))


def fit_published(
    hardware: HardwareSpec,
    *,
    kernels: str | Path | None = None,
    tables: str | Path | None = None,
    backend: str = "",
    max_cells: int = COMMITTED_CELLS,
    draws: int = 64,
    seed: int = 0,
) -> OpTimes:
    """Return op times of ``hardware`` fitted to published tables, with held-out error.

    Raises:
        MeasurementError: as ``published_measurements``.
    """
    rows, transferred, left_out = published_measurements(hardware, kernels, tables, backend)
    times = OpTimes.fit(rows, hardware, draws, seed, max_cells=max_cells, min_points=1)
    for key, origin in transferred.items():
        times.laws_[key].transferred_from = origin
    times.provenance = {
        "method": "published tables; a fifth, the largest and whole sizes held out for the errors",
        "left_out": left_out,
        **({"backend": backend} if backend else {}),
    }
    return times


def published_collectives(
    records: str | Path, hardware: HardwareSpec, load: Callable[[str], HardwareSpec]
) -> CollectiveTimes | None:
    """Return the collectives of one hardware from a YAML file of records; None where it has none of them.

    Tables of a single size borrow the empty message from the H200 sweep of the same kernels. Kinds without a table are
    carried over from the nearest device that has one: NVLink collectives from H100, exchanges from H200 (both with
    the same NICs). ``load`` returns a HardwareSpec by name.
    """
    own_points = read_points(Path(records), hardware.name)
    if not own_points:
        return None
    sweep = CollectiveTimes.fit(read_points(Path(records), "h200-sxm"), load("h200-sxm"))
    own = CollectiveTimes.fit(own_points, hardware, empty_from=sweep)
    if hardware.name == "h800-sxm":
        h100 = CollectiveTimes.fit(read_points(Path(records), "h100-sxm"), load("h100-sxm"), empty_from=sweep)
        own = own.with_curves(h100.carried_to(hardware, NVLINK_KINDS))
    if hardware.name in ("h800-sxm", "h100-sxm"):
        own = own.with_curves(sweep.carried_to(hardware, ("dispatch", "combine")))
    return own
