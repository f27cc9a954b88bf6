"""What the front end of vLLM's data-parallel ranks knows of them, and when."""

import pytest

from longcat_sim.simulation.serving.published_loads import MS, BalancerRules, PublishedLoads

OLD = BalancerRules.of((0, 19))


def test_rules_are_those_of_the_version() -> None:
    assert OLD == BalancerRules.of(()) == BalancerRules(4, False, False)
    assert BalancerRules.of((0, 22)) == BalancerRules(4, True, False)
    assert BalancerRules.of((0, 25)) == BalancerRules(4, True, True)
    assert BalancerRules.of((0, 28)) == BalancerRules(1, True, True)


def test_own_requests_count_as_waiting_until_counts_are_published() -> None:
    loads = PublishedLoads(2, OLD)
    assert [loads.choose(0, [0, 1]) for _ in range(5)] == [0, 1, 0, 1, 0]
    loads.report(1 * MS, 0, 0, 3)
    loads.report(1 * MS, 1, 0, 2)
    # 50 ms for the reports of a step to arrive, then what the ranks said replaces what was counted
    assert loads.choose(50 * MS, [0, 1]) == 1  # 4 x 3 against 4 x 2: still the own count
    assert loads.choose(51 * MS, [0, 1]) == 1
    assert loads.seen == [(0, 3), (1, 2)]


def test_counts_are_published_at_most_every_100_ms() -> None:
    loads = PublishedLoads(2, OLD)
    loads.report(0, 0, 0, 1)
    loads.choose(50 * MS, [0, 1])
    loads.report(60 * MS, 0, 0, 9)
    assert loads.choose(149 * MS, [0]) == 0
    assert loads.seen[0] == (1, 1)
    loads.choose(150 * MS, [0])
    assert loads.seen[0] == (1, 9)


def test_a_newer_step_does_not_mix_with_the_last_whole_one() -> None:
    loads = PublishedLoads(2, OLD)
    loads.report(0, 0, 0, 1)
    loads.report(0, 1, 0, 1)
    loads.report(20 * MS, 0, 0, 5)  # the other rank has not said yet what it has after that step
    loads.choose(30 * MS, [0, 1])
    assert loads.seen == [(1, 1), (0, 1)]
    loads.report(20 * MS, 1, 0, 7)
    loads.choose(200 * MS, [0, 1])
    assert loads.seen == [(1, 5), (0, 7)]


def test_waiting_weighs_four_times_running_before_0_26() -> None:
    for version, chosen in (((0, 19), 1), ((0, 28), 0)):
        loads = PublishedLoads(2, BalancerRules.of(version))
        loads.report(0, 0, 1, 0)
        loads.report(0, 1, 0, 3)
        assert loads.choose(60 * MS, [0, 1]) == chosen


def test_ties_go_to_the_first_rank_or_take_turns() -> None:
    old, new = (PublishedLoads(3, BalancerRules.of(version)) for version in ((0, 24), (0, 25)))
    for loads, chosen in ((old, [0, 0, 0]), (new, [0, 1, 2])):
        found = []
        for _ in range(3):
            found.append(loads.choose(0, [0, 1, 2]))
            loads.seen = [(0, 0)] * 3
        assert found == chosen


def test_only_ranks_that_are_up_are_chosen() -> None:
    loads = PublishedLoads(3, OLD)
    assert [loads.choose(0, [1, 2]) for _ in range(3)] == [0, 1, 0]
    assert loads.seen == [(0, 0), (2, 0), (1, 0)]


@pytest.mark.parametrize("now", [4_999, 5_100])
def test_unchanged_counts_are_published_every_five_seconds(now: int) -> None:
    loads = PublishedLoads(1, OLD)
    loads.report(0, 0, 0, 2)
    loads.choose(50 * MS, [0])
    loads.choose(now * MS, [0])
    # what was sent since the last publication still counts as waiting
    assert loads.seen == [(2, 2) if now < 5_050 else (1, 2)]
