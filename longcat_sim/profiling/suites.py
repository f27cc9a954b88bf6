"""Which sizes a suite measures: the ops of the step graph at a grid of decode and prefill steps of one model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any

from longcat_sim.ops.attention import StepSize
from longcat_sim.ops.graph import LayerLoad, step_graph
from longcat_sim.ops.op import Op, op
from longcat_sim.ops.shape import OpShape
from longcat_sim.profiling.kernels import BUILDERS
from longcat_sim.specs.deployment import Deployment
from longcat_sim.specs.model import ModelSpec

SUITES: dict[str, tuple[str, ...]] = {
    "decode": ("gemm", "bmm", "mla_decode"),
    "prefill": ("attention_prefill",),
    "experts": ("grouped_gemm", "permute"),
    "small-ops": ("norm", "elementwise", "router", "embedding", "sampling", "host"),
    "sparse": ("topk", "indexer", "sparse_mla"),
}
"""Suite -> kinds of op, in order of value."""
ALL_SUITES = (*SUITES, "collectives", "contention", "model-step", "overlap")
"""Those, and what is not a grid of ops: between ranks, of ops side by side, of whole steps, and of steps whose
exchanges loop back on a second stream of a GPU."""


@dataclass(frozen=True)
class Grid:
    """Steps whose ops are measured: (sequences, context) of decode, (sequences, prompt tokens) of prefill."""

    decode: tuple[tuple[int, int], ...]
    prefill: tuple[tuple[int, int], ...]
    topk_rows: tuple[int, ...] = (1, 8, 64)
    topk_scores: tuple[int, ...] = (512, 1024, 2048, 4096, 8192)
    topk_kept: tuple[int, ...] = (64, 128, 256)
    sparse_batches: tuple[int, ...] = (1, 8)
    indexed: tuple[int, ...] = (1024, 4096, 16384)
    selected: tuple[int, ...] = (256, 1024, 2048)
    experts: tuple[int, ...] = ()
    """Experts with rows: grouped products beyond those of the steps, for ranks that hold fewer."""
    expert_rows: tuple[int, ...] = ()


SMALL = Grid(
    decode=tuple((batch, context) for batch in (1, 2, 4, 8, 16) for context in (64, 256, 1024)),
    prefill=((1, 32), (1, 128), (1, 512), (2, 256), (4, 64), (4, 256)),
)
"""For a CPU: the quickstart's, and a campaign's dry run."""
DENSE = Grid(
    decode=tuple(
        (batch, context) for batch in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32) for context in (64, 128, 256, 512, 1024)
    ),
    prefill=(
        *((1, prompt) for prompt in (16, 32, 64, 96, 128, 192, 256, 384, 512)),
        *((2, prompt) for prompt in (16, 32, 48, 64, 96, 128, 192, 256, 384)),
        *((4, prompt) for prompt in (16, 24, 32, 48, 64, 96, 128, 192, 256)),
        *((8, prompt) for prompt in (16, 24, 32, 48, 64, 96, 128)),
    ),
    topk_rows=(1, 2, 4, 8, 16, 32, 64),
    sparse_batches=(1, 2, 4, 8),
    indexed=(1024, 2048, 4096, 8192, 16384),
    selected=(256, 512, 1024, 2048),
)
"""For a CPU that is to be fitted well: `profile`'s."""
FULL = Grid(
    decode=tuple(
        (batch, context)
        for batch in (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
        for context in (256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
    ),
    prefill=(
        *((1, prompt) for prompt in (128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)),
        *((2, prompt) for prompt in (256, 512, 1024, 1536, 2048, 4096)),
        *((4, prompt) for prompt in (128, 256, 512, 1024, 2048)),
        *((8, prompt) for prompt in (128, 256, 512, 1024)),
    ),
    topk_rows=(1, 8, 64, 256),
    topk_scores=(4096, 16384, 65536, 131072),
    topk_kept=(512, 2048),
    sparse_batches=(1, 4, 16, 64),
    indexed=(4096, 8192, 16384, 32768, 65536, 131072),
    selected=(512, 1024, 2048),
    experts=(2, 4, 6, 8, 12, 16, 24, 32),
    expert_rows=(
        *(32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096),
        *(5120, 6144, 7168, 8192, 12288, 16384),
    ),
)
"""For a GPU: the campaign's."""
RIDING = frozenset({"permute", "unpermute", "experts silu"})
"""Steps of the experts that the CPU's expert-by-expert code does inside its products (see ``kernels.grouped_gemm``). A
GPU's takes all token copies through them, those of zero-computation experts too: the host does not wait to learn how
many there are."""
MOST_SEQUENCES = 4
"""Of the decode step whose weights pass between two ops. More would throw the op's own rows, which a step has just
written, out of the caches too: norms of 12 rows then took twice as long as in a step."""
LARGEST_CACHE_TOKENS = 1 << 20
"""Decode points whose caches together hold more tokens than this are left out of a campaign on one GPU."""


def active_experts(experts: int, copies: float) -> float:
    """Return how many of ``experts`` get at least one of ``copies`` that fall at random."""
    return experts * (1.0 - (1.0 - 1.0 / experts) ** copies) if experts else 0.0


def load_of(spec: ModelSpec, rows: float) -> LayerLoad:
    """Return the expected load of one layer on one device that holds all experts."""
    copies = rows * spec.expected_ffn_experts
    return LayerLoad(copies, copies, max(1.0, active_experts(spec.n_routed_experts, copies)))


def step_ops(
    spec: ModelSpec, phase: str, sequences: int, queries: int, context: int, dtype: str, load: LayerLoad | None = None
) -> list[Op]:
    """Return the ops of one step of the executable model on one device, each as often as it runs.

    Activations are in ``dtype``, whatever the graph's default for engines is; router and sampling stay fp32.
    """
    size = StepSize(phase, sequences, queries, context)
    found: list[Op] = []
    for block in step_graph(spec, one_device(dtype), size, load or load_of(spec, sequences * queries)):
        shapes = [shape for part in block.parts for segment in part.values() for shape in segment]
        own = own_shapes(spec, shapes, sequences * queries, dtype)
        found += [shape.typical() for shape in own] * block.count
    return found


def one_device(dtype: str) -> Deployment:
    """Return the deployment that the executable model is: one device, everything in ``dtype``."""
    precision = dict.fromkeys(("weights", "attention", "kv_cache", "dispatch", "combine"), dtype)
    return Deployment.model_validate({"num_gpus": 1, "precision": precision})


def own_shapes(spec: ModelSpec, shapes: Iterable[OpShape], tokens: int, dtype: str) -> list[OpShape]:
    """Return the ops that the executable model runs for some of a step's, on one device."""
    found = []
    for shape in shapes:
        if shape.name in RIDING:
            if dtype == "fp32":
                continue
            shape = replace(shape, dims={**shape.dims, "rows": tokens * spec.moe_topk})
        precision = "fp32" if shape.kind in ("router", "sampling", "topk", "host") else dtype
        # the model has one kernel for both layouts of experts, and for few and many heads
        variant = "" if shape.kind in ("grouped_gemm", "mla_decode") else shape.variant
        found.append(replace(shape, dtype=precision, variant=variant))
    return found


def suite_ops(suite: str, spec: ModelSpec, grid: Grid, dtype: str) -> list[Op]:
    """Return the distinct ops of a suite, each kind's from small to large."""
    kinds = SUITES[suite]
    if suite == "sparse":
        sizes = product(grid.topk_rows, grid.topk_scores, grid.topk_kept)
        ranked = [op("topk", dtype="fp32", rows=rows, n=n, k=k) for rows, n, k in sizes if k < n]
        return ranked + _sparse_ops(spec, grid, dtype)
    found: dict[Op, None] = {}
    for sequences, context in grid.decode:
        if sequences * context <= LARGEST_CACHE_TOKENS:
            found |= dict.fromkeys(step_ops(spec, "decode", sequences, 1, context, dtype))
    for sequences, prompt in grid.prefill:
        found |= dict.fromkeys(step_ops(spec, "prefill", sequences, prompt, prompt, dtype))
    if "host" in kinds:
        found |= dict.fromkeys(op("host", dtype="fp32", calls=calls) for calls in (1, 2, 4, 8, 16))
    if "grouped_gemm" in kinds:
        found |= dict.fromkeys(_grouped_ops(spec, grid, dtype))
    wanted = [item for item in found if item.kind in kinds and item.kind in BUILDERS]
    if dtype == "bf16":  # a GPU's products in fp8 too, where the library takes their sizes
        products = [item for item in wanted if item.kind == "gemm" and not (item["n"] % 16 or item["k"] % 16)]
        wanted += [Op(item.kind, item.sizes, "fp8", item.variant) for item in products]
    return sorted(wanted, key=lambda item: (kinds.index(item.kind), item.memory_bytes + item.flop))


def _grouped_ops(spec: ModelSpec, grid: Grid, dtype: str) -> list[Op]:
    """Return both products of the experts for the grid's numbers of experts and rows."""
    inner, hidden = spec.expert_ffn_hidden_size, spec.hidden_size
    sizes = product(grid.experts, grid.expert_rows, ((2 * inner, hidden), (hidden, inner)))
    return [op("grouped_gemm", dtype=dtype, groups=e, m=rows, n=n, k=k) for e, rows, (n, k) in sizes if rows >= e]


def reuse_bytes(spec: ModelSpec, dtype: str, item: Op) -> float:
    """Return the weights that a decode step streams between two ops of the sort of ``item``, 0 if it has none.

    The step is one of as many tokens as the op has rows: the fewer there are, the fewer experts' weights pass.
    """
    rows = next((item[name] for name in ("rows", "tokens", "m", "batch") if name in item.dims), 4.0)
    if item.kind == "grouped_gemm":
        rows /= max(1.0, spec.expected_ffn_experts)
    return _streamed(spec, dtype, round(min(max(rows, 1.0), MOST_SEQUENCES))).get((item.kind, item.variant), 0.0)


@lru_cache(maxsize=64)
def _streamed(spec: ModelSpec, dtype: str, sequences: int) -> dict[tuple[str, str], float]:
    ops = step_ops(spec, "decode", sequences, 1, 256, dtype)
    streamed = sum(item.memory_bytes for item in ops if item.kind in ("gemm", "grouped_gemm"))
    counts = Counter((item.kind, item.variant) for item in ops)
    return {sort: streamed / count for sort, count in counts.items()}


def _sparse_ops(spec: ModelSpec, grid: Grid, dtype: str) -> list[Op]:
    """Return indexer scores and sparse cores of one device's decode, drafts included; none for a model without MLA."""
    if not spec.is_mla:
        return []
    heads, dim = spec.index_n_heads or 64, spec.index_head_dim or 128  # DeepSeek-V3.2's where the model has none
    found = [
        op("indexer", dtype=dtype, batch=batch, queries=queries, context=context, heads=heads, dim=dim)
        for batch in grid.sparse_batches
        for queries in (1, 2)
        for context in grid.indexed
    ]
    width: dict[str, Any] = {
        "heads": spec.num_attention_heads,
        "latent": spec.kv_lora_rank,
        "rope": spec.qk_rope_head_dim,
    }
    return found + [
        op("sparse_mla", dtype=dtype, batch=batch, queries=queries, selected=selected, **width)
        for batch in grid.sparse_batches
        for queries in (1, 2)
        for selected in grid.selected
    ]
