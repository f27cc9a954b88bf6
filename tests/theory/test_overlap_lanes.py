"""Lanes against timelines solved by hand."""

import numpy as np
import pytest

from longcat_sim.ops.op import ResourceShares
from longcat_sim.simulation.contention import MaxMin, MeasuredLaw, NoContention, Running
from longcat_sim.simulation.lanes import LaneEngine
from longcat_sim.simulation.program import Item, Program
from longcat_sim.simulation.vectorised import run_arrays


def item(name, lane, waits=(), group=1, shares=ResourceShares(), moves=False):
    return Item(name, name, "s", 0, 0, "b", lane, tuple(waits), group, shares, "measured", moves)


def program(items, seconds, ranks=1):
    lanes = [[i for i, it in enumerate(items) if it.lane == lane] for lane in range(max(i.lane for i in items) + 1)]
    return Program(items, ["compute", "communication"][: len(lanes)], lanes, [np.asarray(s) for s in seconds], 1, ranks)


def ends(made, law):
    line = LaneEngine(made, law).run()
    assert run_arrays(made, law).step_s[0] == pytest.approx(line.step_s, abs=1e-10)
    return line.end_s


def test_two_ops_that_clash_share_the_resource_until_one_ends():
    # A wants all SMs, B half: each gets a half, so A runs at 1/2 and B at full speed for 1 s; then A alone
    full, half = ResourceShares(sm=1.0), ResourceShares(sm=0.5)
    made = program([item("a", 0, shares=full), item("b", 1, shares=half)], [2.0, 1.0])
    found = ends(made, MaxMin())
    assert found[1, 0] == pytest.approx(1.0)
    assert found[0, 0] == pytest.approx(1.0 + 1.5)


def test_rates_change_when_the_set_of_running_ops_changes():
    # memory 0.8 and 0.6: fair shares 0.5 each, so 0.625 and 0.8333; b ends at 1.2 s, then a goes on alone
    a, b = ResourceShares(memory=0.8), ResourceShares(memory=0.6)
    made = program([item("a", 0, shares=a), item("b", 1, shares=b)], [2.0, 1.0])
    found = ends(made, MaxMin())
    assert found[1, 0] == pytest.approx(1.2)
    assert found[0, 0] == pytest.approx(1.2 + 2.0 - 1.2 * 0.625)


def test_a_collective_keeps_its_sms():
    rates = MaxMin().rates(
        [Running("gemm", ResourceShares(sm=1.0)), Running("dispatch", ResourceShares(sm=24 / 132), is_collective=True)]
    )
    assert rates == pytest.approx((108 / 132, 1.0))


def test_an_op_held_back_elsewhere_leaves_its_share_to_others():
    # x is held to half speed by the link, so it asks for 0.3 of memory and y keeps its 0.7
    x, y = ResourceShares(memory=0.6, scale_up=1.0), ResourceShares(memory=0.7, scale_up=1.0)
    first, second = MaxMin().rates([Running("x", x), Running("y", y)])
    assert first == pytest.approx(0.5)
    assert second == pytest.approx(0.5)


def test_a_measured_pair_overrides_the_law():
    law = MeasuredLaw({("gemm", "dispatch"): 0.7}, {"dispatch": 0.57})
    found = law.rates([Running("gemm", ResourceShares()), Running("dispatch", ResourceShares(), True)])
    assert found == (0.7, 0.57)


def test_a_barrier_ends_with_the_slowest_rank_and_holds_nothing_while_waiting():
    # the exchange takes 1 s on rank 0 and 3 s on rank 1; compute beside it is slowed only while bytes move
    share = ResourceShares(memory=1.0)
    items = [
        item("exchange", 1, group=2, shares=share, moves=True),
        item("gemm", 0, shares=share),
        item("next", 0, [0]),
    ]
    made = program(items, [np.array([[1.0, 3.0]]), 2.0, 1.0], ranks=2)
    line = LaneEngine(made, MaxMin()).run()
    assert line.own_end_s[0] == pytest.approx([2.0, 4.0 + 1.0])  # shared for its own time, then alone
    assert line.end_s[0] == pytest.approx([5.0, 5.0])
    assert line.end_s[1] == pytest.approx([3.0, 4.0])
    assert line.end_s[2] == pytest.approx([6.0, 6.0])
    assert run_arrays(made, MaxMin()).end_s[0] == pytest.approx([6.0, 6.0])


def test_a_straggler_delays_every_rank_through_the_barrier():
    items = [item("gemm", 0), item("exchange", 0, group=4, moves=True)]
    made = program(items, [np.ones((1, 4)), np.full((1, 4), 0.5)], ranks=4).scaled({2: 3.0})
    line = LaneEngine(made, NoContention()).run()
    assert line.end_s[0] == pytest.approx([1.0, 1.0, 3.0, 1.0])
    assert line.end_s[1] == pytest.approx([4.5] * 4)  # the slow rank's lane takes 3 x (1 + 0.5)
    assert run_arrays(made).step_s[0] == pytest.approx(4.5)


def test_the_clock_takes_whole_ticks():
    made = program([item("a", 0), item("b", 0), item("c", 0)], [0.1, 0.2, 1e-13])
    line = LaneEngine(made, NoContention()).run()
    assert line.end_s[1, 0] == pytest.approx(0.3, abs=1e-12)
    assert float(line.end_s[2, 0] - line.end_s[1, 0]) == pytest.approx(1e-12, abs=1e-15)
