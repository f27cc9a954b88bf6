"""Import the measured kernel tables of the optional package ``aiconfigurator-core`` (Apache-2.0, NVIDIA).

``pip install aiconfigurator-core pyarrow``. One framework per kind, the one whose table repeats best, unless a backend
is named: which kernel an engine runs matters as much as the GPU (`tests/oracle/test_engines_kernels.py`). Its file of
served operating points (``silicon_sample.csv``) is never read.
"""

from __future__ import annotations

import importlib.util
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longcat_sim.calibration.answer import Key
from longcat_sim.calibration.importers import published
from longcat_sim.errors import MeasurementError
from longcat_sim.ops.attention import NARROW_HEADS, WIDE_HEADS, gqa_variant, mla_variant
from longcat_sim.records.measurement import Measurement

SYSTEMS = {
    "a100-sxm": "a100_sxm",
    "h100-sxm": "h100_sxm",
    "h200-sxm": "h200_sxm",
    "b200-sxm": "b200_sxm",
    "b300-sxm": "b300_sxm",
    "gb200-nvl72": "gb200",
    "gb300-nvl72": "gb300",
    "rtx-pro-6000": "rtx_pro_6000_server",
    "l40s": "l40s",
}
"""Profile name -> folder of the package."""
BACKENDS = ("trtllm", "sglang", "vllm")
"""Frameworks whose kernels the tables hold."""
DTYPES = {"bfloat16": "bf16", "fp8_block": "fp8", "fp8": "fp8", "nvfp4": "nvfp4"}
ALIGNMENT = 16
"""Rows of a product are read where they are a multiple of this, or fewer: engines pad batches to such sizes, and
unaligned rows take other kernels (fp8, H100: 513 rows 78 us, 512 rows 34 us)."""
MLA = {"latent": 512, "rope": 64}
EXPERTS = ("moe_dtype", "hidden_size", "inter_size", "topk", "num_experts")
ANOTHER_KERNEL = 0.98
"""Twice the heads in less than this share of the time: that is another kernel."""
LAUNCHED = 4.0
"""A backend's smallest op over another's, beyond which launches were timed. Assumed."""
SLOW_CUT = 1.1
"""A cut of the same experts over more ranks that takes this much longer than a coarser cut was not tuned."""
Columns = Mapping[str, Any]
Point = tuple[str, str, str, dict[str, float], float]
Times = dict[tuple[str, str, str, tuple[tuple[str, float], ...]], tuple[float, str]]
"""(kind, dtype, variant, sizes) -> (milliseconds, source)."""


def _rows(columns: Columns) -> Iterator[dict[str, Any]]:
    names = list(columns)
    for values in zip(*(columns[name] for name in names), strict=True):
        yield dict(zip(names, values, strict=True))


def _gemm(row: Columns) -> Iterator[Point]:
    aligned = row["m"] % ALIGNMENT == 0 or row["m"] < ALIGNMENT
    if aligned and row["gemm_dtype"] in ("bfloat16", "fp8_block", "nvfp4"):
        yield "gemm", DTYPES[row["gemm_dtype"]], "", {name: row[name] for name in "mnk"}, row["latency"]


def _experts(row: Columns) -> Iterator[Point]:
    """All experts as one product: gate, up and down have 3 x inter columns of ``hidden`` together."""
    copies = row["num_tokens"] * row["topk"]
    dims = {"groups": row["num_experts"], "m": copies, "n": 3 * row["inter_size"] / row["moe_tp_size"]}
    yield "grouped_gemm", DTYPES[row["moe_dtype"]], "fused", {**dims, "k": row["hidden_size"]}, row["latency"]


