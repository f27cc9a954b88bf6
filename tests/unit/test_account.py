"""What hides behind what: collectives by kind, with and without overlap."""

import pytest

from longcat_sim.calibration.op_times import OpTimes
from longcat_sim.simulation.account import account
from longcat_sim.simulation.step import simulate_step
from longcat_sim.specs.scenario import scenario


def test_without_overlap_all_communication_is_exposed_and_with_it_some_hides() -> None:
    case = scenario("longcat-flash-h800-decode", {"deployment.overlap": "none"})
    times = OpTimes.from_hardware(case.hardware)
    plain = account(simulate_step(case, times).timeline, times)
    assert set(plain.collectives_s) == {"dispatch", "combine", "all_gather", "reduce_scatter"}
    for own, exposed in plain.collectives_s.values():
        assert exposed == pytest.approx(own, rel=1e-9)
    assert sum(own for own, _ in plain.collectives_s.values()) == pytest.approx(plain.communication_s, rel=1e-9)
    hidden = account(simulate_step(case.what_if({"deployment.overlap": "sbo"}), times).timeline, times)
    assert hidden.collectives_s["combine"][1] < 0.5 * hidden.collectives_s["combine"][0]
    # the tensor-parallel collectives stand on the compute lane
    assert hidden.collectives_s["all_gather"][1] == pytest.approx(hidden.collectives_s["all_gather"][0], rel=1e-9)
