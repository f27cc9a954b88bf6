"""The quickstart's checks and results as sections of one table."""

from __future__ import annotations

from typing import Any

from longcat_sim.calibration import OpTimes
from longcat_sim.specs.hardware import load_hardware
from longcat_sim.specs.scenario import Scenario, scenario
from longcat_sim.studies.result import ServeOutcome, StepOutcome
from longcat_sim.studies.simulate import simulate_one_step, simulate_traffic
from longcat_sim.studies.validate.longcat_report import measured_rows, theory_rows
from longcat_sim.studies.validate.section import Row, Section

DRAWS = 16
"""Draws behind the quickstart's intervals."""
STEP_POINTS = (
    ("decode", 1, 200), ("decode", 3, 100), ("decode", 4, 300), ("decode", 6, 200), ("decode", 12, 150),
    ("prefill", 1, 48), ("prefill", 1, 200), ("prefill", 2, 160),
)  # fmt: skip
"""Steps of check 2: between the sizes that are measured."""


def held_out_ops(times: OpTimes) -> Section:
    """Return the error of each op kind on a random fifth of its sizes that the fit did not see."""
    section = Section("check-1-ops", "Check 1: op times on a random fifth of the sizes, held out of the fit")
    for row in times.errors_:
        if row["split"] != "random":
            continue
        law = " ".join(filter(None, (row["dtype"], row["variant"])))
        section.rows.append(
            Row(
                f"{row['kind']} ({law}), {row['count']:.0f} sizes: MAPE", "", row["mape"], error=row["mape"],
                note=f"90 % interval covers {row['coverage']:.0%}" if row.get("coverage") is not None else "",
            )
        )  # fmt: skip
    return section


def decode_steps(times: OpTimes, model: str, device: Any) -> Section:
    """Return decode and prefill steps of the executable model beside the sum of their op times."""
    from longcat_sim.studies.validate import own_step

    section = own_step.run(times, model=model, device=device, points=STEP_POINTS, budget_s=14.0)
    section.name, section.title = "check-2-steps", f"Check 2: steps of {model} on this machine, from op times alone"
    return section


def two_ranks(model: str) -> Section:
    """Return two gloo ranks under ``none`` and ``sbo`` beside their prediction, on gloo's link and on a paced one."""
    from longcat_sim.studies.validate import ranks

    section = ranks.run(
        model=model,
        shapes=(ranks.Shape(1, 48), ranks.Shape(1, 48, 1.0), ranks.Shape(2, 40, 0.5)),
        fit_shapes=(ranks.Shape(1, 64),), blocks=2, repeats=6, attempts=1, more_shapes=(),
    )  # fmt: skip
    section.name, section.title = "check-3-ranks", "Check 3: two real ranks, overlap off (none) and on (sbo)"
    return section


def published_rows() -> tuple[Section, StepOutcome]:
    """Return LongCat-Flash on 128 H800 beside its report, and the step at 96 sequences per GPU."""
    section = Section("longcat-128-h800", "LongCat-Flash on 128 H800 beside its report (nothing is fitted to it)")
    times = OpTimes.from_hardware(load_hardware("h800-sxm"))
    section.rows += [row for row in theory_rows() if row.quantity.startswith("longcat-flash:")]
    section.rows += measured_rows(times, draws=DRAWS)
    step = simulate_one_step(scenario("longcat-flash-h800-decode", {"draws": DRAWS}), times)
    section.rows.append(
        Row(
            "TPOT at 96 sequences per GPU", "ms", step["tpot_s"].median * 1e3, 26.0,
            low=step["tpot_s"].p5 * 1e3, high=step["tpot_s"].p95 * 1e3, note="published as about 26",
        )
    )  # fmt: skip
    return section, step


def traffic(case: Scenario) -> ServeOutcome:
    """Return an hour of traffic."""
    return simulate_traffic(case)


def prices(step: StepOutcome, serving: ServeOutcome) -> Section:
    """Return what a token costs: in steady decode, and in an hour of traffic on a whole fleet."""
    section = Section("price", "Price of a token, and an hour of traffic")
    usd = step["usd_per_million_output_tokens"]
    section.rows.append(
        Row(
            "1M output tokens, 96 per GPU, decode GPUs", "USD", usd.median, 2.0 / 3600 / (96 / 26e-3) * 1e6,
            low=usd.p5, high=usd.p95, note="published: from TPOT of about 26 ms at 2 USD/h",
        )
    )  # fmt: skip
    got = serving.figures
    for key, name in (
        ("usd_per_million_input_tokens", "1M input tokens, whole fleet"),
        ("usd_per_million_output_tokens", "1M output tokens, whole fleet"),
        ("usd_per_million_output_tokens_all_in", "whole bill per 1M output tokens"),
    ):
        if got.get(key) is not None:
            section.rows.append(Row(name, "USD", got[key]))
    for key, name, unit, factor in (("ttft_s", "TTFT", "s", 1.0), ("tpot_s", "TPOT", "ms", 1e3)):
        if got[key] is not None:
            section.rows.append(Row(f"{name}, median", unit, got[key]["p50"] * factor))
            section.rows.append(Row(f"{name}, 99th percentile", unit, got[key]["p99"] * factor))
    section.rows.append(Row("goodput within the SLO", "requests/s", got["goodput_requests_per_s"]))
    section.notes.append(
        f"{got['completed']} requests in {got['duration_s'] / 60:.0f} min on {got['gpu_hours']:.0f} GPU-hours, "
        f"simulated in {got['wall_s']:.1f} s"
    )
    return section
