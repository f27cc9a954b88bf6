"""An ``Op`` is one kernel or one collective of a step: its kind, its dims, its dtype, and what follows from them.

FLOP and bytes are formulas over dims that work on numbers and on numpy arrays alike, so that one formula serves a
single op and a million of them. Times are not here: they come from an ``OpTimesLike``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
Tag = Literal["measured", "interpolated", "extrapolated", "datasheet"]
TAG_ORDER: tuple[Tag, ...] = ("measured", "interpolated", "extrapolated", "datasheet")

ITEM_BYTES: dict[str, float] = {
    "fp32": 4.0, "tf32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "fp4": 0.5, "nvfp4": 0.5,
}  # fmt: skip


def item_bytes(dtype: str) -> float:
    """Return the bytes of one value of ``dtype``."""
    if dtype not in ITEM_BYTES:
        raise ValueError(f"dtype must be one of {', '.join(ITEM_BYTES)}; got {dtype!r}")
    return ITEM_BYTES[dtype]


def output_bytes(dtype: str) -> float:
    """Return the bytes of one output value: matrix products write 16 bits at least."""
    return max(2.0, item_bytes(dtype))


Dims = Mapping[str, Any]  # name -> number or array
Cost = Callable[[Dims, str], Any]  # (dims, dtype) -> number or array


@dataclass(frozen=True)
class OpKind:
    """What every op of one kind has in common."""

    name: str
    dims: tuple[str, ...]
    """Names of the sizes, in order."""
    flop: Cost
    memory_bytes: Cost
    """Bytes read and written in device memory, each operand once (caches ideal)."""
    is_collective: bool = False
    note: str = ""


def loop_back(sms: int) -> str:
    """Return the variant of an exchange that loops back on its own device, by a copy on ``sms`` SMs."""
    return f"loop_back_{sms}"


def loop_back_sms(item: Op) -> int:
    """Return the SMs of an exchange that loops back.

    Raises:
        ValueError: another exchange.
    """
    name, _, sms = item.variant.rpartition("_")
    if name != "loop_back" or not sms.isdigit():
        raise ValueError(f"variant: expected loop_back_SMS, such as loop_back_20; got {item.variant!r}")
    return int(sms)


def _none(d: Dims, dtype: str) -> Any:
    return 0.0 * d[next(iter(d))]


def _causal_pairs(d: Dims) -> Any:
    """Query-key pairs of causal attention whose queries are the last of the context."""
    return d["queries"] * (d["context"] - d["queries"]) + d["queries"] * (d["queries"] + 1) / 2


def _gemm_flop(d: Dims, dtype: str) -> Any:
    return 2.0 * d["m"] * d["n"] * d["k"]


def _collective(name: str, note: str) -> OpKind:
    return OpKind(
        name,
        ("message_bytes", "ranks"),
        _none,
        lambda d, t: 2.0 * d["message_bytes"],
        is_collective=True,
        note=note,
    )


_KINDS = [
    OpKind(
        "gemm", ("m", "n", "k"), _gemm_flop,
        lambda d, t: item_bytes(t) * (d["m"] + 1.0 * d["n"]) * d["k"] + output_bytes(t) * d["m"] * d["n"],
        note="y[m,n] = x[m,k] w[n,k]",
    ),
    OpKind(
        "grouped_gemm", ("groups", "m", "n", "k"), _gemm_flop,
        lambda d, t: item_bytes(t) * (1.0 * d["groups"] * d["n"] + d["m"]) * d["k"] + output_bytes(t) * d["m"] * d["n"],
        note="groups = experts that hold at least one row (their weights are read); m = rows of all groups together",
    ),
    OpKind(
        "bmm", ("groups", "m", "n", "k"), lambda d, t: 2.0 * d["groups"] * d["m"] * d["n"] * d["k"],
        lambda d, t: 1.0 * d["groups"]
        * (item_bytes(t) * (d["n"] + d["m"]) * d["k"] + output_bytes(t) * d["m"] * d["n"]),
        note="one product per head: MLA weight absorption; m = rows of each group",
    ),
    OpKind(
        "mla_decode", ("batch", "queries", "context", "heads", "latent", "rope"),
        lambda d, t: 2.0 * d["batch"] * d["queries"] * d["heads"] * d["context"] * (2 * d["latent"] + d["rope"]),
        lambda d, t: item_bytes(t) * d["batch"] * d["context"] * (d["latent"] + d["rope"])
        + 2.0 * d["batch"] * d["queries"] * d["heads"] * (2 * d["latent"] + d["rope"]),
        note="absorbed MLA core (all heads read one latent); queries = tokens verified per sequence",
    ),
    OpKind(
        "gqa_decode", ("batch", "queries", "context", "heads", "kv_heads", "head_dim"),
        lambda d, t: 4.0 * d["batch"] * d["queries"] * d["heads"] * d["context"] * d["head_dim"],
        lambda d, t: item_bytes(t) * 2.0 * d["batch"] * d["context"] * d["kv_heads"] * d["head_dim"]
        + 4.0 * d["batch"] * d["queries"] * d["heads"] * d["head_dim"],
    ),
    OpKind(
        "attention_prefill", ("batch", "queries", "context", "heads", "kv_heads", "qk_dim", "v_dim"),
        lambda d, t: 2.0 * d["batch"] * d["heads"] * _causal_pairs(d) * (d["qk_dim"] + d["v_dim"]),
        lambda d, t: item_bytes(t) * d["batch"] * (d["qk_dim"] + d["v_dim"])
        * (1.0 * d["heads"] * d["queries"] + d["kv_heads"] * d["context"]),
        note="causal; the queries are the last tokens of the context",
    ),
    OpKind(
        "norm", ("rows", "width"), lambda d, t: 4.0 * d["rows"] * d["width"],
        lambda d, t: item_bytes(t) * 2.0 * d["rows"] * d["width"], note="RMSNorm",
    ),
    OpKind(
        "elementwise", ("rows", "width", "inputs"), lambda d, t: 1.0 * d["rows"] * d["width"] * d["inputs"],
        lambda d, t: item_bytes(t) * 1.0 * d["rows"] * d["width"] * (d["inputs"] + 1),
        note="SiLU-and-multiply has 2 inputs, a residual add 2, a cast 1",
    ),
    OpKind(
        "router", ("tokens", "hidden", "experts", "top_k"),
        lambda d, t: 2.0 * d["tokens"] * d["hidden"] * d["experts"],
        lambda d, t: 4.0 * d["experts"] * d["hidden"] + 1.0 * d["tokens"] * (4.0 * d["hidden"] + 8.0 * d["experts"]),
        note="fp32 linear, softmax, biased top-k; experts counts the zero-computation ones too",
    ),
    OpKind(
        "permute", ("rows", "width"), _none, lambda d, t: item_bytes(t) * 2.0 * d["rows"] * d["width"],
        note="gather or scatter of rows (tokens to experts, experts to tokens)",
    ),
    OpKind(
        "topk", ("rows", "n", "k"), lambda d, t: 1.0 * d["rows"] * d["n"],
        lambda d, t: item_bytes(t) * 1.0 * d["rows"] * d["n"] + 8.0 * d["rows"] * d["k"],
    ),
    OpKind(
        "indexer", ("batch", "queries", "context", "heads", "dim"),
        lambda d, t: 2.0 * d["batch"] * d["queries"] * d["context"] * d["heads"] * d["dim"],
        lambda d, t: item_bytes(t) * 1.0 * d["batch"] * d["context"] * d["dim"]
        + 4.0 * d["batch"] * d["queries"] * d["context"],
        note="lightning indexer scores; one shared key per position",
    ),
    OpKind(
        "sparse_mla", ("batch", "queries", "selected", "heads", "latent", "rope"),
        lambda d, t: 2.0 * d["batch"] * d["queries"] * d["heads"] * d["selected"] * (2 * d["latent"] + d["rope"]),
        lambda d, t: 1.0 * d["batch"] * d["queries"]
        * (item_bytes(t) * d["selected"] * (d["latent"] + d["rope"])
           + 2.0 * d["heads"] * (2 * d["latent"] + d["rope"])),
        note="gather of the selected latents and absorbed core",
    ),
    OpKind(
        "embedding", ("tokens", "width"), _none, lambda d, t: item_bytes(t) * 2.0 * d["tokens"] * d["width"],
    ),
    OpKind(
        "sampling", ("rows", "vocab"), lambda d, t: 3.0 * d["rows"] * d["vocab"],
        lambda d, t: 4.0 * d["rows"] * d["vocab"],
    ),
    OpKind("host", ("calls",), _none, _none, note="scheduler and launch work on the CPU"),
    _collective("dispatch", "tokens to experts; message_bytes = bytes that one rank sends in all"),
    _collective("combine", "expert outputs back to tokens; message_bytes = bytes that one rank receives in all"),
    _collective("all_to_all", "message_bytes = bytes that one rank sends in all, to itself included"),
    _collective("all_gather", "message_bytes = bytes of the gathered result"),
    _collective("reduce_scatter", "message_bytes = bytes of the unreduced input"),
    _collective("all_reduce", "message_bytes = bytes of the reduced tensor"),
    _collective("send", "point to point; message_bytes = bytes of the message"),
]  # fmt: skip
KINDS: dict[str, OpKind] = {kind.name: kind for kind in _KINDS}


@dataclass(frozen=True, slots=True)
class Op:
    """One kernel or collective. Build with ``op("gemm", dtype="bf16", m=1, n=2, k=3)``.

    ``variant`` tells kernels of one kind apart where they have different laws: ``low_latency`` and ``normal`` of
    dispatch and combine, ``masked`` (decode) and ``contiguous`` (prefill) of the grouped product, ``mha`` and ``wide``
    of GQA decode; "" otherwise.
    """

    kind: str
    sizes: tuple[float, ...]
    dtype: str
    variant: str = ""

    def __getitem__(self, dim: str) -> float:
        return self.sizes[KINDS[self.kind].dims.index(dim)]

    @property
    def dims(self) -> dict[str, float]:
        """Sizes by name."""
        return dict(zip(KINDS[self.kind].dims, self.sizes, strict=True))

    @property
    def flop(self) -> float:
        """Floating-point operations, a multiply-add counted as two."""
        return float(KINDS[self.kind].flop(self.dims, self.dtype))

    @property
    def memory_bytes(self) -> float:
        """Bytes read and written in device memory, each operand once."""
        return float(KINDS[self.kind].memory_bytes(self.dims, self.dtype))

    @property
    def message_bytes(self) -> float:
        """Bytes on a link (collectives), else 0."""
        return self["message_bytes"] if KINDS[self.kind].is_collective else 0.0

    @property
    def is_collective(self) -> bool:
        """Whether the op moves data between ranks."""
        return KINDS[self.kind].is_collective

    def __str__(self) -> str:
        sizes = ", ".join(f"{name} {size:g}" for name, size in self.dims.items())
        return f"{self.kind}({sizes}; {self.dtype}{' ' + self.variant if self.variant else ''})"


@lru_cache(maxsize=65536)
def _checked(kind: str, sizes: tuple[float, ...], dtype: str, variant: str) -> Op:
    return Op(kind, sizes, dtype, variant)


def op(kind: str, *, dtype: str = "bf16", variant: str = "", **dims: float) -> Op:
    """Return an op of ``kind`` with its sizes by name.

    Raises:
        ValueError: unknown kind or dtype, wrong dims, or a negative size.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}; got {kind!r}")
    names = KINDS[kind].dims
    if set(dims) != set(names):
        raise ValueError(f"{kind} takes the dims {', '.join(names)}; got {', '.join(dims)}")
    item_bytes(dtype)
    sizes = tuple(float(dims[name]) for name in names)
    if any(not size >= 0 for size in sizes):
        raise ValueError(f"{kind}: sizes must be >= 0; got {dims}")
    return _checked(kind, sizes, dtype, variant)


