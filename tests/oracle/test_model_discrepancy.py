"""The error that widens every interval is the one that published steps show."""

import numpy as np
import pytest

from longcat_sim.simulation.step import MODEL_DISCREPANCY, simulate_draws
from longcat_sim.specs.scenario import scenario
from longcat_sim.studies.validate import deepseek_v3
from longcat_sim.studies.validate.longcat_report import h800_times, measured_scenario
from longcat_sim.studies.validate.targets import targets


@pytest.mark.slow
def test_the_discrepancy_is_the_root_mean_square_of_published_steps() -> None:
    times = h800_times()
    logs = []
    for row in targets("longcat-flash")["measured"]["rows"]:
        case = measured_scenario(row["sequences_per_gpu"], 0.8).what_if({"step.context_spread": 0.0})
        tpot_s = np.median(simulate_draws(case, times, 32).tpot_s(case.speculative.tokens_per_step))
        logs.append(np.log(tpot_s * row["tps_per_user"]))
    rows = deepseek_v3.run(times).rows
    logs += [np.log(1 + row.error) for row in rows if row.measured_or_published and row.error is not None]
    assert len(logs) == 5
    assert float(np.sqrt(np.mean(np.square(logs)))) == pytest.approx(MODEL_DISCREPANCY, abs=0.015)
    assert scenario("longcat-flash-h800-decode").step.context_spread > 0
