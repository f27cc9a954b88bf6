"""The budget controller and the losses against closed forms and hand-made batches."""

from __future__ import annotations

import math

import pytest
import torch

from longcat_sim.errors import TrainingError
from longcat_sim.model import LongcatFlash
from longcat_sim.model.moe import Routing
from longcat_sim.model.training import TrainConfig
from longcat_sim.model.training.controller import BudgetController
from longcat_sim.model.training.losses import (
    balance_loss,
    group_loads,
    hidden_z_loss,
    router_gradient_ratio,
    router_similarity,
)
from longcat_sim.model.training.optimizer import init_for_training, make_optimizer, role_of
from longcat_sim.specs.model import ModelSpec, model_spec
from longcat_sim.studies.training.sizes import short_spec, small_spec

torch.set_num_threads(1)  # small tensors: threads only wait for each other

SPEC = small_spec(32, 1, experts=4, zero=2, topk=3, expert_width=8)  # K_e = 2


def test_set_point_of_the_published_model() -> None:
    assert BudgetController(model_spec("longcat-flash")).set_point == pytest.approx(1 / 768)


def test_bias_moves_by_the_share_that_is_missing_and_not_for_zero_experts() -> None:
    # 2 tokens, K = 3: 6 choices; expert 0 twice, 1 once, 2 once, 3 never, zero experts 4 and 5 once each
    chosen = torch.tensor([[0, 1, 4], [0, 2, 5]])
    bias = torch.zeros(6)
    BudgetController(SPEC).update([bias], [chosen], rate=0.6)
    set_point = 2 / (3 * 4)
    expected = [0.6 * (set_point - n / 6) for n in (2, 1, 1, 0)] + [0.0, 0.0]
    assert bias.tolist() == pytest.approx(expected, abs=1e-7)


def test_controller_brings_a_skewed_router_to_its_budget() -> None:
    """Fixed random scores with a strong lean to FFN experts: integral action alone reaches K_e for every expert."""
    spec = small_spec(32, 1, experts=32, zero=16, topk=12, expert_width=8)
    lean = torch.cat([torch.linspace(0.5, 2.0, 32), torch.zeros(16)])
    bias = torch.zeros(48)
    controller = BudgetController(spec)
    generator = torch.Generator().manual_seed(0)
    means = []
    for _ in range(400):
        scores = (torch.randn(1024, 48, generator=generator) + lean).softmax(-1)
        chosen = (scores + bias).topk(12, -1).indices
        means.append(float(controller.ffn_experts(chosen).float().mean()))
        controller.update([bias], [chosen], 0.2)
    assert means[0] > 10.5
    assert sum(means[-50:]) / 50 == pytest.approx(8.0, rel=0.01)
    share = torch.bincount(chosen.flatten(), minlength=48)[:32] / chosen.numel()
    assert float(share.max() / share.min()) < 1.4  # sampling noise of 256 copies per expert is 6 %


def test_group_loads_are_one_at_balance() -> None:
    chosen = torch.tensor([[0, 2, 4], [1, 3, 5]])  # each of 2 groups twice, zero experts twice: K_e : K - K_e = 2 : 1
    assert group_loads(chosen, SPEC, 2).tolist() == pytest.approx([1.0, 1.0, 1.0])
    chosen = torch.tensor([[0, 1, 4], [0, 1, 2]])
    assert group_loads(chosen, SPEC, 2).tolist() == pytest.approx([2.0, 0.5, 0.5])


def test_balance_loss_by_hand() -> None:
    scores = torch.tensor([[0.3, 0.2, 0.1, 0.1, 0.2, 0.1], [0.1, 0.1, 0.4, 0.2, 0.1, 0.1]])
    chosen = torch.tensor([[0, 1, 4], [0, 1, 2]])
    loss = balance_loss(Routing(scores, chosen, scores), SPEC, 2)
    # P over groups (0,1), (2,3), zero: 0.35, 0.4, 0.25; f 2, 0.5, 0.5
    assert float(loss) == pytest.approx(2 * 0.35 + 0.5 * 0.4 + 0.5 * 0.25)


