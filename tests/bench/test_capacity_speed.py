"""How fast candidates are screened, and against simulating them one by one in the same run."""

from __future__ import annotations

import time

import pytest

from longcat_sim.capacity import samples
from longcat_sim.capacity.op_times import op_times_of
from longcat_sim.capacity.screen import screen_steps
from longcat_sim.specs.scenario import scenario


@pytest.mark.slow
def test_screening_speed() -> None:
    """Print candidates, CPU seconds and candidates per second; a screened one must cost 1,000 times less."""
    base = scenario(
        "longcat-flash-decode-capacity",
        {
            "search.hardware": ["h100-sxm", "h200-sxm", "b200-sxm", "b300-sxm"], "search.num_gpus": [64, 128, 256],
            "search.ep_size": [16, 32, 64], "search.dense_tp_size": [1, 4, 8],
            "price": {"usd_per_gpu_hour": 2.0}, "step.context_tokens": 2000,
        },
    )  # fmt: skip
    began = time.process_time()
    screened = screen_steps(base, op_times_of)
    spent = time.process_time() - began
    began = time.process_time()
    for at in range(0, len(screened), len(screened) // 3):
        of = screened.scenario(at)
        samples.simulated_figures(of, op_times_of(of.hardware))
    each = (time.process_time() - began) / 4
    print(
        f"\nscreened {screened.looked_at} candidates, {len(screened)} solved, {len(screened.shapes)} deployments in "
        f"{spent:.1f} s CPU ({len(screened) / spent:,.0f}/s); one simulated: {each:.2f} s CPU"
    )
    assert len(screened) >= 100_000
    assert spent / len(screened) < each / 1000
