"""Random expert load: conservation, spread, replication, and the nodes a token reaches."""

import numpy as np
import pytest

from longcat_sim.calibration.op_times import OpTimes
from longcat_sim.errors import SpecError
from longcat_sim.simulation.load import (
    busiest_context,
    distinct_nodes,
    draw_contexts,
    draw_loads,
    placement,
    typical_load,
)
from longcat_sim.simulation.step import simulate_step, step_seconds_many
from longcat_sim.specs.deployment import Deployment, Routing
from longcat_sim.specs.model import model_spec
from longcat_sim.specs.scenario import scenario

LONGCAT, DEEPSEEK = model_spec("longcat-flash"), model_spec("deepseek-v3")
EP128 = Deployment(num_gpus=128, ep_size=128)


@pytest.mark.parametrize("routing", [Routing(), Routing(source="power_law", exponent=0.6)])
def test_every_copy_sent_is_received(routing):
    load = draw_loads(LONGCAT, EP128, routing, 192, layers=3, draws=4, seed=5)
    np.testing.assert_array_equal(load.sent.sum(axis=2), load.received.sum(axis=2))
    assert load.active.max() <= 4
    assert load.sent.mean() == pytest.approx(192 * 8, rel=0.01)


def test_zero_computation_experts_make_the_sent_copies_random():
    sent = draw_loads(LONGCAT, EP128, Routing(), 192, layers=28, draws=8).sent
    assert sent.std() == pytest.approx(3 * np.sqrt(192), rel=0.05)  # 3 per token
    assert np.ptp(draw_loads(DEEPSEEK, EP128, Routing(), 192, layers=4, draws=2).sent) == 0


def test_balanced_is_the_mean_everywhere_and_equal_seeds_give_equal_loads():
    load = draw_loads(LONGCAT, EP128, Routing(source="balanced"), 100, layers=2, draws=3)
    assert load.sent == load.received == 800
    first, second = (draw_loads(LONGCAT, EP128, Routing(), 64, layers=2, draws=2, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.received, second.received)


def test_replication_lowers_the_busiest_rank():
    skewed = Routing(source="power_law", exponent=0.8)
    mended = Routing(source="power_law", exponent=0.8, placement="eplb", redundant_experts=128)
    worst = [
        draw_loads(LONGCAT, EP128, routing, 192, layers=2, draws=2).received.max(axis=2).mean() / 1536
        for routing in (skewed, mended)
    ]
    assert worst[0] > 3.0
    assert worst[1] < 1.5


def test_replicas_must_divide_over_the_ranks():
    with pytest.raises(SpecError, match=r"\(512 \+ 100\) % 128 = 100"):
        placement(np.ones(512) / 512, 128, Routing(placement="eplb", redundant_experts=100))


def test_nodes_of_a_token():
    # 4 of 8 groups, two groups a node at EP32: 4 x (1 - C(6,4)/C(8,4)) nodes
    assert distinct_nodes(DEEPSEEK, 32, 8, 8) == pytest.approx(4 * (1 - 15 / 70))
    assert distinct_nodes(DEEPSEEK, 64, 8, 8) == pytest.approx(4.0)
    assert distinct_nodes(LONGCAT, 128, 8, 8) == pytest.approx(16 * (1 - (15 / 16) ** 8))


def test_the_typical_load_is_the_mean_of_the_busiest_rank():
    typical = typical_load(LONGCAT, EP128, Routing(), np.array([192.0]))
    drawn = draw_loads(LONGCAT, EP128, Routing(), 192, layers=28, draws=16)
    assert float(typical.received[0, 0]) == pytest.approx(drawn.received.max(axis=2).mean(), rel=0.01)


def test_a_recorded_trace_is_resampled_to_the_model():
    from longcat_sim.records.routing import RoutingTrace

    rng = np.random.default_rng(0)
    trace = RoutingTrace(rng.integers(0, 12, (2, 500, 6)).astype(np.int32), 8, 4)
    routing = Routing(source="recorded", file="r.npz")
    load = draw_loads(LONGCAT, EP128, routing, 100, layers=2, draws=2, trace=trace)
    assert load.sent.mean() == pytest.approx(100 * 12 * 8 / 12, rel=0.03)  # two thirds of the choices are FFN experts


def test_redundant_experts_let_other_rank_counts_divide():
    from longcat_sim.calibration.roofline import Roofline
    from longcat_sim.simulation.step import simulate_step
    from longcat_sim.specs.scenario import scenario

    layout = {"deployment.num_gpus": 144, "deployment.ep_size": 144, "model.num_layers": 5}
    with pytest.raises(SpecError, match="256 % 144 = 112"):
        scenario("deepseek-v3-h800-decode", layout)
    case = scenario(
        "deepseek-v3-h800-decode",
        {**layout, "routing": {"source": "multinomial", "placement": "eplb", "redundant_experts": 32}},
    )
    result = simulate_step(case, Roofline(case.hardware))
    assert result.timeline.program.ranks == 144
    assert result.memory.parts["expert_weights"] == pytest.approx(2 * 3 * 7168 * 2048 * 2)  # 2 experts in 2 MoE layers


def test_contexts_have_the_asked_spread_and_tensor_parallel_ranks_share_them():
    drawn = draw_contexts(5000.0, 0.9, 16, ranks=4000, tp_size=2, draws=20, seed=1)
    assert drawn.shape == (1, 20, 4000)
    assert drawn.mean() == pytest.approx(5000, rel=0.005)
    assert drawn.std() / drawn.mean() == pytest.approx(0.9 / 16**0.5, rel=0.02)  # a mean of 16
    np.testing.assert_array_equal(drawn[..., 0::2], drawn[..., 1::2])


@pytest.mark.parametrize("sequences", [8, 108])
def test_the_busiest_context_is_the_mean_maximum_of_draws(sequences):
    drawn = draw_contexts(1.0, 0.92, sequences, ranks=128, draws=4000)
    expected = busiest_context(0.92, np.array([[sequences]]), 128).item()
    assert drawn.max(axis=2).mean() == pytest.approx(expected, rel=0.01)


def test_spread_contexts_lengthen_a_step_by_what_the_slowest_rank_attends_to():
    case = scenario("longcat-flash-h800-decode", {"step.context_spread": 0, "routing.source": "balanced"})
    times = OpTimes.from_hardware(case.hardware)
    even = simulate_step(case, times).step_s
    spread = case.what_if({"step.context_spread": 0.9})
    longest = draw_contexts(5000.0, 0.9, 96, ranks=128).max()
    # every layer waits for the rank with the longest contexts: as long as if all ranks had them
    all_long = simulate_step(case.what_if({"step.context_tokens": float(longest)}), times).step_s
    found = simulate_step(spread, times).step_s
    assert even < found <= all_long * (1 + 1e-9)
    assert found - even > 0.8 * (all_long - even)
    assert float(step_seconds_many(spread, times, 96, 5000)) > float(step_seconds_many(case, times, 96, 5000))


def test_one_rank_waits_for_nobody_and_few_sequences_meet_few_others():
    assert busiest_context(0.9, np.array([[4.0]]), 1).item() == 1.0
    factors = busiest_context(0.9, np.array([[1 / 128], [2 / 128], [1.0], [16.0]]), 128).ravel()
    assert factors[0] == 1.0  # a single sequence
    assert factors[1] < factors[2] > factors[3] > 1.0
