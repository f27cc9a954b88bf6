"""Device memory of a deployment, with a breakdown: weights, KV cache, activations, communication buffers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from longcat_sim.errors import MemoryFitError
from longcat_sim.ops.op import item_bytes
from longcat_sim.specs.deployment import Deployment, Routing
from longcat_sim.specs.hardware import HardwareSpec
from longcat_sim.specs.model import ModelSpec

RESERVED_BYTES = 3e9
"""CUDA context, library workspaces and graphs. Assumed: 2 to 4 GB is customary on 80 GB parts."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU by part, of ``capacity_bytes``."""

    parts: dict[str, float]
    capacity_bytes: float

    @property
    def total_bytes(self) -> float:
        """All parts together."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether the parts fit."""
        return self.total_bytes <= self.capacity_bytes

    @property
    def free_for_kv_bytes(self) -> float:
        """What is left for the KV cache beside the other parts."""
        return self.capacity_bytes - (self.total_bytes - self.parts["kv_cache"])


def weight_bytes(model: ModelSpec, deployment: Deployment, routing: Routing | None = None) -> dict[str, float]:
    """Return the bytes of weights on one GPU, by part."""
    weights, tp = item_bytes(deployment.precision.weights), deployment.tp_size
    parts = model.parameters_by_part
    experts = parts["experts"] * weights
    if deployment.ep_size > 1:
        slots = model.n_routed_experts + (routing.redundant_experts if routing else 0)
        experts *= slots / max(1, model.n_routed_experts) / deployment.ep_size
    else:
        experts /= tp
    shared = parts["shared_experts"] * weights / (tp if deployment.ep_size == 1 else 1)
    return {
        "attention_weights": parts["attention"] * weights / tp,
        "dense_ffn_weights": parts["dense_ffn"] * weights / deployment.dense_tp,
        "expert_weights": experts,
        "shared_expert_weights": shared,
        "router_and_norms": parts["router"] * 4.0 + parts["norms"] * 2.0,
        "embedding_and_head": 2.0 * (parts["embedding"] + parts["head"]) / tp,
    }


def draft_bytes(model: ModelSpec, deployment: Deployment) -> float:
    """Return the bytes of the MTP layer on one GPU: experts and attention are cut as those of the layers, and its FFN.

    The projection of the embedding beside the hidden state is whole on every GPU.
    """
    layers = model.num_nextn_predict_layers
    if not layers:
        return 0.0
    experts = 0.0 if model.layer_kind == "longcat" else float(layers * model.experts_parameters_per_layer)
    attention = float(layers * model.attention_parameters)
    projection = layers * 2.0 * model.hidden_size**2
    ffn = max(0.0, model.mtp_parameters - experts - attention - projection)
    cut = deployment.ep_size if deployment.ep_size > 1 else deployment.tp_size
    held = experts / cut + attention / deployment.tp_size + ffn / deployment.dense_tp + projection
    return item_bytes(deployment.precision.weights) * held


def kv_bytes_per_token(model: ModelSpec, deployment: Deployment, *, speculative: bool) -> float:
    """Return the cache bytes of one token on one GPU: every rank holds MLA's latent whole, GQA's heads are shared.

    A drafting MTP layer (``speculative``) attends too, and keeps a cache of its own.
    """
    per_token = model.kv_bytes_per_token(item_bytes(deployment.precision.kv_cache))
    if speculative:
        per_token *= 1.0 + model.num_nextn_predict_layers / model.num_attention_sublayers
    if model.is_mla:
        return per_token
    return per_token / min(deployment.tp_size, model.num_key_value_heads)


def memory(
    model: ModelSpec, deployment: Deployment, hardware: HardwareSpec, *, sequences_per_gpu: Any,
    tokens_per_sequence: Any, rows_per_gpu: float, decode: bool = True, speculative: bool = False,
    routing: Routing | None = None,
) -> Memory:  # fmt: skip
    """Return what one GPU holds during a step.

    Activations: the widest tensors of a layer, for the rows in flight. Low-latency exchange buffers: send and receive,
    twice, for every expert a slot per token of the busiest rank.

    Source: of the buffer formula, deepseek-ai/DeepEP ``csrc/config.hpp`` (low-latency size hint); activations are ours.
    """
    parts = weight_bytes(model, deployment, routing)
    if speculative:
        parts["draft_weights"] = draft_bytes(model, deployment)
    held = float(sequences_per_gpu) * deployment.tp_size * float(tokens_per_sequence)
    parts["kv_cache"] = held * kv_bytes_per_token(model, deployment, speculative=speculative)
    h = model.hidden_size
    rows = rows_per_gpu * deployment.tp_size
    wide = max(
        6 * h + 4 * model.num_attention_heads * (model.qk_head_dim + model.value_head_dim) / deployment.tp_size,
        6 * h + 3 * deployment.dense_tp * h + 4 * model.ffn_hidden_size,
    )
    logits = float(rows if decode else sequences_per_gpu) * model.vocab_size / deployment.tp_size * 4.0
    parts["activations"] = rows * wide * 2.0 + logits
    if deployment.ep_size > 1:
        message = max(h + 4 * h / 128, 2.0 * h) + 16
        if decode:
            slots = rows_per_gpu * model.n_routed_experts
            parts["exchange_buffers"] = 2.0 * (rows_per_gpu + slots + slots) * message
        else:
            copies = rows_per_gpu * min(model.moe_topk, 8)
            parts["exchange_buffers"] = 0.9e9 + copies * 3.0 * h
    parts["reserved"] = RESERVED_BYTES
    return Memory(parts, hardware.memory)


def check_memory(found: Memory, *, kv_bytes_per_sequence: float, where: str, sequences: float) -> None:
    """Raise MemoryFitError, with the sum written out and what would fit, unless the parts fit."""
    if found.fits:
        return
    shown = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in found.parts.items() if size >= 5e7)
    growing = sum(found.parts.get(name, 0.0) for name in ("kv_cache", "activations", "exchange_buffers"))
    room = found.capacity_bytes - (found.total_bytes - growing)
    fitting = int(room / max(growing, kv_bytes_per_sequence, 1.0) * sequences)
    if fitting >= 1:
        remedy = f"at most {fitting} sequences per GPU of this length fit; lower sequences_per_gpu or context_tokens"
    else:
        remedy = "weights and workspace leave no room; use more GPUs, a larger ep_size or dense_tp_size, or fewer bits"
    raise MemoryFitError(
        f"{where}: expected at most {found.capacity_bytes / 1e9:.1f} GB per GPU; got {found.total_bytes / 1e9:.1f} GB, "
        f"{(found.total_bytes - found.capacity_bytes) / 1e9:.1f} GB too much ({sequences:g} sequences; {shown} GB); "
        f"{remedy}"
    )
