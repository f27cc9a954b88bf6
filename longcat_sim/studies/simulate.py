"""``simulate``: a scenario's step or traffic, with calibrated op times, intervals and prices."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from longcat_sim.capacity.interval import Interval
from longcat_sim.capacity.op_times import op_times_of
from longcat_sim.capacity.price import usd_per_million_tokens
from longcat_sim.errors import SpecError
from longcat_sim.ops.op import Op, OpTimesLike, Tag
from longcat_sim.simulation import metrics
from longcat_sim.simulation.serving.request import COMPLETED, FAILED, REJECTED
from longcat_sim.simulation.serving.simulate import ServingResult
from longcat_sim.simulation.step import (
    StepDraws,
    StepResult,
    simulate_draws,
    simulate_step,
    step_size,
)
from longcat_sim.specs.scenario import Scenario
from longcat_sim.studies.engines import budget_notes, pools_of
from longcat_sim.studies.fleet_figures import FILL, WINDOW
from longcat_sim.studies.result import ServeOutcome, StepOutcome
from longcat_sim.studies.served import serve_once

TRACE_WINDOW_S = (0.0, 60.0)
FILLING = 0.2
"""Share of the counted time during which a fleet may still be filling. Assumed."""
Progress = Callable[[str], None]


def simulate(
    scenario: Scenario, *, step_by_step: bool = False, keep_spans: bool = False, progress: Progress | None = None
) -> StepOutcome | ServeOutcome:
    """Return the scenario's step (``step:``) or traffic (``serve:``); where it has both, the traffic.

    ``keep_spans`` keeps the steps of the first minute of traffic for a trace; ``progress`` is told of each run.

    Raises:
        UserError: whatever the model, hardware, deployment or workload does not allow.
    """
    if scenario.serve is not None:
        return simulate_traffic(scenario, step_by_step=step_by_step, keep_spans=keep_spans, progress=progress)
    if scenario.step is None:
        raise SpecError(
            f"{scenario.where}: expected a step: or a serve: section, such as "
            "--set 'step={phase: decode, sequences_per_gpu: 96, context_tokens: 5000}'; got neither; add one"
        )
    return simulate_one_step(scenario, op_times_of(scenario.hardware))


def simulate_one_step(scenario: Scenario, op_times: OpTimesLike) -> StepOutcome:
    """Return the scenario's step: run event by event once, and in every draw for the intervals."""
    step = simulate_step(scenario, op_times, seed=scenario.seed)
    if scenario.draws == 1:
        one = [
            np.array([value])
            for value in (step.step_s, step.compute_s, step.communication_s, step.exposed_communication_s)
        ]
        draws = StepDraws(*one)
    else:
        draws = simulate_draws(scenario, op_times, scenario.draws, seed=scenario.seed)
    figures = {key: Interval.of(values) for key, values in step_figures(scenario, draws).items()}
    figures["memory_bytes_per_gpu"] = Interval.of([step.memory.total_bytes])
    notes = [*step.notes, *_op_notes(op_times, scenario, step), *_price_notes([scenario])]
    above = figures["step_s"].median / step.step_s - 1
    if abs(above) > SKEWED:
        notes.append(
            f"the median over draws is {abs(above):.0%} {'above' if above > 0 else 'below'} the step at the fit's own "
            f"figures ({step.step_s * 1e3:.4g} ms, what draws: 1 gives): errors this wide lengthen a step by more than "
            "they shorten it; compare medians with medians"
        )
    context, longest = step_size(scenario).context, scenario.model.max_position_embeddings
    if float(np.max(context)) > longest:
        notes.append(f"contexts of {float(np.max(context)):,.0f} tokens are beyond the model's {longest:,}")
    extrapolated = is_extrapolated(step.tags)
    if extrapolated:
        leaning = ", ".join(f"{tag} {share:.0%}" for tag, share in step.tags.items())
        notes.append(f"op time by source: {leaning}")
    return StepOutcome(scenario, figures, step, notes, extrapolated)


def step_figures(scenario: Scenario, draws: StepDraws) -> dict[str, Any]:
    """Return every figure of a step in every draw [draws]."""
    size, step = step_size(scenario), scenario.step
    assert step is not None
    figures: dict[str, Any] = {"step_s": draws.step_s}
    price, utilisation = scenario.usd_per_gpu_hour, scenario.price.utilisation
    if step.phase == "decode":
        tpot = draws.tpot_s(scenario.speculative.tokens_per_step)
        rate = float(size.sequences) / tpot
        figures |= {"tpot_s": tpot, "tokens_per_s_per_user": 1 / tpot, "tokens_per_s_per_gpu": rate}
        key = "usd_per_million_output_tokens"
    else:
        # a rate of prompt tokens: cached ones count as served, as the published prefill rates do
        rate = float(size.sequences) * step.prompt_tokens / draws.step_s
        figures |= {"ttft_s": draws.step_s, "input_tokens_per_s_per_gpu": rate}
        key = "usd_per_million_input_tokens"
    figures[key] = np.array([usd_per_million_tokens(price, float(each), utilisation) for each in rate])
    figures |= {
        "compute_s": draws.compute_s,
        "communication_s": draws.communication_s,
        "exposed_communication_s": draws.exposed_communication_s,
    }
    return figures


