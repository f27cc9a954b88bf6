"""Import measured collectives from a YAML file of records: what each row says about bytes, ranks and seconds.

``bytes`` is what one rank moves over its busier direction, as ``dispatch``, ``combine`` and the NCCL kinds count it:
copies of token rows in the low-latency mode, (token, node) pairs in the normal mode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from longcat_sim.calibration.roofline import link_passes

Row = Mapping[str, Any]
HIDDEN, TOPK = 7168, 8
FP8_ROW, BF16_ROW = 7392.0, 14336.0
"""Bytes of one token of 7,168 values: fp8 with a scale per 128, and bf16."""


@dataclass(frozen=True)
class Point:
    """One measured collective."""

    kind: str
    variant: str
    ranks: int
    bytes: float
    seconds: float
    source: str


def _distinct(nodes: float) -> float:
    """Nodes (or ranks) among the eight experts of a token with free routing."""
    return nodes * (1 - (1 - 1 / nodes) ** TOPK)


def _low_latency(tokens: float = 128, dispatch_row: float = FP8_ROW) -> Callable[[Row, str], Iterator[Point]]:
    def read(row: Row, source: str) -> Iterator[Point]:
        count = row.get("tokens_per_rank", tokens)
        for kind, names, size in (
            ("dispatch", ("dispatch_us", "disp_us"), dispatch_row),
            ("combine", ("combine_us", "comb_us"), BF16_ROW),
        ):
            us = next((row[name] for name in names if row.get(name) is not None), None)
            if us is not None:
                yield Point(kind, "low_latency", int(row["ep"]), count * TOPK * size, us * 1e-6, source)

    return read


def _normal_rate(limit_nodes: int, domain: int = 8) -> Callable[[Row, str], Iterator[Point]]:
    """Logical GB/s at 4,096 tokens per rank: (token, node) pairs, at most ``limit_nodes`` nodes per token."""

    def read(row: Row, source: str) -> Iterator[Point]:
        ranks = int(row["ep"])
        copies = 4096 * (min(ranks / domain, limit_nodes) if ranks > domain else _distinct(ranks))
        for kind, names, size in (
            ("dispatch", ("dispatch_GBps", "disp_rdma", "disp_xgmi"), FP8_ROW),
            ("combine", ("combine_GBps", "comb_rdma", "comb_xgmi"), BF16_ROW),
        ):
            rate = next((row[name] for name in names if row.get(name) is not None), None)
            if rate is not None:
                yield Point(kind, "normal", ranks, copies * size, copies * size / (rate * 1e9), source)

    return read


def _normal_sweep(row: Row, source: str) -> Iterator[Point]:
    if row["nodes"] >= 8:  # its record: congested or badly tuned, several times slower than the authors' own figure
        return
    spread = _distinct(row["nodes"]) if row["nodes"] > 1 else _distinct(row["ep"])
    copies = row["tokens_per_rank"] * spread
    for kind, prefix, size in (("dispatch", "disp", FP8_ROW), ("combine", "comb", BF16_ROW)):
        us = row[f"{prefix}_transmit_us"] + row[f"{prefix}_notify_us"]
        yield Point(kind, "normal", int(row["ep"]), copies * size, us * 1e-6, source)


def _garden(row: Row, source: str) -> Iterator[Point]:
    moved = 128 * TOPK
    yield Point("dispatch", "low_latency", int(row["ep"]), moved * FP8_ROW, row["disp_deepep_cx7"] * 1e-6, source)
    yield Point("combine", "low_latency", int(row["ep"]), moved * BF16_ROW, row["comb_deepep_cx7"] * 1e-6, source)


def _mori_ranks(row: Row) -> dict[str, Any]:
    return {**row, "ep": int(row["kernel"].removeprefix("EP").split("-")[0])}


def _on(platform: str, reader: Callable[[Row, str], Iterator[Point]]) -> Callable[[Row, str], Iterator[Point]]:
    def read(row: Row, source: str) -> Iterator[Point]:
        if str(row["platform"]).startswith(platform):
            yield from reader(_mori_ranks(row) if "kernel" in row else row, source)

    return read


def _nccl(system: str) -> Callable[[Row, str], Iterator[Point]]:
    kinds = {"alltoall": "all_to_all"}

    def read(row: Row, source: str) -> Iterator[Point]:
        if row["system"] != system:
            return
        kind, ranks = kinds.get(str(row["op"]), str(row["op"])), int(row["gpus"])
        passes = link_passes(kind) * (ranks - 1) / ranks
        sizes = {"us_le_2KB": 2048.0, "us_256KB": 262144.0, "us_2MB": 2097152.0, "us_32MB": 33554432.0}
        for name, size in sizes.items():
            yield Point(kind, "", ranks, size, row[name] * 1e-6, source)
        size = 512 * 2.0**20
        yield Point(kind, "", ranks, size, passes * size / (row["busbw_512MB"] * 1e9), source)

    return read


READERS: dict[str, dict[str, Callable[[Row, str], Iterator[Point]]]] = {
    "h800-sxm": {"deepep_v1_lowlatency_h800": _low_latency(), "deepep_v1_normal_h800": _normal_rate(4)},
    "h100-sxm": {"pplx_garden_decode_128tok": _garden, "nccl_intranode": _nccl("h100_sxm")},
    "h200-sxm": {
        "deepep_ll_h200_multinode": _low_latency(),
        "deepep_normal_h200_multinode": _normal_sweep,
        "nccl_intranode": _nccl("h200_sxm"),
    },
    "a100-sxm": {"nccl_intranode": _nccl("a100_sxm")},
    "b200-sxm": {"nccl_intranode": _nccl("b200_sxm")},
    "b300-sxm": {"nccl_intranode": _nccl("b300_sxm")},
    "gb200-nvl72": {
        "trtllm_nvlink_onesided_gb200": _low_latency(dispatch_row=BF16_ROW),
        "nccl_intranode": _nccl("gb200"),
    },
    "gb300-nvl72": {"nccl_intranode": _nccl("gb300")},
    "mi300x": {
        "mori_ep_latency": _on("MI300X", _low_latency()),
        "mori_ep": _on("MI300X", _normal_rate(8)),
    },
    "mi355x": {
        "mori_ep_latency": _on("MI355X", _low_latency()),
        "mori_ep": _on("MI355X", _normal_rate(8)),
    },
    "ascend-910c": {"ascend_deepep_lowlatency": _low_latency()},
}
"""Hardware profile -> record -> how a row is read."""


def read_points(path: Path, hardware: str) -> list[Point]:
    """Return the measured collectives of one hardware in a file of records; only ``use: calibrate`` is read."""
    records = yaml.safe_load(path.read_text(encoding="utf-8")).get("records", ())
    readers = READERS.get(hardware, {})
    points: list[Point] = []
    for record in records:
        if record["id"] in readers and record["use"] == "calibrate":
            source = f"{record['id']}: {str(record['source']).split(' (')[0]}"
            for row in record["rows"]:
                points += readers[record["id"]](dict(zip(record["columns"], row, strict=True)), source)
    return points
