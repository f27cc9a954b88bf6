"""Data-parallel ranks that step together, and the front end that deals requests out to them: by hand."""

from collections.abc import Sequence
from typing import Any

import pytest

from longcat_sim.errors import SpecError
from longcat_sim.simulation.serving.cluster import Engine
from longcat_sim.simulation.serving.published_loads import BalancerRules
from longcat_sim.simulation.serving.request import Request
from longcat_sim.simulation.serving.simulate import ServingResult, simulate_serving
from tests.unit.test_serving_engine import MS, serve_spec

OLD, NEW = BalancerRules.of((0, 19)), BalancerRules.of((0, 28))


class TenMilliseconds:
    """Every step of one rank or of all takes 10 ms."""

    is_detailed = True

    def step_ns(self, contexts: Sequence[int], chunks: Sequence[tuple[int, int]]) -> int:
        return 10 * MS

    def group_step_ns(self, shapes: Sequence[Any]) -> int:
        return 10 * MS


def play(
    rows: Sequence[tuple[float, int, int]], rules: BalancerRules = OLD, blocks: int = 1000, **changes: Any
) -> ServingResult:
    """Serve (milliseconds, prompt, answer)."""
    requests = [Request(0, round(at * MS), prompt, answer) for at, prompt, answer in rows]
    engine = Engine(TenMilliseconds(), blocks)
    spec = serve_spec(replicas=2, **changes)
    return simulate_serving(spec, engine, requests=requests, lockstep=rules, debug=True)


def ranks(result: ServingResult) -> list[int]:
    return result.records.numpy("replica").tolist()


def test_the_front_end_chooses_by_what_was_published_last() -> None:
    # A (to the end) and B (two tokens) go to either rank; B runs from 10 to 30 ms. Reports: 10 ms A; 20 ms B, of a
    # newer step: what stood before is published at once, and the next counts 100 ms later; 30 ms B's end, so that at
    # 120 ms the counts of the step before it are published. C at 125 ms finds one and one, and goes to the first rank,
    # though the second has been empty for 95 ms. D at 230 ms finds what was published at 220 ms.
    rows = [(0, 1, 100), (1, 1, 2), (125, 1, 100), (230, 1, 1)]
    assert ranks(play(rows)) == [0, 1, 0, 1]
    assert ranks(play([*rows[:2], (119, 1, 100)])) == [0, 1, 1]  # before that of 120 ms: B was never seen there


def test_what_waits_is_reported_and_weighs_four_times_before_0_26() -> None:
    # one place each: the third waits behind the first. At 10 ms rank 0 reports (1 waiting, 1 running), rank 1 (0, 1);
    # published at 60 ms: five against one for the fourth, then five against five for the fifth
    rows = [(0, 1, 100), (0, 1, 100), (0, 1, 100), (100, 1, 1), (101, 1, 1)]
    assert ranks(play(rows, scheduler={"max_num_seqs": 1})) == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("is_async", [True, False])
def test_what_was_thrown_out_of_a_batch_waits_too(is_async: bool) -> None:
    # eight blocks of four tokens: two sequences of 8 + 20 tokens do not fit, and after some 90 ms one goes back to the
    # queue. Its rank's count, 1 waiting and 1 running, is published at 160 ms.
    scheduler = {"block_tokens": 4, "watermark": 0, "async_scheduling": is_async}
    result = play([(0, 8, 20), (0, 1, 30), (0, 8, 20), (165, 1, 1)], blocks=8, scheduler=scheduler)
    assert result.preemptions == 1
    assert ranks(result) == [0, 1, 0, 1]


@pytest.mark.parametrize("is_async", [True, False])
@pytest.mark.parametrize("seats", [1, 2])
def test_all_sequences_of_all_ranks_may_end_in_one_step_while_others_wait(is_async: bool, seats: int) -> None:
    scheduler = {"max_num_seqs": seats, "async_scheduling": is_async}
    result = play([(0, 1, 5)] * 12, scheduler=scheduler)
    assert result.checks["completed"] == 12
    waves = 12 // (2 * seats)
    assert result.duration_s == pytest.approx(waves * 5 * 0.010)


def test_ranks_take_steps_together_and_join_late_when_scheduling_is_asynchronous() -> None:
    for is_async, first in ((False, 0.030), (True, 0.040)):
        records = play([(0, 1, 20), (15, 1, 1)], scheduler={"async_scheduling": is_async}).records
        # it comes to the idle rank during the second step, which it must wait for, and one more where that is decided
        assert records[1].first_token_s == pytest.approx(first)


@pytest.mark.parametrize(
    ("changes", "got"),
    [
        ({"faults": [{"kind": "replica_loss", "at": "1 s"}]}, "serve.faults"),
        ({"scheduler": {"policy": "priority"}}, "policy: priority"),
        ({"scheduler": {"multi_step": 4}}, "multi_step"),
        ({"max_queue": 3}, "serve.max_queue"),
    ],
)
def test_what_ranks_in_lockstep_cannot_do_is_refused(changes: dict, got: str) -> None:
    with pytest.raises(SpecError, match=f"lockstep: .*got .*{got}; remove it"):
        play([(0, 1, 1)], **changes)