@dataclass(frozen=True)
class OpArrays:
    """Many ops of one kind, dtype and variant: one array per dim, all of one length."""

    kind: str
    dims: Mapping[str, FloatArray]
    dtype: str = "bf16"
    variant: str = ""

    def __len__(self) -> int:
        return len(next(iter(self.dims.values())))

    @property
    def flop(self) -> FloatArray:
        """FLOP per op [N]."""
        return np.asarray(KINDS[self.kind].flop(self.dims, self.dtype), dtype=float)

    @property
    def memory_bytes(self) -> FloatArray:
        """Device-memory bytes per op [N]."""
        return np.asarray(KINDS[self.kind].memory_bytes(self.dims, self.dtype), dtype=float)


class ResourceShares(NamedTuple):
    """What an op uses of each shared resource while it runs alone, each 0..1 of the device's capacity."""

    sm: float = 0.0
    memory: float = 0.0
    scale_up: float = 0.0
    scale_out: float = 0.0
    host: float = 0.0


@runtime_checkable
class OpTimesLike(Protocol):
    """Times of ops alone on a device. ``Roofline`` (datasheet) and ``OpTimes`` (calibrated) both have it."""

    def seconds(self, op: Op) -> float:
        """Return the time of one op, alone on the device."""
        ...

    def seconds_many(self, ops: OpArrays) -> FloatArray:
        """Return the times of many ops of one kind [N]."""
        ...

    def demand(self, op: Op) -> ResourceShares:
        """Return what the op uses of SMs, memory and links while it runs alone."""
        ...

    def tag(self, op: Op) -> Tag:
        """Return where the figure comes from."""
        ...


def worst_tag(tags: Any) -> Tag:
    """Return the least certain of several tags."""
    return max(tags, key=TAG_ORDER.index, default="measured")


@dataclass(frozen=True)
class FixedTimes:
    """An ``OpTimesLike`` with given seconds per op: for tests and for measured durations."""

    table: Mapping[Op, float]
    shares: Mapping[Op, ResourceShares] = field(default_factory=dict)

    def seconds(self, op: Op) -> float:
        """Return the given time."""
        return self.table[op]

    def seconds_many(self, ops: OpArrays) -> FloatArray:
        """Return the given times [N]."""
        rows = zip(*(ops.dims[name] for name in KINDS[ops.kind].dims), strict=True)
        return np.array([self.table[Op(ops.kind, tuple(map(float, row)), ops.dtype, ops.variant)] for row in rows])

    def demand(self, op: Op) -> ResourceShares:
        """Return the given shares, or none."""
        return self.shares.get(op, ResourceShares())

    def tag(self, op: Op) -> Tag:
        """Return ``measured``: the caller gave the figure."""
        return "measured"
