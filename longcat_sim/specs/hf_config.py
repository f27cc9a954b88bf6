"""Read a published ``config.json`` into the fields of a ``ModelSpec``: the keys of each model type, and their faults.

Source: the configuration classes of transformers 5 (``configuration_longcat_flash.py``, ``..._deepseek_v3.py``,
``..._deepseek_v32.py``, ``..._qwen3.py``, ``..._qwen3_moe.py``, ``..._llama.py``) and the published config files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longcat_sim.errors import SpecError

# field of ModelSpec -> keys of the config file that hold it, first found wins
_COMMON: dict[str, tuple[str, ...]] = {
    "hidden_size": ("hidden_size",),
    "num_layers": ("num_hidden_layers",),
    "vocab_size": ("vocab_size",),
    "num_attention_heads": ("num_attention_heads",),
    "ffn_hidden_size": ("intermediate_size",),
}
_MLA = {key: (key,) for key in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")}
_DEEPSEEK = {
    **_COMMON,
    **_MLA,
    "n_routed_experts": ("n_routed_experts", "num_local_experts"),
    "moe_topk": ("num_experts_per_tok",),
    "expert_ffn_hidden_size": ("moe_intermediate_size",),
}
REQUIRED: dict[str, dict[str, tuple[str, ...]]] = {
    "longcat_flash": {
        **_COMMON,
        **_MLA,
        "num_layers": ("num_layers",),
        "ffn_hidden_size": ("ffn_hidden_size", "intermediate_size"),
        "expert_ffn_hidden_size": ("expert_ffn_hidden_size", "moe_intermediate_size"),
        "n_routed_experts": ("n_routed_experts", "num_local_experts"),
        "zero_expert_num": ("zero_expert_num",),
        "moe_topk": ("moe_topk", "num_experts_per_tok"),
    },
    "deepseek_v3": _DEEPSEEK,
    "deepseek_v32": {
        **_DEEPSEEK,
        "index_topk": ("index_topk",),
        "index_n_heads": ("index_n_heads",),
        "index_head_dim": ("index_head_dim",),
    },
    "qwen3": _COMMON,
    "qwen3_moe": {
        **_COMMON,
        "n_routed_experts": ("num_experts", "num_local_experts"),
        "moe_topk": ("num_experts_per_tok",),
        "expert_ffn_hidden_size": ("moe_intermediate_size",),
    },
    "llama": _COMMON,
}
MAY_BE_ZERO = frozenset({"zero_expert_num"})
# optional field -> (keys, default, accepted types)
_OPTIONAL: dict[str, tuple[tuple[str, ...], Any, type | tuple[type, ...]]] = {
    "num_key_value_heads": (("num_key_value_heads",), None, int),
    "head_dim": (("head_dim",), None, int),
    "n_shared_experts": (("n_shared_experts",), 0, int),
    "first_k_dense_replace": (("first_k_dense_replace",), 0, int),
    "decoder_sparse_step": (("decoder_sparse_step",), 1, int),
    "norm_topk_prob": (("norm_topk_prob",), False, bool),
    "routed_scaling_factor": (("routed_scaling_factor",), 1.0, (int, float)),
    "num_nextn_predict_layers": (("num_nextn_predict_layers", "num_mtp_layers"), 0, int),
    "rms_norm_eps": (("rms_norm_eps",), 1e-6, (int, float)),
    "max_position_embeddings": (("max_position_embeddings",), 131072, int),
    "tie_word_embeddings": (("tie_word_embeddings",), False, bool),
    "attention_bias": (("attention_bias",), False, bool),
    "initializer_range": (("initializer_range",), 0.02, (int, float)),
}
_LONGCAT: dict[str, float] = {
    "rms_norm_eps": 1e-5,
    "routed_scaling_factor": 6.0,
    "num_nextn_predict_layers": 1,
}
_ROPE_THETA = {"longcat_flash": 1e7}


def read_config(source: str | Path | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the raw keys of a config file (or of a folder that holds one) or a dict, and where they are from.

    Raises:
        SpecError: the file is missing, is not JSON, or is not one JSON object.
    """
    if isinstance(source, Mapping):
        return dict(source), "config"
    path = Path(source)
    if path.is_dir():
        path = path / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"{path}: expected a published config.json; {error.strerror}; check the path") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: expected JSON; got {error}; download the file again") from None
    if not isinstance(raw, dict):
        raise SpecError(f"{path}: expected one JSON object of keys; got a {type(raw).__name__}")
    return raw, str(path)


