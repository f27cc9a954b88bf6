"""The small LongCat-Flash models of the study, and how long each part trains."""

from __future__ import annotations

from longcat_sim.specs.model import ModelSpec

HEAD = 16
"""Width of a head's content part and value; its rope part has half."""


def small_spec(
    hidden: int, layers: int, *, experts: int, zero: int, topk: int, expert_width: int, scale: float | None = None
) -> ModelSpec:
    """Return a byte-level LongCat-Flash: dense FFN 2 x hidden, ranks hidden / 2 and hidden / 4.

    ``scale`` (gamma) is by default the ratio of FFN widths, as published (12288 / 2048 = 6).
    """
    heads = hidden // HEAD
    return ModelSpec(
        model_type="longcat_flash",
        name=f"study-h{hidden}-l{layers}-e{experts}+{zero}",
        hidden_size=hidden,
        num_layers=layers,
        vocab_size=256,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=HEAD // 2,
        q_lora_rank=hidden // 2,
        kv_lora_rank=hidden // 4,
        qk_nope_head_dim=HEAD,
        qk_rope_head_dim=HEAD // 2,
        v_head_dim=HEAD,
        ffn_hidden_size=2 * hidden,
        expert_ffn_hidden_size=expert_width,
        n_routed_experts=experts,
        zero_expert_num=zero,
        moe_topk=topk,
        routed_scaling_factor=2 * hidden / expert_width if scale is None else scale,
        rms_norm_eps=1e-5,
        max_position_embeddings=4096,
        num_nextn_predict_layers=1,
    )


def published_ratio_spec(experts: int = 32) -> ModelSpec:
    """Return the model of the budget and routing parts: N : Z = 2 : 1 and K = 12, of which K_e = 8, as published."""
    return small_spec(64, 2, experts=experts, zero=experts // 2, topk=12, expert_width=16)


def short_spec(hidden: int = 64, layers: int = 1) -> ModelSpec:
    """Return the model of the parts with many runs: 16 + 8 experts, K = 6, of which K_e = 4."""
    return small_spec(hidden, layers, experts=16, zero=8, topk=6, expert_width=hidden // 2)
