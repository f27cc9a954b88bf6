"""Import measured kernel tables from a YAML file of records (``id``, ``columns``, ``rows``, ``source``, ``use``).

Only records with ``use: calibrate`` are read. Each reader states how a row becomes an op.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from longcat_sim.calibration.importers import published
from longcat_sim.errors import MeasurementError
from longcat_sim.records.measurement import Measurement

Row = Mapping[str, Any]
FP8_PEAK = 1979e12
"""Peak to which the tables' MFU refers (H800 FP8). Source: the same tables' conditions."""
LATENT, ROPE = 512, 64
DSA_TOPK = 2048


def _gemm_latency(row: Row, source: str) -> Iterator[Measurement]:
    yield published(
        "gemm", row["latency_us"] * 1e-6, source, dtype="fp8", m=row["m"], n=row["n"], k=row["k"]
    )  # fmt: skip


def _gemm_rate(row: Row, source: str) -> Iterator[Measurement]:
    seconds = 2.0 * row["m"] * row["n"] * row["k"] / (row["TFLOPS"] * 1e12)
    yield published("gemm", seconds, source, dtype="fp8", m=row["m"], n=row["n"], k=row["k"])


def _grouped_rate(variant: str) -> Callable[[Row, str], Iterator[Measurement]]:
    def read(row: Row, source: str) -> Iterator[Measurement]:
        m = row["groups"] * row["m_per_group"]
        seconds = 2.0 * m * row["n"] * row["k"] / (row["TFLOPS"] * 1e12)
        yield published(
            "grouped_gemm", seconds, source, dtype="fp8", variant=variant, groups=row["groups"], m=m,
            n=row["n"], k=row["k"],
        )  # fmt: skip

    return read


def _grouped_experts(variant: str) -> Callable[[Row, str], Iterator[Measurement]]:
    """DeepSeek-V3 experts (7168 x 2048): gate and up in one product, then down.

    The number of rows follows from the table's MFU: the masked benchmark draws each expert's rows at random. At one
    token per expert half of the experts draw none (the time shows that half of the weights are read).
    """

    def read(row: Row, source: str) -> Iterator[Measurement]:
        experts = row["num_local_experts"]
        for prefix, n, k in (("up", 4096, 7168), ("down", 7168, 2048)):
            seconds = row[f"{prefix}_proj_us"] * 1e-6
            rows = row[f"{prefix}_mfu"] * FP8_PEAK * seconds / (2.0 * n * k)
            groups = min(experts, round(rows)) if row["tokens_per_expert"] <= 1 else experts
            yield published(
                "grouped_gemm", seconds, source, dtype="fp8", variant=variant, groups=groups, m=rows, n=n, k=k
            )

    return read


def _mla_decode(row: Row, source: str) -> Iterator[Measurement]:
    yield published(
        "mla_decode", row["latency_us"] * 1e-6, source, dtype="bf16", batch=row["batch_size"], queries=1,
        context=row["kv_len"], heads=128, latent=LATENT, rope=ROPE,
    )  # fmt: skip


def _mla_prefill(row: Row, source: str) -> Iterator[Measurement]:
    yield published(
        "attention_prefill", row["latency_us"] * 1e-6, source, dtype="bf16", batch=1, queries=row["seq_len"],
        context=row["seq_len"], heads=128, kv_heads=128, qk_dim=192, v_dim=128,
    )  # fmt: skip


def _indexer_decode(row: Row, source: str) -> Iterator[Measurement]:
    yield published(
        "indexer", row["latency_us"] * 1e-6, source, dtype="fp8", batch=row["batchsize"], queries=row["next_n"],
        context=row["s_kv"] - (row["next_n"] - 1) / 2, heads=64, dim=128,
    )  # fmt: skip


def _indexer_prefill(row: Row, source: str) -> Iterator[Measurement]:
    yield published(
        "indexer", row["latency_us"] * 1e-6, source, dtype="fp8", batch=1, queries=row["s_q"],
        context=row["s_kv"] - (row["s_q"] - 1) / 2, heads=64, dim=128,
    )  # fmt: skip


def _sparse_decode(row: Row, source: str) -> Iterator[Measurement]:
    if row["kv_len"] >= DSA_TOPK:
        yield published(
            "sparse_mla", row["latency_us"] * 1e-6, source, dtype="fp8", batch=row["batch_size"], queries=1,
            selected=DSA_TOPK, heads=128, latent=LATENT, rope=ROPE,
        )  # fmt: skip


def _sparse_prefill(row: Row, source: str) -> Iterator[Measurement]:
    yield published(
        "sparse_mla", row["latency_us"] * 1e-6, source, dtype="bf16", batch=1, queries=row["s_q"], selected=DSA_TOPK,
        heads=128, latent=LATENT, rope=ROPE,
    )  # fmt: skip


READERS: dict[str, dict[str, Callable[[Row, str], Iterator[Measurement]]]] = {
    "h800-sxm": {
        "infersim_gemm_h800": _gemm_latency,
        "deepgemm_dense_h800": _gemm_rate,
        "infersim_grouped_gemm_decode_h800": _grouped_experts("masked"),
        "deepgemm_grouped_masked_h800": _grouped_rate("masked"),
        "infersim_grouped_gemm_prefill_h800": _grouped_experts("contiguous"),
        "deepgemm_grouped_contiguous_h800": _grouped_rate("contiguous"),
        "infersim_mla_decode_h800": _mla_decode,
        "infersim_mla_prefill_h800": _mla_prefill,
        "infersim_dsa_decode_logits_h800": _indexer_decode,
        "infersim_dsa_prefill_logits_h800": _indexer_prefill,
        "infersim_dsa_decode_attn_h800": _sparse_decode,
        "infersim_dsa_prefill_attn_h800": _sparse_prefill,
    },
    "h20": {"infersim_mla_decode_h20": _mla_decode},
}
"""Profile name -> record id -> reader."""


def import_kernels(path: str | Path, hardware: str, *, left_out: Counter[str] | None = None) -> list[Measurement]:
    """Return the measurements of ``hardware`` in a YAML file of kernel records: one origin per kind, dtype and variant.

    Where two origins measured a kind, the one with more rows is kept, for they differ more than sizes do (products in
    fp8 on H800, 64 x 4096 x 7168: 18.3 us where InferSim timed them, 13.1 us in DeepGEMM's own table); ``left_out``
    counts the rows of the other.

    Raises:
        MeasurementError: the file cannot be read, holds nothing for ``hardware``, or a row lacks a column.
    """
    path = Path(path)
    if hardware not in READERS:
        raise MeasurementError(f"hardware: expected one of {', '.join(READERS)}; got {hardware!r}; choose one")
    try:
        records = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        by_id = {record["id"]: record for record in records["records"]}
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise MeasurementError(f"{path}: expected a YAML file of kernel records; got {error!r}; check it") from None
    found: dict[tuple[str, str, str], dict[str, list[Measurement]]] = defaultdict(lambda: defaultdict(list))
    faults = []
    for name, reader in READERS[hardware].items():
        record = by_id.get(name)
        if record is None or record.get("use") != "calibrate":
            continue
        for number, values in enumerate(record["rows"]):
            row = dict(zip(record["columns"], values, strict=True))
            try:
                for point in reader(row, f"{name}: {record['source']}"):
                    found[point.op.kind, point.op.dtype, point.op.variant][name.split("_")[0]].append(point)
            except (KeyError, TypeError, ValueError) as error:
                faults.append(f"{path.name}: {name}, row {number}: expected {record['columns']}; got {error}")
    if faults:
        raise MeasurementError(faults)
    if not found:
        raise MeasurementError(f"{path.name}: expected records for {hardware}; got none with use: calibrate")
    kept: list[Measurement] = []
    for key, origins in found.items():
        best = max(origins, key=lambda origin: len(origins[origin]))
        kept += origins[best]
        for origin in origins.keys() - {best}:
            if left_out is not None:
                left_out[f"{' '.join(filter(None, key))}: {origin}, beside {best}"] += len(origins[origin])
    return kept
