"""``ModelSpec``: a model as published, frozen, and the parameters, KV bytes and FLOP that follow from its sizes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from longcat_sim.errors import SpecError
from longcat_sim.specs.hf_config import fields_of, read_config
from longcat_sim.specs.loading import sentence
from longcat_sim.specs.model_shape import ModelShape


class ModelSpec(ModelShape):
    """One published model. Build with ``from_hf_config`` or ``model_spec``."""

    @classmethod
    def from_hf_config(cls, source: str | Path | Mapping[str, Any], **changes: Any) -> ModelSpec:
        """Return the spec of a published config: a path, a folder with ``config.json``, or its keys as a dict.

        Raises:
            SpecError: a file that cannot be read, an unknown ``model_type``, or keys that are missing, mistyped,
                negative or contradictory; all faults at once.
        """
        raw, where = read_config(source)
        return _checked({**fields_of(raw, where), **changes}, where)

    def replace(self, **changes: Any) -> ModelSpec:
        """Return a copy with some fields changed, checked again.

        Raises:
            SpecError: an unknown field or a wrong value.
        """
        fields = {**self.model_dump(), **changes}
        if "expected_ffn_experts" not in changes and {"n_routed_experts", "zero_expert_num", "moe_topk"} & set(changes):
            fields["expected_ffn_experts"] = 0.0
        return _checked(fields, self.name or self.model_type)

    # --- parameters --------------------------------------------------------------------------------------------

    @cached_property
    def attention_parameters(self) -> int:
        """Parameters of one attention block with its inner norms, the indexer included where there is one."""
        h, heads = self.hidden_size, self.num_attention_heads
        if not self.is_mla:
            kv = 2 * self.num_key_value_heads * self.head_dim
            bias = (heads * self.head_dim + kv + h) if self.attention_bias else 0
            qk_norms = 2 * self.head_dim if self.model_type.startswith("qwen3") else 0
            return h * heads * self.head_dim * 2 + h * kv + bias + qk_norms
        query = h * self.q_lora_rank + self.q_lora_rank + self.q_lora_rank * heads * self.qk_head_dim
        latent = h * (self.kv_lora_rank + self.qk_rope_head_dim) + self.kv_lora_rank
        expand = self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
        bias = (self.q_lora_rank + self.kv_lora_rank + self.qk_rope_head_dim + h) if self.attention_bias else 0
        return query + latent + expand + heads * self.v_head_dim * h + bias + self.indexer_parameters

    @cached_property
    def indexer_parameters(self) -> int:
        """Parameters of one lightning indexer: query, key and head-weight projections and the key's LayerNorm.

        Source: transformers 5, ``modeling_deepseek_v32.py``.
        """
        if not self.index_topk:
            return 0
        query = self.q_lora_rank * self.index_n_heads * self.index_head_dim
        return query + self.hidden_size * (self.index_head_dim + self.index_n_heads) + 2 * self.index_head_dim

    @property
    def ffn_parameters(self) -> int:
        """Parameters of one dense FFN: gate, up and down."""
        return 3 * self.hidden_size * self.ffn_hidden_size

    @property
    def expert_parameters(self) -> int:
        """Parameters of one FFN expert; a zero-computation expert has none."""
        return 3 * self.hidden_size * self.expert_ffn_hidden_size

    @property
    def experts_parameters_per_layer(self) -> int:
        """Parameters of the routed experts of one layer."""
        return self.n_routed_experts * self.expert_parameters

    @property
    def shared_expert_parameters(self) -> int:
        """Parameters of the shared experts of one layer."""
        return self.n_shared_experts * self.expert_parameters

    @property
    def router_parameters(self) -> int:
        """Parameters of one router, its bias buffer not counted."""
        return self.hidden_size * (self.n_routed_experts + self.zero_expert_num)

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the input embedding."""
        return self.vocab_size * self.hidden_size

    @property
    def head_parameters(self) -> int:
        """Parameters that the output projection reads, tied or not."""
        return self.vocab_size * self.hidden_size

    @property
    def mtp_parameters(self) -> int:
        """Parameters of the MTP heads, embedding and output projection shared.

        LongCat-Flash's head is one dense layer. Source: arXiv 2509.01322v2, section 2.4. DeepSeek's is a MoE layer.
        """
        h = self.hidden_size
        joined = 2 * h * h + 2 * h + h  # eh_proj, enorm and hnorm, final norm
        body = self.attention_parameters + 2 * h
        if self.layer_kind == "longcat":
            body += self.ffn_parameters
        else:
            body += self.experts_parameters_per_layer + self.shared_expert_parameters + self.router_parameters
        return self.num_nextn_predict_layers * (joined + body)

    @cached_property
    def parameters_by_part(self) -> dict[str, int]:
        """Parameters of each part of the whole model; they add up to ``num_parameters``, MTP apart."""
        norms = 2 * self.num_layers * self.hidden_size * (2 if self.layer_kind == "longcat" else 1) + self.hidden_size
        return {
            "embedding": self.embedding_parameters,
            "attention": self.num_attention_sublayers * self.attention_parameters,
            "dense_ffn": self.num_dense_ffns * self.ffn_parameters,
            "experts": self.num_moe_layers * self.experts_parameters_per_layer,
            "shared_experts": self.num_moe_layers * self.shared_expert_parameters,
            "router": self.num_moe_layers * self.router_parameters,
            "norms": norms,
            "head": 0 if self.tie_word_embeddings else self.head_parameters,
        }

    @property
    def num_parameters(self) -> int:
        """Parameters without MTP."""
        return sum(self.parameters_by_part.values())

    def num_active_parameters(self, ffn_experts: float | None = None) -> float:
        """Return the parameters that one token uses, the input embedding not counted.

        ``ffn_experts`` is the number of FFN experts of the token in each layer (default: the expected number).
        """
        parts = self.parameters_by_part
        chosen = self.expected_ffn_experts if ffn_experts is None else ffn_experts
        fixed = sum(parts[part] for part in ("attention", "dense_ffn", "shared_experts", "router", "norms"))
        return fixed + self.head_parameters + self.num_moe_layers * chosen * self.expert_parameters

    # --- KV cache and FLOP -------------------------------------------------------------------------------------

    def kv_values_per_token(self) -> int:
        """Return the cached values of one token in one attention block (latent and rope key, or keys and values)."""
        if self.is_mla:
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * self.num_key_value_heads * self.head_dim

    def kv_bytes_per_token(
        self,
        bytes_per_value: float = 2.0,
        *,
        rope_bytes_per_value: float | None = None,
        index_bytes_per_value: float | None = None,
    ) -> float:
        """Return the cache bytes of one token over all layers, the indexer's keys included where there are any.

        The rope key and the indexer key may be held in another width than the latent.
        """
        rope = bytes_per_value if rope_bytes_per_value is None else rope_bytes_per_value
        index = bytes_per_value if index_bytes_per_value is None else index_bytes_per_value
        if self.is_mla:
            block = self.kv_lora_rank * bytes_per_value + self.qk_rope_head_dim * rope
        else:
            block = self.kv_values_per_token() * bytes_per_value
        index_keys = self.index_head_dim * index if self.index_topk else 0.0
        return self.num_attention_sublayers * (block + index_keys)

    def flop_per_token(
        self, context_tokens: float, *, phase: Literal["decode", "prefill"] = "decode", ffn_experts: float | None = None
    ) -> dict[str, float]:
        """Return the FLOP of one token by part, with ``context_tokens`` positions to attend to (a mean, in prefill).

        Linear maps cost 2 FLOP per parameter. The core of MLA attention is absorbed in decode (every head reads the
        latent; absorbing costs what expanding would) and naive in prefill.
        """
        parts, heads = self.parameters_by_part, self.num_attention_heads
        chosen = self.expected_ffn_experts if ffn_experts is None else ffn_experts
        attended = min(context_tokens, self.index_topk) if self.index_topk else context_tokens
        if self.is_mla and phase == "decode":
            width = 2 * self.kv_lora_rank + self.qk_rope_head_dim
        else:
            width = self.qk_head_dim + self.value_head_dim
        indexer = 2.0 * context_tokens * self.index_n_heads * self.index_head_dim if self.index_topk else 0.0
        return {
            "attention_projections": 2.0 * parts["attention"],
            "attention_core": self.num_attention_sublayers * 2.0 * heads * attended * width,
            "indexer": self.num_attention_sublayers * indexer,
            "dense_ffn": 2.0 * parts["dense_ffn"],
            "shared_experts": 2.0 * parts["shared_experts"],
            "experts": 2.0 * self.num_moe_layers * chosen * self.expert_parameters,
            "router": 2.0 * parts["router"],
            "head": 2.0 * self.head_parameters,
        }


