"""What the front end of vLLM's data-parallel ranks knows of them, and when."""

import pytest

from longcat_sim.simulation.serving.published_loads import MS, BalancerRules, Load, PublishedLoads

OLD = BalancerRules.of((0, 19))


def test_rules_are_those_of_the_version() -> None:
    assert OLD == BalancerRules.of(()) == BalancerRules(False, False, False)
    assert BalancerRules.of((0, 22)) == BalancerRules(True, False, False)
    assert BalancerRules.of((0, 25)) == BalancerRules(True, True, False)
    assert BalancerRules.of((0, 28)) == BalancerRules(True, True, True)


def test_own_requests_count_as_waiting_until_counts_are_published() -> None:
    loads = PublishedLoads(2, OLD)
    assert [loads.choose(0) for _ in range(5)] == [0, 1, 0, 1, 0]
    loads.report(1 * MS, 0, 0, Load(0, 3))
    loads.report(1 * MS, 0, 1, Load(0, 2))
    # 50 ms for the reports of a step to arrive, then what the ranks said replaces what was counted
    assert loads.choose(50 * MS) == 1  # 4 x 3 against 4 x 2: still the own count
    assert loads.choose(51 * MS) == 1
    assert [load[:2] for load in loads.seen] == [(0, 3), (1, 2)]


def test_counts_are_published_at_most_every_100_ms() -> None:
    loads = PublishedLoads(1, OLD)
    loads.report(0, 0, 0, Load(0, 1))
    loads.choose(50 * MS)
    loads.report(60 * MS, 1, 0, Load(0, 9))
    loads.choose(149 * MS)
    assert loads.seen[0] == Load(2, 1)
    loads.choose(150 * MS)
    assert loads.seen[0] == Load(1, 9)


def test_a_report_that_comes_at_the_time_of_a_publication_puts_it_off() -> None:
    loads = PublishedLoads(1, OLD)
    loads.report(0, 0, 0, Load(0, 1))
    loads.report(50 * MS, 0, 0, Load(0, 2))  # of the same step: 50 ms more for others to follow
    loads.choose(99 * MS)
    assert loads.seen[0].running == 0
    loads.choose(100 * MS)
    assert loads.seen[0].running == 2


def test_what_was_due_is_published_before_a_report_is_taken() -> None:
    loads = PublishedLoads(1, OLD)
    loads.report(0, 0, 0, Load(0, 1))
    loads.report(60 * MS, 1, 0, Load(0, 2))
    loads.choose(61 * MS)
    assert loads.seen[0] == Load(1, 1)  # that of 50 ms


def test_a_newer_step_does_not_mix_with_the_last_whole_one() -> None:
    loads = PublishedLoads(2, OLD)
    loads.report(0, 0, 0, Load(0, 1))
    loads.report(0, 0, 1, Load(0, 1))
    loads.report(20 * MS, 1, 0, Load(0, 5))  # the other rank has not said yet what it has after that step
    loads.choose(30 * MS)
    assert loads.seen == [Load(1, 1), Load(0, 1)]
    loads.report(20 * MS, 1, 1, Load(0, 7))
    loads.choose(200 * MS)
    assert loads.seen == [Load(1, 5), Load(0, 7)]


def test_waiting_weighs_four_times_running_before_0_26() -> None:
    for version, chosen in (((0, 19), 1), ((0, 28), 0)):
        loads = PublishedLoads(2, BalancerRules.of(version))
        loads.report(0, 0, 0, Load(1, 0))
        loads.report(0, 0, 1, Load(0, 3))
        assert loads.choose(60 * MS) == chosen


def test_what_is_in_flight_bounds_a_stale_count_from_below() -> None:
    loads = PublishedLoads(2, BalancerRules.of((0, 28)))
    chosen = [loads.choose(0) for _ in range(7)]
    assert chosen.count(0) == 4
    loads.report(10 * MS, 0, 0, Load(0, 4))  # rank 1 has not yet said that three run there
    later = [loads.choose(150 * MS) for _ in range(4)]
    assert later.count(1) == 2  # by 4 against 0 all would go there
    for _ in range(5):
        loads.finish(chosen[0])
    assert loads.in_flight[0] == 1


def test_waiting_requests_weigh_more_where_the_cache_is_over_half_full() -> None:
    for use, chosen in ((0.4, 0), (0.9, 1)):
        loads = PublishedLoads(2, BalancerRules.of((0, 28)))
        loads.report(0, 0, 0, Load(2, 6, use))
        loads.report(0, 0, 1, Load(0, 10, use))
        assert loads.choose(60 * MS) == chosen  # 8 against 10, and 8 + 2 x 6 x 0.4 = 12.8


def test_ties_go_to_the_first_rank_or_take_turns() -> None:
    old, new = (PublishedLoads(3, BalancerRules.of(version)) for version in ((0, 24), (0, 25)))
    for loads, chosen in ((old, [0, 0, 0]), (new, [0, 1, 2])):
        found = []
        for _ in range(3):
            found.append(loads.choose(0))
            loads.seen = [Load()] * 3
        assert found == chosen


@pytest.mark.parametrize("now", [4_999, 5_100])
def test_unchanged_counts_are_published_every_five_seconds(now: int) -> None:
    loads = PublishedLoads(1, OLD)
    loads.report(0, 0, 0, Load(0, 2))
    loads.choose(50 * MS)
    loads.choose(now * MS)
    # what was sent since the last publication still counts as waiting
    assert loads.seen[0].waiting == (2 if now < 5_050 else 1)
