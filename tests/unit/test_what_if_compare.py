"""What-if studies on a real step: comparison adds up, inputs move what they should, the interval has its sources."""

from __future__ import annotations

import pytest

from longcat_sim.capacity.op_times import op_times_of
from longcat_sim.capacity.samples import assess, kinds_of, step_sample
from longcat_sim.capacity.uncertainty import Discrepancy
from longcat_sim.errors import CapacityError
from longcat_sim.figures.capacity import capacity_figure
from longcat_sim.figures.cost import bill_figure
from longcat_sim.figures.sensitivity import terms_figure, tornado_figure, variance_figure
from longcat_sim.specs.scenario import Scenario, scenario
from longcat_sim.studies.capacity import capacity
from longcat_sim.studies.compare import compare
from longcat_sim.studies.panels import serving_panel
from longcat_sim.studies.simulate import simulate
from longcat_sim.studies.what_if import evaluate, solve_for, tornado, what_to_measure, where_from


@pytest.fixture(scope="module")
def base() -> Scenario:
    return scenario(
        "longcat-flash-decode-capacity",
        {
            "deployment.num_gpus": 16, "deployment.ep_size": 16, "step.sequences_per_gpu": 32,
            "price": {"usd_per_gpu_hour": 2.0}, "draws": 4,
        },
    )  # fmt: skip


def test_parts_of_a_comparison_add_up(base: Scenario) -> None:
    found = compare({"today": base, "no overlap": base.what_if({"deployment.overlap": "none"})})
    steps = [sum(parts.values()) for parts in found.parts]
    for figures, step_s in zip(found.figures, steps, strict=True):
        assert figures["step_s"].p5 < step_s < figures["step_s"].p95
    assert sum(term.difference for term in found.terms()) == pytest.approx(steps[1] - steps[0])
    assert "no overlap" in str(found)
    assert len(found.figure().data) == len(found.parts[0])
    assert len(terms_figure(found.terms(), found.names).data) == len(found.terms())


def test_a_comparison_centres_where_simulate_does_and_pairs_its_draws(base: Scenario) -> None:
    """What is uncertain in both alike cancels in the ratio: half the price is half in every draw."""
    half, none = {"price": {"usd_per_gpu_hour": 1.0}}, {"deployment.overlap": "none"}
    found = compare({"today": base, "half price": base.what_if(half), "no overlap": base.what_if(none)})
    price = "usd_per_million_output_tokens"
    assert found.figures[0] == {key: simulate(base)[key] for key in found.figures[0]}
    ratio = found.ratios[1][price]
    assert (ratio.p5, ratio.p95) == pytest.approx((0.5, 0.5))
    slower, today = found.ratios[2]["step_s"], found.figures[0]["step_s"]
    assert slower.p5 > 1
    assert slower.p95 - slower.p5 < today.p95 / today.median - today.p5 / today.median
    document = found.to_json()["no overlap"]
    assert document["ratio_to_base"]["step_s"]["median"] == slower.median
    assert "-50.0%" in str(found)


def test_a_comparison_needs_steps_of_one_phase(base: Scenario) -> None:
    with pytest.raises(CapacityError, match="at least two"):
        compare({"today": base})
    prompts = base.what_if({"step": {"phase": "prefill", "prompt_tokens": 1024, "tokens_per_gpu": 4096}})
    with pytest.raises(CapacityError, match=r"prompts: step\.phase: expected decode"):
        compare({"today": base, "prompts": prompts})
    assert "input rate" in str(compare({"today": prompts, "again": prompts}))


def test_a_tornado_of_the_step(base: Scenario) -> None:
    bars = {bar.path: bar for bar in tornado(base, "tpot_s", ["hardware.memory_bandwidth", "hardware.memory"])}
    assert bars["hardware.memory"].span == 0
    assert -1 < (bars["hardware.memory_bandwidth"].elasticity or 0) < -0.1
    drawn = tornado_figure(list(bars.values()), figure_name="TPOT", scale=1e3, unit="ms")
    assert list(drawn.data[0].y) == ["hardware.memory_bandwidth"]