def test_hidden_z_loss_of_equal_values() -> None:
    hidden = torch.full((3, 8), -2.0)
    assert float(hidden_z_loss(hidden)) == pytest.approx((2 + math.log(8)) ** 2, rel=1e-6)


def test_gradient_ratio_by_hand() -> None:
    scores = torch.full((2, 6), 1 / 6, requires_grad=True)
    chosen = torch.tensor([[0, 2, 4], [1, 3, 5]])
    lm = (scores * torch.tensor([3.0, 0, 0, 0, 0, 4.0])).sum()  # gradient with respect to P: 2 x (3, 0, 0, 0, 0, 4)
    ratio = router_gradient_ratio(lm, [Routing(scores, chosen, scores)], SPEC, 2, alpha=0.5)
    assert ratio[0] == pytest.approx(0.5 * math.sqrt(6) / 10)


def test_similarity_of_orthogonal_and_equal_vectors() -> None:
    assert router_similarity(torch.eye(4)) == pytest.approx(0.0, abs=1e-6)
    assert router_similarity(torch.ones(3, 5)) == pytest.approx(1.0, abs=1e-6)


def test_width_rules_scale_rate_and_init() -> None:
    """s = 4: hidden and unembedding have a quarter of the variance and of the rate, the embedding its own."""
    config = TrainConfig(proxy_width=32, seed=3)
    wide = LongcatFlash(short_spec(128))
    init_for_training(wide, config)
    assert float(wide.embedding.weight.detach().std()) == pytest.approx(config.embedding_std, rel=0.02)
    assert float(wide.head.weight.detach().std()) == pytest.approx(config.hidden_std / 2, rel=0.02)
    assert float(wide.layers[0].experts.gate_up.detach().std()) == pytest.approx(config.hidden_std / 2, rel=0.02)
    rates = {n: g["rate_factor"] for g in make_optimizer(wide, config, 128).param_groups for n in g["names"]}
    assert {role_of(n): r for n, r in rates.items()} == {
        "embedding": 1.0, "norm": 1.0, "hidden": 0.25, "unembedding": 0.25,
    }  # fmt: skip
    assert set(rates) == {n for n, _ in wide.named_parameters()}
    assert role_of("layers.0.router.weight") == "hidden"
    assert role_of("layers.0.attention.1.kv_norm.weight") == "norm"
    plain = make_optimizer(wide, config.replace(transfer="none"), 128)
    assert {g["rate_factor"] for g in plain.param_groups} == {1.0}


def test_schedule() -> None:
    config = TrainConfig(steps=100, warmup_steps=10, learning_rate=1.0, final_learning_rate=0.1)
    assert config.learning_rate_at(0) == pytest.approx(0.1)
    assert config.learning_rate_at(10) == pytest.approx(1.0)
    assert config.learning_rate_at(55) == pytest.approx(0.55)
    assert config.learning_rate_at(100) == pytest.approx(0.1)
    assert config.bias_rate_at(99) == pytest.approx(config.bias_rate * config.bias_final)


def test_all_faults_of_a_config_at_once() -> None:
    with pytest.raises(TrainingError) as fault:
        TrainConfig(steps=0, learning_rate=-1, balance_groups=3, mtp_from=2).check(SPEC)
    text = str(fault.value)
    for part in ("steps: expected", "learning_rate: expected", "4 % 3 = 1", "mtp_from: expected"):
        assert part in text
    small = SPEC.replace(vocab_size=200)
    with pytest.raises(TrainingError, match="vocab_size: expected at least 256"):
        TrainConfig().check(small)
    dense = ModelSpec(
        model_type="llama", hidden_size=32, num_layers=1, vocab_size=256, num_attention_heads=2, num_key_value_heads=2,
        ffn_hidden_size=32,
    )  # fmt: skip
    with pytest.raises(TrainingError, match="longcat_flash"):
        TrainConfig().check(dense)
