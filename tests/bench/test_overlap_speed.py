"""Speed of a step: 28 layers on 128 ranks with random load; prints seconds, asserts that drawing together pays."""

import time

import pytest

from longcat_sim.calibration.roofline import Roofline
from longcat_sim.simulation.contention import MaxMin
from longcat_sim.simulation.lanes import LaneEngine
from longcat_sim.simulation.step import step_program
from longcat_sim.simulation.vectorised import run_arrays
from longcat_sim.specs.scenario import scenario


@pytest.mark.slow
@pytest.mark.parametrize("overlap", ["none", "sbo", "tbo"])
def test_speed_of_a_step(overlap):
    case = scenario("longcat-flash-h800-decode", {"deployment.overlap": overlap})
    times = Roofline(case.hardware)
    program = step_program(case, times, draws=32)
    start = time.perf_counter()
    LaneEngine(program, MaxMin()).run()
    one = time.perf_counter() - start
    start = time.perf_counter()
    run_arrays(program)
    many = time.perf_counter() - start
    ops = len(program.items) * program.ranks
    print(f"{overlap}: {ops} ops on {program.ranks} ranks: one draw {one:.2f} s, 32 draws together {many:.2f} s")
    assert many < 32 * one / 4