SKEWED = 0.1
"""Difference of the median over draws and the step at the fit's own figures that is said. Assumed."""
LEANING = 0.05
"""Share of a step's op time that is extrapolated or from a data sheet above which the answer is flagged. Assumed."""


def unmeasured_share(tags: Mapping[Tag, float]) -> float:
    """Return the share of a step's op time that nobody measured."""
    return sum(share for tag, share in tags.items() if tag in ("extrapolated", "datasheet"))


def is_extrapolated(tags: Mapping[Tag, float]) -> bool:
    """Whether a step leans on times that nobody measured."""
    return unmeasured_share(tags) > LEANING


def _price_notes(parts: Iterable[Scenario]) -> list[str]:
    """Return where a scenario's price is not that of the hardware's own profile."""
    notes = []
    for part in parts:
        given, own = part.price.usd_per_gpu_hour, part.hardware.price
        if given is not None and part.price.hardware_usd_per_gpu_hour:
            notes.append(
                f"price: {given:.4g} USD per GPU-hour is the scenario's for any hardware; hardware_usd_per_gpu_hour "
                "has no effect beside it: --set price.usd_per_gpu_hour=null"
            )
            continue
        if given is not None and own is not None and abs(given / own - 1) > 0.01:
            notes.append(
                f"price: {given:.2f} USD per GPU-hour is the scenario's for any hardware; the profile of "
                f"{part.hardware.name} says {own:.2f}: --set price.usd_per_gpu_hour={own:g}"
            )
    return list(dict.fromkeys(notes))


def _op_notes(op_times: OpTimesLike, scenario: Scenario, step: StepResult) -> list[str]:
    """Return what a reader must know of the op times, the device and the settings."""
    notes = []
    if hasattr(op_times, "notes"):
        items = step.timeline.program.items
        sorts = {(i.kind, i.dtype, i.variant) for i in items if not i.is_collective and i.kind != "host"}
        exchanges = {(i.kind, i.variant, i.tag) for i in items if i.is_collective}
        notes += op_times.notes([Op(kind, (), dtype, variant) for kind, dtype, variant in sorts], exchanges)
    changed = scenario.hardware.changed
    if changed:
        notes.append(f"hardware {scenario.hardware.name}: not as its data sheet: {', '.join(changed)}")
    assumed = scenario.hardware.assumed
    if assumed:
        notes.append(f"hardware {scenario.hardware.name}: assumed, without a source: {', '.join(assumed)}")
    return notes