def _checked(fields: Mapping[str, Any], where: str) -> ModelSpec:
    """Return the checked spec; pydantic's faults become ours, all at once."""
    try:
        return ModelSpec.model_validate(dict(fields))
    except ValidationError as error:
        faults = []
        for fault in error.errors():
            key = ".".join(str(at) for at in fault["loc"])
            got = f"; got {fault['input']!r}" if key and fault["type"] == "value_error" else ""
            for line in sentence(fault, ModelSpec).splitlines():
                faults.append(f"{where}: {key + ': ' if key else ''}{line}{got}")
        raise SpecError(faults) from None


def model_names() -> list[str]:
    """Return the names of the packaged models."""
    folder = resources.files("longcat_sim.presets") / "models"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def model_spec(name_or_path: str | Path, **changes: Any) -> ModelSpec:
    """Return a packaged model by name, or the model of a published ``config.json`` by path.

    Raises:
        SpecError: no such name or path (the message lists the names), or a config that cannot be used.
    """
    name = str(name_or_path)
    names = model_names()
    if name in names:
        return _packaged(name) if not changes else _read_packaged(name, **changes)
    if Path(name).exists():
        path = Path(name).resolve()
        known = path.parent.name if path.name == "config.json" else path.stem
        return ModelSpec.from_hf_config(name, **{"name": known, **changes})
    raise SpecError(
        f"model: expected a path to a published config.json or one of {', '.join(names)}; got {name!r}; choose one"
    )


@lru_cache(maxsize=64)
def _packaged(name: str) -> ModelSpec:
    """Return a packaged model unchanged, read once."""
    return _read_packaged(name)


def _read_packaged(name: str, **changes: Any) -> ModelSpec:
    text = (resources.files("longcat_sim.presets") / "models" / f"{name}.yaml").read_text(encoding="utf-8")
    raw = yaml.safe_load(text)
    return _checked(
        {**fields_of(raw, name), "name": name, "source": str(raw.get("source", "")), **changes}, f"model {name}"
    )