def fields_of(raw: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the ``ModelSpec`` fields of a raw config.

    Raises:
        SpecError: an unknown ``model_type``, or missing, mistyped or negative keys, all of them at once.
    """
    model_type = raw.get("model_type")
    if model_type not in REQUIRED:
        known = ", ".join(REQUIRED)
        raise SpecError(f"{where}: model_type: expected one of {known}; got {model_type!r}; use one of these models")
    faults: list[str] = []
    fields: dict[str, Any] = {"model_type": model_type}
    for name, keys in REQUIRED[model_type].items():
        key, value = _first(raw, keys)
        least = 0 if name in MAY_BE_ZERO else 1
        if value is None:
            faults.append(f"{where}: {keys[0]}: expected an integer such as {_EXAMPLE.get(name, 64)}; it is missing")
        elif isinstance(value, bool) or not isinstance(value, int) or value < least:
            faults.append(f"{where}: {key}: expected an integer >= {least}; got {value!r}")
        else:
            fields[name] = value
    for name, (keys, default, types) in _OPTIONAL.items():
        if model_type == "longcat_flash":
            default = _LONGCAT.get(name, default)
        key, value = _first(raw, keys)
        if value is None:
            fields[name] = default
        elif not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
            expected = types.__name__ if isinstance(types, type) else "number"
            faults.append(f"{where}: {key}: expected a {expected}; got {value!r}")
        elif isinstance(value, (int, float)) and value < 0:
            faults.append(f"{where}: {key}: expected a value >= 0; got {value!r}")
        else:
            fields[name] = value
    fields |= _rope(raw, model_type, where, faults)
    if model_type == "longcat_flash":
        fields |= _longcat(raw, where, faults)
    elif model_type.startswith("deepseek"):
        fields["scoring_func"] = raw.get("scoring_func", "sigmoid")
        fields["n_group"], fields["topk_group"] = raw.get("n_group") or 1, raw.get("topk_group") or 1
    if isinstance(raw.get("mlp_layer_types"), list):
        fields["mlp_layer_types"] = tuple(raw["mlp_layer_types"])
    if raw.get("mlp_only_layers"):
        fields["mlp_only_layers"] = tuple(raw["mlp_only_layers"])
    if faults:
        raise SpecError(faults)
    return fields


_EXAMPLE = {"hidden_size": 6144, "num_layers": 28, "vocab_size": 131072, "n_routed_experts": 512, "moe_topk": 12}


def _first(raw: Mapping[str, Any], keys: tuple[str, ...]) -> tuple[str, Any]:
    """Return the first of ``keys`` that is set, and its value; None where none is."""
    for key in keys:
        if raw.get(key) is not None:
            return key, raw[key]
    return keys[0], None


def _rope(raw: Mapping[str, Any], model_type: str, where: str, faults: list[str]) -> dict[str, Any]:
    """Return rope_theta and rope_scaling from either form (transformers 4 top-level keys, 5 ``rope_parameters``)."""
    nested = raw.get("rope_parameters") or {}
    scaling = raw.get("rope_scaling") or {key: v for key, v in nested.items() if key != "rope_theta"}
    theta = raw.get("rope_theta", nested.get("rope_theta", _ROPE_THETA.get(model_type, 10000.0)))
    if isinstance(theta, bool) or not isinstance(theta, (int, float)) or theta <= 0:
        faults.append(f"{where}: rope_theta: expected a number > 0 such as 10000000.0; got {theta!r}")
        theta = 1.0
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return {"rope_theta": float(theta), "rope_type": str(kind)}


def _longcat(raw: Mapping[str, Any], where: str, faults: list[str]) -> dict[str, Any]:
    """Return the fields that only LongCat-Flash has, and add the faults of variants that we do not know."""
    if raw.get("zero_expert_type", "identity") != "identity":
        faults.append(f"{where}: zero_expert_type: expected identity; got {raw['zero_expert_type']!r}")
    for key in ("mla_scale_q_lora", "mla_scale_kv_lora"):
        if raw.get(key, True) is not True:
            faults.append(f"{where}: {key}: expected true (as in the published model); got {raw[key]!r}")
    if raw.get("router_bias"):
        faults.append(f"{where}: router_bias: expected false (as in the published model); got {raw['router_bias']!r}")
    return {"scoring_func": "softmax"}
