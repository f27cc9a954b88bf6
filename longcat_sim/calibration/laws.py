"""The law of each op kind: which sizes matter, and the work terms whose weights a fit finds.

``seconds = overhead + sum(s S) + max(sum(c C) / peak, sum(m M) / bandwidth, r FLOP / peak)``, all weights >= 0; the
last part, the roof of sustained FLOP (power, clocks), for products only. C are FLOP, M and S
bytes; S are never hidden, and move at the pace of the SMs: the same work takes an H200 as long as an H100, though its
memory is 1.4 times as fast (top-k, quantising of GEMM inputs: weights relative to bandwidth 1.43 times as large).
Efficiency depends on size because some terms grow slower than the work itself: rows padded to a tile, tiles padded to
full waves over the SMs, bytes that a cache holds. An efficiency of 0.8 is a weight of 1.25.

Sizes are reduced to at most four coordinates per kind; every term grows (or stays) with each coordinate, so a law does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from longcat_sim.ops.op import FloatArray, item_bytes, output_bytes

Coordinates = Mapping[str, Any]
TILE = 128
"""Rows and columns of one block's output tile. Source: the customary 64..128 x 128..256 tiles of Hopper GEMM kernels
(DeepGEMM README @55ab91f); the fit weighs three of them."""
EPILOGUE = 256
"""Steps of the inner loop that writing out one tile is counted as; the fit weighs it."""
SM_RATE = 25e9
"""Unit of what one SM moves in a second: an SM's share of an H100's memory bandwidth; fits weigh it."""
EXPERT_BYTES = 4096.0
"""Unit of what it costs to start one expert's product, however few rows it has; the fit weighs it."""
DOUBLING_S = 1e-6
"""Unit of a delay that grows with each doubling of a context; the fit weighs it."""


class Device(NamedTuple):
    """The figures of a data sheet that laws need."""

    peak: float
    bandwidth: float
    sm_count: float
    cache_bytes: float

    @property
    def sm_rate(self) -> float:
        """Bytes per second that all SMs move at one unit of weight."""
        return self.sm_count * SM_RATE


class Terms(NamedTuple):
    """Work terms, each [N]: ``compute`` in FLOP, ``memory`` and ``serial`` in bytes."""

    compute: list[FloatArray]
    memory: list[FloatArray]
    serial: list[FloatArray]


@dataclass(frozen=True)
class Law:
    """What every fit of one op kind shares."""

    coordinates: tuple[str, ...]
    reduce: Callable[[Mapping[str, Any]], tuple[Any, ...]]
    """Dims of the op -> coordinates, in order."""
    terms: Callable[[Coordinates, str, Device], Terms]
    compute_bound: bool
    """Which acceptance limit the kind has on a CPU."""
    has_roof: bool = False
    """Whether large sizes meet a roof of their own: products stop getting more efficient where power ends (B200, fp8:
    58 % of the data sheet's FLOP at 2^37, still 58 % at 2^41), which losses that shrink with size would not say."""
    turned: Callable[[tuple[FloatArray, ...]], tuple[FloatArray, ...]] | None = None
    """Coordinates -> others in which neighbours may be more alike; the data chooses. Of experts it can be the rows of
    each, and not of all together, that choose kernels and fill tiles (torch's grouped product on an H100)."""


def _ceil(x: Any) -> Any:
    return np.ceil(np.asarray(x) - 1e-9)


def _waves(tiles: Any, device: Device) -> Any:
    """Tiles padded to full waves, softened: a started wave costs at least one tile on one SM."""
    return np.maximum(_ceil(tiles / device.sm_count) * device.sm_count, tiles)


def _even(groups: Any, rows: Any, tile: int) -> Any:
    """Row tiles of groups that all hold ``rows`` rows."""
    return groups * _ceil(rows / tile)


def _uneven(groups: Any, rows: Any, tile: int) -> Any:
    """Row tiles of groups whose rows differ: half a tile per group is lost on average, and each has at least one."""
    return np.maximum(groups, groups * rows / tile + groups / 2)


