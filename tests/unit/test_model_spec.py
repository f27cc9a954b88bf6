"""Parameter, KV and FLOP counts of published models, and the faults of a wrong config."""

import subprocess
import sys

import pytest

from longcat_sim.errors import SpecError
from longcat_sim.specs.model import ModelSpec, model_names, model_spec


@pytest.mark.parametrize(
    ("name", "parameters", "active", "kv_bytes"),
    [
        # published: 560 B, "approximately 27 B"; arithmetic in the architecture table of arXiv 2509.01322v2
        ("longcat-flash", 560.66e9, 27.15e9, 64512),
        ("deepseek-v3", 671.03e9, 36.63e9, 70272),  # published: 671 B, 37 B with the embedding
        ("qwen3-32b", 32.76e9, 31.98e9, 262144),  # published: 32.8 B
        ("qwen3-235b-a22b", 235.09e9, 21.57e9, 192512),  # published: 235 B, 22 B
        ("llama-3.1-8b", 8.030e9, 7.505e9, 131072),  # published: 8.03 B
    ],
)
def test_counts_of_published_models(name, parameters, active, kv_bytes):
    spec = model_spec(name)
    assert spec.num_parameters == pytest.approx(parameters, rel=2e-4)
    assert spec.num_active_parameters() == pytest.approx(active, rel=3e-4)
    assert spec.kv_bytes_per_token(bytes_per_value=2) == kv_bytes
    assert sum(spec.parameters_by_part.values()) == spec.num_parameters


def test_longcat_activates_between_18_6_and_31_3_billion():
    # Source: arXiv 2509.01322v2, abstract (printed truncated)
    spec = model_spec("longcat-flash")
    assert spec.num_active_parameters(ffn_experts=0) == pytest.approx(18.69e9, rel=1e-3)
    assert spec.num_active_parameters(ffn_experts=12) == pytest.approx(31.38e9, rel=1e-3)
    assert spec.expected_ffn_experts == 8
    assert spec.replace(expected_ffn_experts=7.5).num_active_parameters() < spec.num_active_parameters()
    assert spec.mtp_parameters == pytest.approx(0.393e9, rel=2e-3)
    assert (spec.mla_scale_q_lora, round(spec.mla_scale_kv_lora, 4)) == (2.0, 3.4641)


def test_kv_bytes_of_mixed_precision():
    # 56 sublayers x (512 x 1 B + 64 x 2 B)
    assert model_spec("longcat-flash").kv_bytes_per_token(1, rope_bytes_per_value=2) == 35840
    indexed = model_spec("deepseek-v3.2")
    assert indexed.kv_bytes_per_token(2) - model_spec("deepseek-v3").kv_bytes_per_token(2) == 61 * 128 * 2


def test_layer_kinds():
    assert model_spec("deepseek-v3").layer_kinds == ("dense",) * 3 + ("moe",) * 58
    assert set(model_spec("longcat-flash").layer_kinds) == {"longcat"}
    assert model_spec("qwen3-32b").layer_kind == "dense"
    assert model_spec("longcat-flash").num_attention_sublayers == 56


def test_flop_is_twice_the_active_parameters_plus_the_core():
    spec = model_spec("longcat-flash")
    flop = spec.flop_per_token(5000)
    norms_and_inner_norms = spec.parameters_by_part["norms"]
    core = 56 * 2 * 64 * 5000 * (2 * 512 + 64)
    assert flop["attention_core"] == core
    assert sum(flop.values()) == pytest.approx(2 * (spec.num_active_parameters() - norms_and_inner_norms) + core)
    # an indexed model attends to index_topk positions at most
    sparse = model_spec("deepseek-v3.2").flop_per_token(100_000)
    assert sparse["attention_core"] == 61 * 2 * 128 * 2048 * 1088


def test_transformers_builds_models_of_the_same_size():
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    cases = {
        "qwen3-32b": ("Qwen3Config", "Qwen3ForCausalLM"),
        "qwen3-235b-a22b": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM"),
        "llama-3.1-8b": ("LlamaConfig", "LlamaForCausalLM"),
        "deepseek-v3": ("DeepseekV3Config", "DeepseekV3ForCausalLM"),
    }
    for name, (config_class, model_class) in cases.items():
        spec = model_spec(name).replace(num_layers=4)
        config = getattr(transformers, config_class)(
            hidden_size=spec.hidden_size,
            num_hidden_layers=4,
            vocab_size=spec.vocab_size,
            num_attention_heads=spec.num_attention_heads,
            intermediate_size=spec.ffn_hidden_size,
            **({} if spec.is_mla else {"num_key_value_heads": spec.num_key_value_heads, "head_dim": spec.head_dim}),
            **(
                {"moe_intermediate_size": spec.expert_ffn_hidden_size, "num_experts": spec.n_routed_experts}
                if name.startswith("qwen3-235b")
                else {}
            ),
        )
        with torch.device("meta"):
            model = getattr(transformers, model_class)(config)
        assert sum(p.numel() for p in model.parameters()) == spec.num_parameters, name
        # the same keys back from transformers' own dictionary
        again = ModelSpec.from_hf_config(config.to_dict())
        assert again.num_parameters == spec.num_parameters


def test_all_faults_at_once():
    with pytest.raises(SpecError) as error:
        ModelSpec.from_hf_config(
            {"model_type": "longcat_flash", "hidden_size": -1, "num_layers": "28", "rms_norm_eps": "small"}
        )
    text = str(error.value)
    assert "hidden_size: expected an integer >= 1; got -1" in text
    assert "num_layers: expected an integer >= 1; got '28'" in text
    assert "rms_norm_eps: expected a number; got 'small'" in text
    assert "kv_lora_rank: expected an integer such as 64; it is missing" in text
    assert len(error.value.faults) == 15  # 3 wrong and 12 missing


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"moe_topk": 1000}, "at most n_routed_experts + zero_expert_num = 768; got 1000"),
        ({"num_key_value_heads": 7}, "64 % 7 = 1"),
        ({"qk_rope_head_dim": 63}, "even number; got 63"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"colour": "red"}, "colour"),
        ({"rope_theta": float("nan")}, "rope_theta"),
    ],
)
def test_contradictory_changes(change, says):
    with pytest.raises(SpecError) as error:
        model_spec("longcat-flash").replace(**change)
    assert says in str(error.value)


def test_unknown_names_list_the_known_ones(tmp_path):
    with pytest.raises(SpecError, match="longcat-flash") as error:
        model_spec("longcat-flesh")
    assert all(name in str(error.value) for name in model_names())
    with pytest.raises(SpecError, match="model_type: expected one of longcat_flash"):
        ModelSpec.from_hf_config({"model_type": "gpt2"})
    broken = tmp_path / "config.json"
    broken.write_text("{")
    with pytest.raises(SpecError, match="expected JSON"):
        ModelSpec.from_hf_config(broken)
    with pytest.raises(SpecError, match="No such file"):
        ModelSpec.from_hf_config(tmp_path / "none.json")


def test_specs_do_not_load_torch():
    code = (
        "import sys; from longcat_sim.specs.model import model_spec; model_spec('longcat-flash')\n"
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