def simulate_traffic(
    scenario: Scenario, *, step_by_step: bool = False, keep_spans: bool = False, progress: Progress | None = None
) -> ServeOutcome:
    """Return the scenario's traffic served once, and once more per draw of calibration and traffic for intervals.

    Times can be extrapolated in two ways. ``extrapolated_step_ratio`` is the share of the run's steps beyond the grid
    of step times (batch, context or prefill tokens); ``unmeasured_op_time_ratio`` the share of a typical step's op
    time (of the worst pool) beyond what was measured. ``extrapolated``: the first is above 0, or the second above
    ``LEANING``.
    """
    serve = scenario.serve
    assert serve is not None
    window = TRACE_WINDOW_S if keep_spans else None
    run, figures = serve_once(scenario, step_by_step=step_by_step, window=window)
    context, prompt = _means(run)
    share, notes = leans_on(scenario, context, figures["decode_sequences_per_replica"], prompt)
    figures["unmeasured_op_time_ratio"] = share
    figures["extrapolated"] = bool(figures["extrapolated"] or share > LEANING)
    intervals = None
    if scenario.draws > 1:
        drawn = []
        for draw in range(1, scenario.draws + 1):
            if progress is not None:
                progress(f"draw {draw} of {scenario.draws} for the intervals (--set draws=1 leaves them out)")
            drawn.append(serve_once(scenario, draw)[1])
        intervals = metrics.intervals(figures, drawn, run.interpolation_error)
        figures["wall_s"] += sum(each["wall_s"] for each in drawn)
    notes += budget_notes(pools_of(scenario, serve), serve) + _price_notes(pools_of(scenario, serve).values())
    longest = scenario.model.max_position_embeddings
    columns = run.records
    counted = columns.numpy("arrival") >= round(serve.workload.warm_up * 1e9)
    served = counted & (columns.numpy("status") == COMPLETED)
    beyond = int((columns.numpy("input") + columns.numpy("output") > longest)[served].sum())
    if beyond and serve.scheduler.max_model_len is None:
        notes.append(
            f"{beyond} requests are longer than the {longest:,} tokens that the model was made for, and were served "
            f"all the same: --set serve.scheduler.max_model_len={longest} rejects them"
        )
    start, end = figures["window_s"]
    stay = (figures["e2e_s"] or {}).get("p50", 0.0)
    filling = max(0.0, FILL * stay - start) > FILLING * (end - start)
    if (
        not figures["unstable"]  # a queue that grows has no steady state, however long the run
        and serve.workload.arrivals is not None
        and serve.workload.arrivals.rate
        and (filling or end - start < WINDOW * stay)
    ):
        notes.append(
            f"no steady state: the counted requests came between {start:.3g} and {end:.3g} s and take {stay:.3g} s "
            "each (median), so that rates and prices hold the filling of the fleet; make the run longer, as by "
            f"--set serve.workload.num_requests={serve.workload.arrivals.rate * 2 * (FILL + WINDOW) * stay:.0f} "
            f"--set 'serve.workload.warm_up={FILL * stay:.0f} s'"
        )
    if serve.is_disaggregated and serve.replicas != 1:
        notes.append(
            f"serve.replicas = {serve.replicas} has no effect beside pools, which have their own: set "
            "serve.prefill.replicas and serve.decode.replicas"
        )
    latest = float(columns.numpy("arrival").max(initial=0)) * 1e-9
    for number, fault in enumerate(serve.faults):
        if fault.at > latest:
            what = f"the last arrival ({latest:.4g} s): only requests in flight can feel it"
            if fault.at >= run.duration_s:
                what = f"the end of the run ({run.duration_s:.4g} s): it has no effect"
            notes.append(
                f"serve.faults[{number}]: at = {fault.at:g} s lies beyond {what}; let it begin earlier, or make the "
                "run longer"
            )
    if scenario.price.utilisation != 1.0:
        notes.append("price.utilisation has no effect on traffic: idle time is simulated and stands in the bill")
    for name, status in (("rejected", REJECTED), ("failed", FAILED)):
        if figures[name]:
            # a reason is "kind: figures of this request"
            lost = np.flatnonzero(counted & (columns.numpy("status") == status))
            kinds = Counter(columns.reasons[int(at)].partition(":")[0] for at in lost)
            said = "; ".join(f"{count} {kind}" for kind, count in kinds.most_common())
            notes.append(f"{figures[name]} of {figures['requests']} requests {name}: {said}")
    if figures["extrapolated"]:
        notes.append(
            f"extrapolated: {100 * figures['extrapolated_step_ratio']:.3g}% of the steps are larger than any that was "
            f"evaluated, and {100 * figures['unmeasured_op_time_ratio']:.3g}% of a typical step's op time is "
            "beyond what was measured or from a data sheet"
        )
    if scenario.draws < 2:
        notes.append("one run, no intervals: --set draws=8 gives them")
    if run.skipped_rows:
        notes.append(f"{run.skipped_rows} faulty rows of the trace were skipped: {'; '.join(run.skipped[:3])}")
    return ServeOutcome(scenario, run, figures, intervals, notes)


def _means(run: ServingResult) -> tuple[float, float]:
    """Return a run's mean context in the middle of an answer, and mean prompt tokens computed."""
    columns = run.records
    done = columns.numpy("status") == COMPLETED
    if not done.any():
        return 1024.0, 1024.0
    inputs, outputs, cached = (columns.numpy(name)[done] for name in ("input", "output", "cached"))
    return float((inputs + outputs / 2).mean()), float((inputs - cached).mean())


def leans_on(scenario: Scenario, context: float, batch: float, prompt: float) -> tuple[float, list[str]]:
    """Return the share of op time that nobody measured at the sizes and on the device asked for (the largest over
    pools), and what a reader must know of its op times.

    Of a decode step of ``batch`` sequences of a replica at a mean ``context``; of a prefill pool a mean ``prompt``.
    """
    assert scenario.serve is not None
    leaning, notes = 0.0, []
    for name, part in pools_of(scenario, scenario.serve).items():
        budget = scenario.serve.scheduler.max_num_batched_tokens / part.deployment.num_gpus
        step = {"phase": "prefill", "prompt_tokens": max(1.0, prompt), "tokens_per_gpu": budget}
        if name != "prefill":
            each = max(1.0, batch / part.deployment.num_gpus)
            step = {"phase": "decode", "sequences_per_gpu": each, "context_tokens": max(1.0, context)}
        op_times = op_times_of(part.hardware)
        typical = simulate_step(part.what_if({"step": step, "deployment.overlap": "none"}), op_times, check=False)
        leaning = max(leaning, unmeasured_share(typical.tags))
        notes += _op_notes(op_times, part, typical)
    return leaning, list(dict.fromkeys(notes))