def _gemm_terms(
    groups: Any, rows: Any, n: Any, k: Any, dtype: str, device: Device, row_tiles: Callable[..., Any] = _even
) -> Terms:
    """``groups`` products of [rows, k] and [k, n].

    Tiles are written out while nothing multiplies (a share of rows x n), and narrow types are made from 16-bit rows in
    a pass of their own, which nothing hides: this keeps large products with a short k or a small n off their plateau.
    """
    item, out = item_bytes(dtype), output_bytes(dtype)

    def padded(tile_m: int, tile_n: int) -> Any:
        tiles = row_tiles(groups, rows, tile_m) * _ceil(n / tile_n)
        return 2.0 * tile_m * tile_n * k * _waves(tiles, device)

    return Terms(
        [
            2.0 * groups * rows * n * k,
            padded(TILE, TILE),
            padded(TILE // 2, TILE),
            padded(TILE, 2 * TILE),
            groups * TILE * n * k,
            2.0 * EPILOGUE * groups * rows * n,
        ],
        [item * groups * n * k, item * groups * rows * k, out * groups * rows * n],
        [(2.0 + item if item < 2 else 0.0) * groups * rows * k],
    )


def _grouped_terms(c: Coordinates, dtype: str, device: Device) -> Terms:
    """Products of experts: rows are gathered before and scattered after, and each expert has a start of its own (fused
    kernels: 0.2 us on an H100, 0.4 us on a B200; 384 small experts take nine times as long as 8 of as many bytes)."""
    terms = _gemm_terms(c["groups"], c["m"] / c["groups"], c["n"], c["k"], dtype, device, _uneven)
    return terms._replace(serial=[*terms.serial, 8.0 * c["m"] * c["k"], EXPERT_BYTES * c["groups"]])


def _merge(context: Any, device: Device) -> Any:
    """The wait for the merge of a context's parts: kernels split it the more often, the longer it is."""
    return np.log2(np.maximum(context / 64, 1.0)) * DOUBLING_S * device.sm_rate


def _cached(memory_bytes: Any, device: Device) -> list[Any]:
    """Bytes, and the part of them that a cache does not hold (smooth)."""
    return [memory_bytes, memory_bytes * memory_bytes / (memory_bytes + device.cache_bytes)]


def _mla_terms(c: Coordinates, dtype: str, device: Device) -> Terms:
    """Absorbed MLA: 64-row tiles of query heads against the latent. Source: FlashMLA deep dive, 2025-04-22.

    Kernels that do not split a context over blocks take as long as their waves of (sequence, tile) pairs; those that do
    wait longer for the merge, the more often they split.
    """
    width = c["kv"] * (1088 / 576)  # 2 latent + rope of latent + rope, as 512 + 64
    tiles = _ceil(c["rows"] / 64)
    blocks = c["batch"] * tiles * _ceil(c["context"] / 64)
    flop = 2.0 * c["batch"] * c["rows"] * c["context"] * width
    kv_bytes = item_bytes(dtype) * c["batch"] * c["context"] * c["kv"]
    query_bytes = 2.0 * c["batch"] * c["rows"] * width
    return Terms(
        [flop, 2.0 * c["batch"] * 64 * tiles * c["context"] * width, 2.0 * 64 * 64 * width * _waves(blocks, device)],
        [
            kv_bytes,
            kv_bytes * tiles,
            query_bytes,
            item_bytes(dtype) * c["kv"] * c["context"] * _waves(c["batch"] * tiles, device),
        ],
        [
            query_bytes,
            c["batch"] * tiles * 4096.0,
            _merge(c["context"], device),
        ],
    )


def _gqa_terms(c: Coordinates, dtype: str, device: Device) -> Terms:
    """``items`` pairs of sequence and KV head, each shared by ``rows`` query heads; blocks of 64 positions."""
    kv_bytes = 2.0 * item_bytes(dtype) * c["items"] * c["context"] * c["width"]
    query_bytes = 4.0 * c["items"] * c["rows"] * c["width"]
    blocks = c["items"] * _ceil(c["context"] / 64)
    tile = 2.0 * item_bytes(dtype) * 64 * c["width"]
    return Terms(
        [4.0 * c["items"] * c["rows"] * c["context"] * c["width"], 4.0 * 64 * c["items"] * c["context"] * c["width"]],
        [kv_bytes, query_bytes, tile * _waves(blocks, device), 64 * tile * _waves(c["items"], device)],
        [query_bytes, 64.0 * c["items"], _merge(c["context"], device)],
    )


def _prefill_terms(c: Coordinates, dtype: str, device: Device) -> Terms:
    """Causal attention in 128-row query tiles; the tile on the diagonal is computed whole.

    Each tile has a start and an end of its own (some 0.3 us of an SM), and on a CPU rows that no cache holds are waited
    for: hardly any until they fill two caches, then each of them (two profiles of an EPYC, no command repeats it: 7.2
    to 8.5 % off without the bend, 4.4 to 4.7 % with it; bends at 1, 1.5 and 3 caches: 7.7 to 8.5, 6.0 to 6.2, 4.3 to
    4.6 %). On GPUs the fit weighs it too, mostly with nothing.
    """
    rows_bytes = item_bytes(dtype) * c["items"] * c["width"] * (2.0 * c["queries"] + c["prior"])
    pairs = c["queries"] * c["prior"] + c["queries"] * (c["queries"] + 1) / 2
    per_pair = 2.0 * c["items"] * c["width"]
    longest = c["prior"] + c["queries"]
    return Terms(
        [
            per_pair * pairs,
            per_pair * c["queries"] * TILE / 2,
            2.0 * c["width"] * TILE * longest * device.sm_count,  # one tile of the longest row: the last to finish
        ],
        [rows_bytes],
        [
            _cached(rows_bytes, device)[1],
            np.maximum(rows_bytes - 2 * device.cache_bytes, 0.0),
            64.0 * c["items"] * _ceil(c["queries"] / TILE),
        ],
    )


def _indexer_terms(c: Coordinates, dtype: str, device: Device) -> Terms:
    pairs = c["queries"] * c["context"]  # context is the queries' mean, where they are causal
    scores = 4.0 * c["batch"] * pairs
    keys = item_bytes(dtype) * c["batch"] * c["context"] * c["width"] / 64
    blocks = c["batch"] * _ceil(c["context"] / 256)
    return Terms(
        [2.0 * c["batch"] * pairs * c["width"], 2.0 * 256 * c["width"] * _waves(blocks, device)],
        [keys],
        [item_bytes(dtype) * c["batch"] * c["queries"] * c["width"], scores],
    )


def _sparse_terms(c: Coordinates, dtype: str, device: Device) -> Terms:
    width = c["kv"] * (1088 / 576)
    tiles = _ceil(c["heads"] / 64)
    blocks = c["queries"] * tiles * _ceil(c["selected"] / 64)
    gathered = item_bytes(dtype) * c["queries"] * c["selected"] * c["kv"]
    return Terms(
        [2.0 * c["queries"] * c["heads"] * c["selected"] * width, 2.0 * 64 * 64 * width * _waves(blocks, device)],
        [2.0 * c["queries"] * c["heads"] * width],
        [2.0 * c["queries"] * c["heads"] * width, gathered],  # most rows come from the cache
    )


def _rows_terms(memory_bytes: Any, rows: Any, device: Device, flop: Any = None) -> Terms:
    """A pass over rows: bytes, with a fixed cost per row."""
    return Terms([] if flop is None else [flop], _cached(memory_bytes, device), [64.0 * rows])


def _router_terms(c: Coordinates, dtype: str, device: Device) -> Terms:
    weights = 4.0 * c["experts"] * c["hidden"]
    scores = 8.0 * c["tokens"] * c["experts"]
    flop = 2.0 * c["tokens"] * c["hidden"] * c["experts"]
    tiles = _ceil(c["tokens"] / 64) * _ceil(c["experts"] / 64)
    return Terms(
        [flop, 2.0 * 64 * 64 * c["hidden"] * _waves(tiles, device)],
        [weights, 4.0 * c["tokens"] * c["hidden"], scores],
        [scores, 64.0 * c["tokens"]],
    )


def _topk_terms(c: Coordinates, dtype: str, device: Device) -> Terms:
    values = item_bytes(dtype) * c["rows"] * c["n"]
    return Terms(
        [],
        _cached(values, device),
        [
            8.0 * c["rows"] * c["k"],
            64.0 * c["rows"],
            4.0 * c["k"],
            item_bytes(dtype) * c["n"] * _waves(c["rows"], device),
        ],
    )


def _bytes_law(names: tuple[str, ...], passes: Callable[[Coordinates], Any], rows: str) -> Law:
    """A law of ops that only move rows; ``passes`` gives values read and written."""
    return Law(
        names,
        lambda d: tuple(d[name] for name in names),
        lambda c, t, v: _rows_terms(item_bytes(t) * passes(c), c[rows], v),
        compute_bound=False,
    )


LAWS: dict[str, Law] = {
    "gemm": Law(
        ("m", "n", "k"),
        lambda d: (d["m"], d["n"], d["k"]),
        lambda c, t, v: _gemm_terms(1.0, c["m"], c["n"], c["k"], t, v),
        compute_bound=True,
        has_roof=True,
    ),
    "grouped_gemm": Law(
        ("groups", "m", "n", "k"),
        lambda d: (d["groups"], d["m"], d["n"], d["k"]),
        _grouped_terms,
        compute_bound=True,
        has_roof=True,
        turned=lambda c: (c[0], c[1] / c[0], c[2], c[3]),
    ),
    "bmm": Law(
        ("groups", "m", "n", "k"),
        lambda d: (d["groups"], d["m"], d["n"], d["k"]),
        lambda c, t, v: _gemm_terms(c["groups"], c["m"], c["n"], c["k"], t, v),
        compute_bound=True,
        has_roof=True,
    ),
    "mla_decode": Law(
        ("batch", "rows", "context", "kv"),
        lambda d: (d["batch"], d["queries"] * d["heads"], d["context"], d["latent"] + d["rope"]),
        _mla_terms,
        compute_bound=True,
    ),
    "gqa_decode": Law(
        ("items", "rows", "context", "width"),
        lambda d: (d["batch"] * d["kv_heads"], d["queries"] * d["heads"] / d["kv_heads"], d["context"], d["head_dim"]),
        _gqa_terms,
        compute_bound=False,
    ),
    "attention_prefill": Law(
        ("items", "queries", "prior", "width"),
        lambda d: (d["batch"] * d["heads"], d["queries"], d["context"] - d["queries"], d["qk_dim"] + d["v_dim"]),
        _prefill_terms,
        compute_bound=True,
    ),
    "indexer": Law(
        ("batch", "queries", "context", "width"),
        lambda d: (d["batch"], d["queries"], d["context"], d["heads"] * d["dim"]),
        _indexer_terms,
        compute_bound=True,
    ),
    "sparse_mla": Law(
        ("queries", "heads", "selected", "kv"),
        lambda d: (d["batch"] * d["queries"], d["heads"], d["selected"], d["latent"] + d["rope"]),
        _sparse_terms,
        compute_bound=True,
    ),
    "norm": _bytes_law(("rows", "width"), lambda c: 2.0 * c["rows"] * c["width"], "rows"),
    "elementwise": _bytes_law(
        ("rows", "width", "inputs"), lambda c: c["rows"] * c["width"] * (c["inputs"] + 1.0), "rows"
    ),
    "permute": _bytes_law(("rows", "width"), lambda c: 2.0 * c["rows"] * c["width"], "rows"),
    "embedding": _bytes_law(("tokens", "width"), lambda c: 2.0 * c["tokens"] * c["width"], "tokens"),
    "router": Law(
        ("tokens", "hidden", "experts"),
        lambda d: (d["tokens"], d["hidden"], d["experts"]),
        _router_terms,
        compute_bound=True,
    ),
    "topk": Law(("rows", "n", "k"), lambda d: (d["rows"], d["n"], d["k"]), _topk_terms, compute_bound=False),
    "sampling": Law(
        ("rows", "vocab"),
        lambda d: (d["rows"], d["vocab"]),
        lambda c, t, v: _rows_terms(4.0 * c["rows"] * c["vocab"], c["rows"], v),
        compute_bound=False,
    ),
    "host": Law(
        ("calls",), lambda d: (d["calls"],), lambda c, t, v: Terms([], [], [1.0 * c["calls"]]), compute_bound=False
    ),
}