def _sift_experts(rows: list[dict[str, Any]], left_out: Counter[str]) -> list[dict[str, Any]]:
    """Return the rows of gated experts with evenly spread tokens, without those that an op's sizes cannot tell apart.

    Tables cut by expert parallelism are not read: they do not say how many copies a rank then computes. Left out and
    counted: rows with fewer copies than experts (their time holds the cost of idle experts, 100 us for 256 of them,
    27 us for 8, fp8, H100; an op knows only those that hold tokens); and whole cuts by tensor parallelism that take
    longer than a coarser cut of the same experts (median over tokens), where the autotuner found no kernel.
    """
    wanted = [
        row
        for row in rows
        if row["distribution"] == "balanced"
        and row["moe_ep_size"] == 1
        and row["moe_dtype"] in ("bfloat16", "fp8_block", "nvfp4")
        and "nongated" not in row["kernel_source"]
        and "min_latency" not in row["kernel_source"]
    ]
    families: dict[tuple, dict[int, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for row in wanted:
        cut = families[tuple(row[name] for name in EXPERTS)][row["moe_tp_size"]]
        cut[row["num_tokens"]] = min(row["latency"], cut.get(row["num_tokens"], np.inf))
    slow = set()
    for family, cuts in families.items():
        for size in cuts:
            coarser: dict[int, float] = {}
            for other in (cuts[n] for n in cuts if n < size):
                coarser |= {tokens: min(ms, coarser.get(tokens, np.inf)) for tokens, ms in other.items()}
            ratios = [ms / coarser[tokens] for tokens, ms in cuts[size].items() if tokens in coarser]
            if ratios and np.median(ratios) > SLOW_CUT:
                slow.add((*family, size))
    kept = []
    for row in wanted:
        name = f"grouped_gemm {DTYPES[row['moe_dtype']]} fused"
        if (*(row[name] for name in EXPERTS), row["moe_tp_size"]) in slow:
            left_out[f"{name}: cut slower than a coarser one"] += 1
        elif row["num_tokens"] * row["topk"] < row["num_experts"]:
            left_out[f"{name}: idle experts"] += 1
        else:
            kept.append(row)
    return kept


def _sift_mla(rows: list[dict[str, Any]], left_out: Counter[str]) -> list[dict[str, Any]]:
    """Mark the rows of a kernel for few or many heads, in tables where twice as many heads take less time.

    Median over the half of the sizes that takes longer, 64 heads over 32: 0.75 to 0.97 on data-centre Blackwell, 1.00
    to 1.10 elsewhere; 128 over 64: 0.40 on an RTX PRO 6000 in fp8, 1.00 to 1.86 elsewhere.
    """
    for dtype in {row["kv_cache_dtype"] for row in rows}:
        same = [row for row in rows if row["kv_cache_dtype"] == dtype]
        times = {(row["batch_size"], row["step"], row["num_heads"]): row["latency"] for row in same}
        apart = {
            mla_variant(few if few == NARROW_HEADS else 2 * few)
            for few in (NARROW_HEADS, WIDE_HEADS) if _is_another_kernel(times, few)
        }  # fmt: skip
        for row in same:
            variant = mla_variant(row["num_heads"])
            row["variant"] = variant if variant in apart else ""
    return rows


def _is_another_kernel(times: Mapping[tuple[int, int, int], float], heads: int) -> bool:
    """Whether twice as many heads as ``heads`` take less time; ``times`` by (batch, step, heads)."""
    more = 2 * heads
    pairs = [(time, times[b, s, more]) for (b, s, h), time in times.items() if h == heads and (b, s, more) in times]
    long = sorted(pairs)[len(pairs) // 2 :]
    return bool(long) and float(np.median([other / time for time, other in long])) < ANOTHER_KERNEL


def _mla_decode(row: Columns) -> Iterator[Point]:
    dims = {"batch": row["batch_size"], "queries": 1, "context": row["step"] + 1, "heads": row["num_heads"], **MLA}
    yield "mla_decode", DTYPES[row["kv_cache_dtype"]], row["variant"], dims, row["latency"]


def _prefill_dims(row: Columns, kv_heads: float, qk_dim: float, v_dim: float) -> dict[str, float]:
    return {
        "batch": row["batch_size"], "queries": row["isl"], "context": row["isl"] + row["step"],
        "heads": row["num_heads"], "kv_heads": kv_heads, "qk_dim": qk_dim, "v_dim": v_dim,
    }  # fmt: skip


def _mla_prefill(row: Columns) -> Iterator[Point]:
    if row["kv_cache_dtype"] == "bfloat16":
        yield "attention_prefill", "bf16", "", _prefill_dims(row, row["num_heads"], 192, 128), row["latency"]


def _gqa_prefill(row: Columns) -> Iterator[Point]:
    if (
        row["attn_dtype"] == "bfloat16" and row["kv_cache_dtype"] == "bfloat16" and not row.get("window_size")
    ):  # older tables hold none
        dims = _prefill_dims(row, row["num_key_value_heads"], row["head_dim"], row["head_dim"])
        yield "attention_prefill", "bf16", "", dims, row["latency"]


def _gqa_decode(row: Columns) -> Iterator[Point]:
    if not row.get("window_size"):
        dims = {
            "batch": row["batch_size"], "queries": 1, "context": row["step"] + 1, "heads": row["num_heads"],
            "kv_heads": row["num_key_value_heads"], "head_dim": row["head_dim"],
        }  # fmt: skip
        variant = gqa_variant(row["num_heads"] / row["num_key_value_heads"])
        yield "gqa_decode", DTYPES[row["kv_cache_dtype"]], variant, dims, row["latency"]


def _bmm(row: Columns) -> Iterator[Point]:
    """MLA absorption: queries into the latent (128 -> 512), outputs out of it (512 -> 128), one product per head."""
    n, k = (512, 128) if row["op_name"] == "mla_gen_pre" else (128, 512)
    dims = {"groups": row["num_heads"], "m": row["num_tokens"], "n": n, "k": k}
    yield "bmm", DTYPES[row["bmm_dtype"]], "", dims, row["latency"]


def _cast(row: Columns) -> Iterator[Point]:
    """A scaled cast to fp8 reads 2 and writes 1 byte per value: three quarters of a bf16 pass over as many."""
    if row["m"] % ALIGNMENT == 0 or row["m"] < ALIGNMENT:
        yield "elementwise", "bf16", "", {"rows": row["m"], "width": 0.75 * row["k"], "inputs": 1}, row["latency"]


def _topk(row: Columns) -> Iterator[Point]:
    if row["score_mode"] == "flat":
        dims = {"rows": row["batch_size"] * row["isl"], "n": row["isl"] + row["step"], "k": 2048}
        yield "topk", "fp32", "", dims, row["latency"]


def _indexer(row: Columns) -> Iterator[Point]:
    """GLM-5's indexer: 32 heads of 128."""
    context = row["step"] + (row["isl"] + 1) / 2  # the mean over causal queries
    dims = {"batch": row["batch_size"], "queries": row["isl"], "context": context, "heads": 32, "dim": 128}
    yield "indexer", "fp8", "", dims, row["latency"]


def _sparse(row: Columns) -> Iterator[Point]:
    if row["isl"] + row["step"] >= 2048:
        dims = {"batch": row["batch_size"], "queries": row["isl"], "selected": 2048, "heads": row["num_heads"], **MLA}
        yield "sparse_mla", "bf16", "", dims, row["latency"]


TABLES: tuple[tuple[str, str, Callable[[Columns], Iterator[Point]]], ...] = (
    ("gemm/trtllm", "gemm_perf", _gemm),
    ("moe/trtllm", "moe_perf", _experts),
    ("mla/trtllm", "generation_mla_perf", _mla_decode),
    ("mla/trtllm", "context_mla_perf", _mla_prefill),
    ("attention/trtllm", "context_attention_perf", _gqa_prefill),
    ("attention/trtllm", "generation_attention_perf", _gqa_decode),
    ("mla_bmm/trtllm", "mla_bmm_perf", _bmm),
    ("quantize/trtllm", "scale_matrix_perf", _cast),
    ("sparse_attention/sglang", "glm5_topk_module_perf", _topk),
    ("sparse_attention/sglang", "glm5_mqa_logits_module_perf", _indexer),
    ("sparse_attention/sglang", "glm5_dsa_attn_module_perf", _sparse),
)
"""(family / framework, table, reader)."""
SIFT: dict[str, Callable[[list[dict[str, Any]], Counter[str]], list[dict[str, Any]]]] = {
    "moe_perf": _sift_experts,
    "generation_mla_perf": _sift_mla,
}
"""Table -> what chooses or marks its rows, where one row alone cannot tell."""


def tables_folder(folder: str | Path | None = None) -> Path:
    """Return the folder of the tables: the one given, or that of the installed package.

    Raises:
        MeasurementError: neither is there.
    """
    if folder is None:
        found = importlib.util.find_spec("aiconfigurator_core")
        if found is None or not found.submodule_search_locations:
            raise MeasurementError(
                "aiconfigurator-core: expected the package; it is not installed; "
                "run `pip install aiconfigurator-core pyarrow`, or give the folder of its systems/data"
            )
        folder = Path(next(iter(found.submodule_search_locations))) / "systems" / "data"
    if not Path(folder).is_dir():
        raise MeasurementError(f"{folder}: expected the folder systems/data of aiconfigurator-core; there is none")
    return Path(folder)


def _release(tables: Path) -> str:
    """Return the package's version, from the metadata that lies beside it."""
    beside = sorted(tables.resolve().parent.parent.parent.glob("aiconfigurator_core-*.dist-info"))
    return beside[-1].name.split("-")[1].removesuffix(".dist") if beside else "of an unknown version"


def _times_of(
    columns: Columns, table: str, reader: Callable[[Columns], Iterator[Point]], source: str, left_out: Counter[str]
) -> Times:
    """Return the times of one table, the fastest of each size."""
    rows = list(_rows(columns))
    if table in SIFT:
        rows = SIFT[table](rows, left_out)
    best: Times = {}
    for row in rows:
        for kind, dtype, variant, dims, milliseconds in reader(row):
            if not np.isfinite(milliseconds) or milliseconds <= 0:
                left_out[" ".join(filter(None, (kind, dtype, variant))) + ": no time"] += 1
                continue
            key = (kind, dtype, variant, tuple(sorted((name, float(size)) for name, size in dims.items())))
            if key not in best or milliseconds < best[key][0]:
                best[key] = float(milliseconds), source
    return best


def _preferred(own: Times, others: Times) -> tuple[Times, dict[str, int]]:
    """Return a backend's times, and the others' for laws that it lacks or that it timed with the host's launches, whose
    rows are counted by law.

    Those of its smallest op take several times as long as anybody else's (vLLM's fp8 products: 59 us on an H200, 230 on
    a B200), which a CUDA graph, as engines decode with, does not wait for.
    """
    least: dict[Key, tuple[float, float]] = {}
    for key in own.keys() & others.keys():
        mine, theirs = least.get(key[:3], (np.inf, np.inf))
        least[key[:3]] = min(mine, own[key][0]), min(theirs, others[key][0])
    launched = {law for law, (mine, theirs) in least.items() if mine > LAUNCHED * theirs}
    found = {key: timed for key, timed in own.items() if key[:3] not in launched}
    has = {key[:3] for key in found}
    found |= {key: timed for key, timed in others.items() if key[:3] not in has}
    return found, {" ".join(filter(None, law)): sum(key[:3] == law for key in own) for law in launched}


def import_aiconfigurator(
    hardware: str, *, folder: str | Path | None = None, kinds: set[str] | None = None,
    left_out: Counter[str] | None = None, backend: str = "",
) -> list[Measurement]:  # fmt: skip
    """Return the tables of one system as measurements; the fastest where a size was measured several times.

    ``left_out`` counts rows that a rule dropped. With a ``backend`` tables are that framework's, where it has them.

    Raises:
        MeasurementError: the package or pyarrow is missing, or it has no such system or backend.
    """
    if hardware not in SYSTEMS:
        raise MeasurementError(f"hardware: expected one of {', '.join(SYSTEMS)}; got {hardware!r}; choose one")
    if backend and backend not in BACKENDS:
        raise MeasurementError(f"backend: expected one of {', '.join(BACKENDS)}; got {backend!r}; choose one")
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise MeasurementError("pyarrow: expected it to read the tables; run `pip install pyarrow`") from None
    tables = tables_folder(folder)
    base, release = tables / SYSTEMS[hardware], _release(tables)
    if not base.is_dir():
        raise MeasurementError(
            f"{tables}: expected a folder {base.name} with the tables of {hardware}; there is none; give the folder "
            "systems/data of aiconfigurator-core"
        )

    def read(family: str, table: str, reader: Callable[[Columns], Iterator[Point]]) -> tuple[Times, Counter[str]]:
        dropped: Counter[str] = Counter()
        candidates = list((base / family).glob(f"*/{table}.parquet"))
        if not candidates:
            return {}, dropped
        # the fullest version: later ones may hold a few rows only
        version = max(candidates, key=lambda path: path.stat().st_size).parent
        source = f"aiconfigurator-core {release} {SYSTEMS[hardware]}/{family}/{version.name}/{table}"
        file = parquet.read_table(version / f"{table}.parquet")
        columns = {name: file[name].to_numpy(zero_copy_only=False) for name in file.column_names}
        return _times_of(columns, table, reader, source, dropped), dropped

    best: Times = {}
    dropped: Counter[str] = Counter()
    for family, table, reader in TABLES:
        found, lost = read(family, table, reader)
        own = f"{family.split('/')[0]}/{backend}"
        if backend and own != family:
            theirs, lost_of_theirs = read(own, table, reader)
            found, launched = _preferred(theirs, found)
            has = {" ".join(filter(None, key[:3])) for key in theirs} - set(launched)
            kept = [(label, n) for label, n in lost.items() if label.split(":")[0] not in has]
            kept += [(label, n) for label, n in lost_of_theirs.items() if label.split(":")[0] in has]
            lost = Counter(dict(kept)) + Counter({f"{law}: timed with its launches": n for law, n in launched.items()})
        dropped.update(lost)
        for key, timed in found.items():
            if (not kinds or key[0] in kinds) and (key not in best or timed[0] < best[key][0]):
                best[key] = timed
    if left_out is not None:
        left_out.update({label: n for label, n in dropped.items() if not kinds or label.split(" ")[0] in kinds})
    return [
        published(kind, milliseconds * 1e-3, source, dtype=dtype, variant=variant, **dict(dims))
        for (kind, dtype, variant, dims), (milliseconds, source) in best.items()
    ]