def test_what_the_price_would_have_to_be(base: Scenario) -> None:
    slower = base.what_if({"deployment.overlap": "none"})
    price = solve_for(slower, "price.usd_per_gpu_hour", base)
    ratio = evaluate(base)["tpot_s"] / evaluate(slower)["tpot_s"]
    assert price == pytest.approx(2.0 * ratio, rel=1e-3)


@pytest.mark.slow
def test_the_interval_has_its_sources(base: Scenario) -> None:
    found = where_from(base, draws=12, log_residuals=(0.05, -0.1, 0.08))
    shares = found.shares["tpot_s"]
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["calibration"] > shares["routing"] > 0
    assert shares["discrepancy"] > 0
    assert found.intervals["tpot_s"].p5 < found.intervals["tpot_s"].median < found.intervals["tpot_s"].p95
    assert found.shares["num_gpus"]["calibration"] == 0
    assert variance_figure(shares).data[0].y[0] == pytest.approx(100 * shares["calibration"])
    without = assess(base, op_times_of(base.hardware), draws=12)
    assert without["tpot_s_p95"] > without["tpot_s"]


def test_equal_indices_give_equal_steps(base: Scenario) -> None:
    times = op_times_of(base.hardware)
    one, two = (step_sample(base, times, Discrepancy((0.1,))) for _ in range(2))
    at = {"calibration": 2, "routing": 1, "discrepancy": 3}
    assert one(at) == two(at)
    assert one({**at, "routing": 2}) != one(at)


@pytest.mark.slow
def test_what_to_measure_ranks_the_kinds_of_the_step(base: Scenario) -> None:
    advice = what_to_measure(base, "tpot_s", draws=3)
    kinds = kinds_of(base, op_times_of(base.hardware))
    assert {row.kind for row in advice} <= set(kinds)
    assert [row.share for row in advice] == sorted((row.share for row in advice), reverse=True)
    assert 0.9 < sum(row.share for row in advice) <= 1 + 1e-9
    assert advice[0].kind in list(kinds)[:5]  # what takes long is what matters


@pytest.mark.slow
def test_the_search_draws_its_picture(base: Scenario) -> None:
    small = base.what_if({"search": {"sequences_per_gpu": [8, 64], "survivors": 3, "overlap": ["none", "sbo"]}})
    result = capacity(small)
    figure = capacity_figure(result)
    assert figure.data[-1].x[0] == pytest.approx(1 / result.winner.figure("tpot_s"))
    assert result.winner.screened["sequences_per_gpu"] == 64  # without a level, the fullest GPU is the cheapest


def test_a_bill_as_bars() -> None:
    assert list(bill_figure({"input": 1.0, "idle": 3.0}).data[0].text) == ["25%", "75%"]


@pytest.mark.slow
def test_a_serving_panel_of_a_scenario() -> None:
    made = scenario(
        {
            "model": "llama-3.1-8b", "hardware": "h100-sxm",
            "deployment": {
                "num_gpus": 1, "precision": {"weights": "bf16", "attention": "bf16", "kv_cache": "bf16"},
            },
            "serve": {
                "workload": {
                    "arrivals": {"process": "poisson", "rate": "20 /s"}, "input_tokens": 500, "output_tokens": 200,
                    "num_requests": 1000,
                },
                "replicas": 2, "scheduler": {"max_num_seqs": 128, "max_num_batched_tokens": 2048},
            },
            "price": {"usd_per_gpu_hour": 2.0}, "draws": 1,
        }
    )  # fmt: skip
    panel = serving_panel(made, points=4, requests=300)
    quiet = panel.simulated["tpot_s"]
    assert quiet[0] < quiet[-1]
    panel.set(requests_per_s=float(panel.rates[1]), replicas=1.0)
    assert panel.figure.data[5].y[0] == pytest.approx(quiet[1] * 1e3)
