"""The op kinds as the executable model runs them: one builder per kind returns what to time.

The vocabulary is that of the op graph. Where the model does more than one op in one call (attention cores hold the
absorption products or the expansion of the latents), the op is the call less the parts, timed in the same round. Small
steps that the graph does not name ride with a neighbour: the residual add with the norm behind it, the sort of token
copies with the router. Weights rotate through several copies, as layers do; activations stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longcat_sim.model import moe
from longcat_sim.model.attention import MLA, AttentionVariant
from longcat_sim.model.cache import LatentCache
from longcat_sim.model.layers import RMSNorm, rotate, swiglu
from longcat_sim.model.longcat import ABSORBED, LongcatFlash
from longcat_sim.model.sparse import Rows, attend, index_scores
from longcat_sim.ops.op import Op, loop_back_sms
from longcat_sim.profiling.place import POOL_BYTES, Place
from longcat_sim.profiling.timing import Run
from longcat_sim.specs.model import ModelSpec

FP8_COPIES = 20
"""Most copies of fp8 weights to rotate through: as many as a graph holds calls."""


@dataclass(frozen=True)
class Timed:
    """What to time for an op: ``run`` less ``less``, over ``divide`` ops."""

    run: Run
    less: tuple[Run, ...] = ()
    divide: int = 1


def _size(op: Op, name: str) -> int:
    return max(1, round(op[name]))


def _linear(place: Place, m: int, n: int, k: int) -> Run:
    weights, x = place.copies(n, k), place.values(m, k)
    layers = cycle([_layer_of(weight) for _, weight in zip(range(64), weights, strict=False)])
    return lambda: next(layers)(x)


def _layer_of(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def gemm(op: Op, spec: ModelSpec, place: Place) -> Timed:
    """Return a linear layer without bias; in fp8 the library's scaled product with bf16 output, one scale a tensor and
    sums in the tensor cores' own precision, as inference libraries do."""
    m, n, k = _size(op, "m"), _size(op, "n"), _size(op, "k")
    if op.dtype != "fp8":
        return Timed(_linear(place, m, n, k))
    x, one = place.values(m, k).to(torch.float8_e4m3fn), torch.ones(1, device=place.device)
    count = min(FP8_COPIES, max(1, POOL_BYTES["cuda"] // (n * k)))
    weights = cycle([place.values(n, k).to(torch.float8_e4m3fn).t() for _ in range(count)])
    tensorwise = F.ScalingType.TensorWise
    kinds: dict[str, Any] = {"output_dtype": torch.bfloat16, "use_fast_accum": True}
    return Timed(lambda: F.scaled_mm(x, next(weights), one, tensorwise, one, tensorwise, **kinds))


def bmm(op: Op, spec: ModelSpec, place: Place) -> Timed:
    """Return the absorption product, on the strided views that the model hands it."""
    groups, m, n, k = (_size(op, name) for name in ("groups", "m", "n", "k"))
    x = place.values(m, groups, k).transpose(0, 1)
    weights = place.copies(groups, k, n)
    return Timed(lambda: torch.bmm(x, next(weights)))


def grouped_gemm(op: Op, spec: ModelSpec, place: Place) -> Timed:
    """Return one product per expert, rows spread as random routing does; the library's grouped one on CUDA.

    On a CPU the model takes each expert's rows through all its steps in turn, so the gather, the activation and the
    gate ride with the first product, and the scatter with the second (``suites.step_ops`` leaves them out).
    """
    groups, m, n, k = (_size(op, name) for name in ("groups", "m", "n", "k"))
    groups = min(groups, m)
    counts = spread_rows(m, groups)
    weights = place.copies(groups, n, k)
    if place.device.type == "cuda":
        x = place.values(m, k)
        ends = torch.tensor(counts, device=place.device).cumsum(0).to(torch.int32)
        return Timed(lambda: F.grouped_mm(x, next(weights).transpose(1, 2), offs=ends))
    tokens = max(1, round(m / max(1.0, spec.expected_ffn_experts)))
    at, gates = (torch.arange(m) % tokens).split(counts), place.values(m, 1).split(counts)
    whole = place.values(tokens, spec.hidden_size)
    if k == spec.hidden_size:

        def run() -> None:
            for token, gate, weight in zip(at, gates, next(weights), strict=True):
                moe.expert_in(whole, token, weight, gate)

        return Timed(run)
    parts = place.values(m, k).split(counts)

    def back() -> None:
        for part, token, weight in zip(parts, at, next(weights), strict=True):
            moe.expert_out(part, weight, token, whole)

    return Timed(back)


def spread_rows(rows: int, groups: int) -> list[int]:
    """Return at least one row per group, the rest at random (fixed seed)."""
    generator = torch.Generator().manual_seed(rows * 1009 + groups)
    extra = torch.randint(groups, (rows - groups,), generator=generator)
    return (torch.bincount(extra, minlength=groups) + 1).tolist()


def _mla(spec: ModelSpec, place: Place) -> MLA:
    mla = MLA(spec, device=place.device, dtype=place.dtype)
    for parameter in mla.parameters():
        parameter.data.normal_(0, 0.02)
    return mla


def mla_decode(op: Op, spec: ModelSpec, place: Place) -> Timed:
    """Return the absorbed core less its two absorption products and the copy that joins queries and rope parts."""
    batch, queries, context = (_size(op, name) for name in ("batch", "queries", "context"))
    mla, rows = _mla(spec, place), batch * queries
    q = place.values(batch, queries, spec.num_attention_heads, spec.qk_head_dim)
    width = spec.kv_lora_rank + spec.qk_rope_head_dim
    latents = place.copies(batch, context, width)
    visible = None
    if queries > 1:
        at = torch.arange(context, device=place.device)
        last = torch.arange(context - queries, context, device=place.device)
        visible = (at <= last[:, None]).expand(batch, -1, -1)
    heads, latent = spec.num_attention_heads, spec.kv_lora_rank
    up = mla.kv_up.weight.view(heads, -1, latent)
    nope = spec.qk_nope_head_dim
    q_nTD = q[..., :nope].reshape(rows, heads, nope).transpose(0, 1)
    context_nTC = place.values(rows, heads, latent).transpose(0, 1)
    variant, rope = AttentionVariant(), q[..., nope:].reshape(rows, heads, -1)
    absorbed = place.values(heads, rows, latent).transpose(0, 1)
    return Timed(
        lambda: mla.absorbed_core(q, next(latents), visible, variant),
        (
            lambda: torch.bmm(q_nTD, up[:, :nope]),
            lambda: torch.bmm(context_nTC, up[:, nope:].transpose(1, 2)),
            lambda: torch.cat([absorbed, rope], dim=-1),
        ),
    )


def attention_prefill(op: Op, spec: ModelSpec, place: Place) -> Timed:
    """Return the naive core less the expansion of the latents and the copy of the keys."""
    batch, queries, context = (_size(op, name) for name in ("batch", "queries", "context"))
    mla = _mla(spec, place)
    q = place.values(batch, queries, spec.num_attention_heads, spec.qk_head_dim)
    latent = place.values(batch, context, spec.kv_lora_rank + spec.qk_rope_head_dim)
    concat = _concat_keys(spec, place, batch * context)
    expand = mla.kv_up
    narrow = latent[..., : spec.kv_lora_rank]
    return Timed(lambda: mla.naive_core(q, latent, None), (lambda: expand(narrow), concat))


def _concat_keys(spec: ModelSpec, place: Place, rows: int) -> Run:
    """Return the copy that puts expanded keys and the shared rope key side by side."""
    heads, nope = spec.num_attention_heads, spec.qk_nope_head_dim
    keys = place.values(rows, heads, nope + spec.v_head_dim)[..., :nope]
    rope = place.values(rows, 1, spec.qk_rope_head_dim)
    return lambda: torch.cat([keys, rope.expand(-1, heads, -1)], dim=-1)


def norm(op: Op, spec: ModelSpec, place: Place) -> Timed:
    """Return the norm; the variant ``residual`` has the add in front of it, which GPU engines fuse.

    The norms of latents read columns of a wider product and may scale by a gain, as in ``MLA.project``.
    """
    rows, width = _size(op, "rows"), _size(op, "width")
    layer = RMSNorm(width, 1e-5, device=place.device, dtype=place.dtype)
    latent = {spec.q_lora_rank: spec.mla_scale_q_lora * 0.5, spec.kv_lora_rank: spec.mla_scale_kv_lora}
    if spec.is_mla and width in latent and not op.variant:
        wide = place.values(rows, spec.q_lora_rank + spec.kv_lora_rank + spec.qk_rope_head_dim)
        return Timed(lambda: layer(wide[:, :width], latent[width]))
    x, y = place.values(rows, width), place.values(rows, width)
    if op.variant == "residual":
        return Timed(lambda: layer(x + y))
    return Timed(lambda: layer(x))


def elementwise(op: Op, spec: ModelSpec, place: Place) -> Timed:
    """Return the pass that the variant names, on tensors as the model has them there."""
    rows, width = _size(op, "rows"), _size(op, "width")
    heads, rope = spec.num_attention_heads, spec.qk_rope_head_dim
    match op.variant:
        case "silu":
            gate_up = place.values(rows, 2 * width)
            return Timed(lambda: swiglu(gate_up))
        case "rope":
            q, k = place.values(rows, heads, spec.qk_head_dim), place.values(rows, rope)
            cos, sin = place.values(rows, rope // 2).float(), place.values(rows, rope // 2).float()
            nope = spec.qk_nope_head_dim

            def rotate_all() -> None:
                q[..., nope:] = rotate(q[..., nope:], cos[:, None], sin[:, None])
                rotate(k, cos, sin)

            return Timed(rotate_all)
        case "write":
            latent, key = place.values(rows, max(1, width - rope)), place.values(rows, rope)
            pool = place.values(max(rows, 64), latent.shape[1] + rope)
            at = torch.arange(rows, device=place.device)
            return Timed(lambda: pool.index_copy_(0, at, torch.cat([latent, key], dim=-1)))
        case "concat":
            per_head = max(rope + 1, width // heads)
            left, right = place.values(rows, heads, per_head - rope), place.values(rows, 1, rope)
            return Timed(lambda: torch.cat([left, right.expand(-1, heads, -1)], dim=-1))
        case "cast":
            x = place.values(rows, width)
            return Timed(x.float)  # free where the model computes in fp32 already
        case "add":  # the layer's last sum; its other adds ride with the norms
            left, right = place.values(rows, width), place.values(rows, width)
            return Timed(lambda: left + right)
        case "zero":
            x, routing = place.values(rows, width), _random_routing(rows, spec, place.device)
            return Timed(lambda: moe.zero_experts(x, routing, spec.n_routed_experts))
    x, gate = place.values(rows, width), place.values(rows, 1)
    return Timed(lambda: x * gate)


def _random_routing(tokens: int, spec: ModelSpec, device: torch.device) -> moe.Routing:
    """Return the choice of other experts, at random, for each token."""
    choices = spec.n_routed_experts + spec.zero_expert_num
    chosen = torch.rand(tokens, choices, device=device).topk(min(spec.moe_topk, choices), -1)
    return moe.Routing(chosen.values, chosen.indices)


def router(op: Op, spec: ModelSpec, place: Place) -> Timed:
    """Return routing and the sort of token copies by expert."""
    tokens = _size(op, "tokens")
    layer = moe.Router(spec, device=place.device)
    layer.weight.data.normal_(0, 0.02)
    fp32 = Place(place.device, torch.float32)  # the cast is an op of its own
    tokens_TH = fp32.copies(tokens, spec.hidden_size)  # what sorts must meet new values (see ``topk``)
    experts = spec.n_routed_experts

    def run() -> None:
        routing = layer(next(tokens_TH))
        moe.sort_rows(routing, experts)

    return Timed(run)


def permute(op: Op, spec: ModelSpec, place: Place) -> Timed:
    """Return the gather of rows to experts and the scatter back, halved: the graph has both. A GPU's code alone: rows
    of zero-computation experts go along, for the host never learns how many there are (see ``suites.step_ops``)."""
    rows, width = _size(op, "rows"), _size(op, "width")
    tokens = max(1, round(rows / max(1, spec.moe_topk)))
    x, out = place.values(tokens, width), place.values(tokens, width)
    sorted_rows = moe.sort_rows(_random_routing(tokens, spec, place.device), spec.n_routed_experts)
    sorted_rows = sorted_rows._replace(counts=torch.as_tensor(sorted_rows.counts, device=place.device))
    moved = place.values(len(sorted_rows.token_N), width)

    def run() -> None:
        ends = moe.row_ends(sorted_rows)
        moe.gather_rows(x, sorted_rows)
        moe.scatter_rows(moved, sorted_rows, ends, out)

    return Timed(run, divide=2)


def topk(op: Op, spec: ModelSpec, place: Place) -> Timed:
    """Return the exact selection of the k largest scores, of other scores each time.

    A CPU's branch predictor learns up to some 16,000 scores by heart: the same 32 rows of 512 again and again took
    45 us, 64 rows 283 us.
    """
    rows, n, k = (_size(op, name) for name in ("rows", "n", "k"))
    scores = Place(place.device, torch.float32).copies(rows, n)
    return Timed(lambda: next(scores).topk(min(k, n), dim=-1))


def indexer(op: Op, spec: ModelSpec, place: Place) -> Timed:
    """Return the lightning indexer's scores against cached keys."""
    batch, queries, context, heads, dim = (_size(op, name) for name in ("batch", "queries", "context", "heads", "dim"))
    q, weight = place.values(batch, queries, heads, dim), place.values(batch, queries, heads)
    keys = place.copies(batch, context, dim)
    return Timed(lambda: index_scores(q, next(keys), weight))


def sparse_mla(op: Op, spec: ModelSpec, place: Place) -> Timed:
    """Return the gather of the selected latents and the absorbed core, one set for all heads of a query."""
    batch, queries, selected, heads = (_size(op, name) for name in ("batch", "queries", "selected", "heads"))
    latent, rope = _size(op, "latent"), _size(op, "rope")
    context = 2 * queries * selected  # a cache larger than what is read of it
    caches = place.copies(batch, 1, context, latent + rope)
    q = place.values(batch, heads, queries, latent + rope)
    chosen = torch.rand(batch, 1, queries, context, device=place.device).topk(selected).indices
    last = torch.full((batch, queries), context - 1, device=place.device)
    rows = Rows(last, torch.full_like(last, selected))

    def run() -> None:
        cache = next(caches)
        attend(q, cache, cache[..., :latent], chosen, rows, 1.0)

    return Timed(run)


def embedding(op: Op, spec: ModelSpec, place: Place) -> Timed:
    """Return the table look-up."""
    tokens, width = _size(op, "tokens"), _size(op, "width")
    table = nn.Embedding(min(spec.vocab_size, 65536), width, device=place.device, dtype=place.dtype)
    at = torch.randint(table.num_embeddings, (tokens,), device=place.device)
    return Timed(lambda: table(at))


def sampling(op: Op, spec: ModelSpec, place: Place) -> Timed:
    """Return the greedy choice."""
    logits = place.values(_size(op, "rows"), _size(op, "vocab"))
    return Timed(lambda: logits.float().argmax(-1))


def host(op: Op, spec: ModelSpec, place: Place) -> Timed:
    """Return the host's work before a step: positions and places in the cache, for 8 sequences."""
    small = spec.replace(num_layers=1, n_routed_experts=1, zero_expert_num=0, moe_topk=1, vocab_size=64)
    model = LongcatFlash(small, device=place.device, dtype=place.dtype)
    cache = LatentCache(small, num_sequences=8, max_tokens=64, device=place.device, dtype=place.dtype)
    cache.extend(range(8), 32)
    calls = _size(op, "calls")

    def run() -> None:
        for _ in range(calls):
            model.step(8, 1, cache, None, ABSORBED, grow=False)

    return Timed(run)


def dispatch(op: Op, spec: ModelSpec, place: Place) -> Timed:
    """Return an exchange that loops back on a GPU: a copy of the message by as many SMs as an exchange's kernels take.

    Raises:
        RuntimeError: no Triton here.
    """
    try:
        from longcat_sim.model.few_sms import copy_by_few
    except ImportError as error:
        raise RuntimeError(f"exchanges by few SMs need Triton: {error}") from None
    rows = place.values(max(4, round(op["message_bytes"] / place.dtype.itemsize)))
    moved = torch.empty_like(rows)
    return Timed(lambda: copy_by_few(rows, moved, loop_back_sms(op)))


BUILDERS: dict[str, Callable[[Op, ModelSpec, Place], Timed]] = {
    "gemm": gemm,
    "bmm": bmm,
    "grouped_gemm": grouped_gemm,
    "mla_decode": mla_decode,
    "attention_prefill": attention_prefill,
    "norm": norm,
    "elementwise": elementwise,
    "router": router,
    "permute": permute,
    "topk": topk,
    "indexer": indexer,
    "sparse_mla": sparse_mla,
    "embedding": embedding,
    "sampling": sampling,
    "host": host,
    "dispatch": dispatch,
}
"""Kind -> builder."""
