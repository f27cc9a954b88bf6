"""``ModelShape``: the sizes of a published model, checked, and the layers that they make.

Keys keep the names of the published config files. Where two families name one thing differently the spec uses the
LongCat-Flash name (``moe_topk``) and also answers to the other (``num_experts_per_tok``).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Literal

from pydantic import Field, model_validator

from longcat_sim.specs.base import Count, Part

LayerKind = Literal["longcat", "moe", "dense"]
NonNegative = Field(default=0, ge=0)


class ModelShape(Part):
    """Sizes and layers of one model; ``ModelSpec`` adds what follows from them."""

    model_type: str
    name: str = ""
    source: str = ""
    hidden_size: Count
    num_layers: Count
    """Transformer layers without MTP; a LongCat-Flash layer holds two attention sublayers."""
    vocab_size: Count
    num_attention_heads: Count
    num_key_value_heads: Count
    """Heads of the KV cache; of MLA, formally, the attention heads."""
    head_dim: Count
    """Width of a query-key head of GQA; of MLA the rope part's."""
    q_lora_rank: int = NonNegative
    kv_lora_rank: int = NonNegative
    """Width of the cached latent; 0 says that the attention is GQA."""
    qk_nope_head_dim: int = NonNegative
    qk_rope_head_dim: int = NonNegative
    v_head_dim: int = NonNegative
    ffn_hidden_size: Count
    expert_ffn_hidden_size: int = NonNegative
    n_routed_experts: int = NonNegative
    """FFN experts of a layer, the zero-computation ones not counted."""
    zero_expert_num: int = NonNegative
    n_shared_experts: int = NonNegative
    moe_topk: int = NonNegative
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    n_group: Count = 1
    topk_group: Count = 1
    first_k_dense_replace: int = NonNegative
    decoder_sparse_step: Count = 1
    mlp_layer_types: tuple[str, ...] = ()
    mlp_only_layers: tuple[int, ...] = ()
    index_topk: int = NonNegative
    index_n_heads: int = NonNegative
    index_head_dim: int = NonNegative
    num_nextn_predict_layers: int = NonNegative
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    rope_theta: float = Field(default=10000.0, gt=0)
    rope_type: str = "default"
    max_position_embeddings: Count = 131072
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    initializer_range: float = Field(default=0.02, gt=0)
    expected_ffn_experts: float = Field(default=0.0, ge=0)
    """Mean FFN experts of a token in one layer; LongCat-Flash is trained towards 8 of its 12 choices."""

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        """Fill what follows from other keys."""
        if isinstance(data, Mapping):
            data = dict(data)
            # what is no number is a fault of its own key, found later
            known = {name: value for name, value in data.items() if isinstance(value, int | float)}
            heads, experts = known.get("num_attention_heads"), known.get("n_routed_experts", 0)
            if not data.get("num_key_value_heads"):
                data["num_key_value_heads"] = data.get("num_attention_heads")
            if not data.get("head_dim") and known.get("hidden_size") and heads:
                data["head_dim"] = known.get("qk_rope_head_dim") or known["hidden_size"] // heads
            choices = experts + known.get("zero_expert_num", 0)
            if not data.get("expected_ffn_experts") and experts and choices:
                data["expected_ffn_experts"] = known.get("moe_topk", 0) * experts / choices
        return data

    @model_validator(mode="after")
    def _consistent(self) -> ModelShape:
        faults = []
        choices = self.n_routed_experts + self.zero_expert_num
        if self.moe_topk > choices:
            faults.append(
                f"moe_topk: expected at most n_routed_experts + zero_expert_num = {choices}; got {self.moe_topk}"
            )
        if self.n_routed_experts and not self.moe_topk:
            faults.append(f"moe_topk: expected >= 1 where n_routed_experts = {self.n_routed_experts}; got 0")
        if self.expected_ffn_experts > self.moe_topk:
            faults.append(
                f"expected_ffn_experts: expected at most moe_topk = {self.moe_topk}; got {self.expected_ffn_experts:g}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            faults.append(
                f"num_key_value_heads must divide num_attention_heads: {self.num_attention_heads} % "
                f"{self.num_key_value_heads} = {self.num_attention_heads % self.num_key_value_heads}"
            )
        if self.mlp_layer_types and len(self.mlp_layer_types) != self.num_layers:
            faults.append(
                f"mlp_layer_types: expected {self.num_layers} entries (num_layers); got {len(self.mlp_layer_types)}"
            )
        if (self.qk_rope_head_dim or self.head_dim) % 2:
            faults.append(f"qk_rope_head_dim: expected an even number; got {self.qk_rope_head_dim or self.head_dim}")
        if faults:
            raise ValueError("\n".join(faults))
        return self

    # --- kinds -------------------------------------------------------------------------------------------------

    @property
    def is_mla(self) -> bool:
        """Whether attention caches a latent (MLA) and not keys and values (GQA)."""
        return self.kv_lora_rank > 0

    @property
    def layer_kind(self) -> LayerKind:
        """Kind of the layers that make most of the model."""
        if self.model_type == "longcat_flash":
            return "longcat"
        return "moe" if self.n_routed_experts else "dense"

    @cached_property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """Kind of each layer: DeepSeek's first layers are dense, Qwen's may be by ``decoder_sparse_step``."""
        if self.layer_kind != "moe":
            return (self.layer_kind,) * self.num_layers
        if self.mlp_layer_types:
            return tuple("dense" if kind == "dense" else "moe" for kind in self.mlp_layer_types)
        return tuple(
            "dense"
            if i < self.first_k_dense_replace or i in self.mlp_only_layers or (i + 1) % self.decoder_sparse_step
            else "moe"
            for i in range(self.num_layers)
        )

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts."""
        return sum(kind != "dense" for kind in self.layer_kinds)

    @property
    def num_attention_sublayers(self) -> int:
        """Attention blocks, each with its own KV cache: two per LongCat-Flash layer."""
        return self.num_layers * (2 if self.layer_kind == "longcat" else 1)

    @property
    def num_dense_ffns(self) -> int:
        """Dense FFN blocks: two per LongCat-Flash layer, one per dense layer."""
        if self.layer_kind == "longcat":
            return 2 * self.num_layers
        return self.num_layers - self.num_moe_layers

    # other families' names
    @property
    def num_hidden_layers(self) -> int:
        """``num_layers``."""
        return self.num_layers

    @property
    def intermediate_size(self) -> int:
        """``ffn_hidden_size``."""
        return self.ffn_hidden_size

    @property
    def moe_intermediate_size(self) -> int:
        """``expert_ffn_hidden_size``."""
        return self.expert_ffn_hidden_size

    @property
    def num_experts_per_tok(self) -> int:
        """``moe_topk``."""
        return self.moe_topk

    @property
    def num_experts(self) -> int:
        """``n_routed_experts``."""
        return self.n_routed_experts

    @property
    def qk_head_dim(self) -> int:
        """Width of a query-key head, rope part included."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim if self.is_mla else self.head_dim

    @property
    def value_head_dim(self) -> int:
        """Width of a value head."""
        return self.v_head_dim if self.is_mla else self.head_dim

    @property
    def mla_scale_q_lora(self) -> float:
        """alpha_q of LongCat-Flash's MLA. Source: arXiv 2509.01322v2, Eq. 7."""
        return (self.hidden_size / self.q_lora_rank) ** 0.5 if self.layer_kind == "longcat" else 1.0

    @property
    def mla_scale_kv_lora(self) -> float:
        """alpha_kv of LongCat-Flash's MLA. Source: arXiv 2509.01322v2, Eq. 7."""
        return (self.hidden_size / self.kv_lora_rank) ** 0.5 if self.layer_kind == "longcat" else 1.0
