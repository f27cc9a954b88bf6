"""One step of a deployment: ``simulate_step`` on the SimPy lanes, ``simulate_draws`` for intervals, and
``step_seconds_many`` for grids."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from longcat_sim.errors import ScheduleError, SpecError
from longcat_sim.ops.attention import StepSize
from longcat_sim.ops.graph import LayerLoad, exchange_mode, step_graph
from longcat_sim.ops.memory import Memory, check_memory, kv_bytes_per_token, memory
from longcat_sim.ops.op import FloatArray, OpTimesLike, Tag
from longcat_sim.ops.schedules import schedule
from longcat_sim.records.routing import RoutingTrace
from longcat_sim.records.span import Span
from longcat_sim.simulation.account import Account, account
from longcat_sim.simulation.contention import ContentionLaw, MeasuredLaw, contention_law
from longcat_sim.simulation.lanes import LaneEngine, Timeline
from longcat_sim.simulation.load import busiest_context, draw_contexts, draw_loads, typical_load
from longcat_sim.simulation.network import check_topology
from longcat_sim.simulation.program import Pricer, Program, build_program, links_of
from longcat_sim.simulation.vectorised import run_arrays
from longcat_sim.specs.deployment import DecodeStep, Deployment
from longcat_sim.specs.scenario import Scenario
from longcat_sim.specs.serve import Serve


@dataclass
class StepResult:
    """One simulated step: totals in seconds (of the slowest rank where ranks differ), spans, and accounts."""

    scenario: Scenario
    timeline: Timeline
    step_s: float
    compute_s: float
    communication_s: float
    exposed_communication_s: float
    memory: Memory
    tags: dict[Tag, float]
    """Share of the step's op time by where the figure comes from."""
    breakdown: Account
    """Where the time goes."""
    notes: list[str] = field(default_factory=list)

    @property
    def tokens_per_step(self) -> float:
        """Output tokens per sequence and step."""
        return self.scenario.speculative.tokens_per_step

    @property
    def tpot_s(self) -> float:
        """Seconds per output token of one user (decode)."""
        return self.step_s / self.tokens_per_step

    def spans(self, ranks: Any = None, layers: Any = None) -> list[Span]:
        """Return spans of some ranks and layers (all by default)."""
        return self.timeline.spans(ranks, layers)

    def middle_layer(self) -> int:
        """Return a layer in steady state: the middle one of all that are no plain block."""
        layers = [item.layer for item in self.timeline.program.items if item.block not in _PLAIN_BLOCKS]
        return sorted(set(layers))[len(set(layers)) // 2] if layers else 0

    def layer_ops(self, layer: int | None = None, rank: int = 0) -> list[dict[str, Any]]:
        """Return one entry per op of a layer: name, segment, lane, start_s and end_s from the layer's start, tag."""
        chosen = self.middle_layer() if layer is None else layer
        program, line = self.timeline.program, self.timeline
        picked = [
            (i, item)
            for i, item in enumerate(program.items)
            if item.layer == chosen and item.block not in _PLAIN_BLOCKS and item.block != "draft"
        ]
        start = min((line.start_s[i, rank] for i, _ in picked), default=0.0)
        return [
            {
                "name": item.name, "segment": item.segment + (f"@{item.part}" if item.part else ""),
                "lane": program.lanes[item.lane], "start_s": float(line.start_s[i, rank] - start),
                "end_s": float(line.end_s[i, rank] - start), "tag": item.tag,
            }
            for i, item in picked
        ]  # fmt: skip


MODEL_DISCREPANCY = 0.08
"""Standard deviation of log(measured / predicted) of whole steps that no fit has seen: root mean square over the five
published steps of ``validate`` with all contexts equal (LongCat-Flash at three batches 0.07, 0.13 and 0.10, DeepSeek-V3
decode 0.02 and prefill 0.03; 0.03 with LongCat's contexts spread). It widens intervals and moves no median."""
STEADY_LAYERS = 3
"""Layers after which every further one takes the same time (a lane's lead is built up within two)."""
_PLAIN_BLOCKS = frozenset({"embedding", "head", "draft input", "draft head", "stages"})


@dataclass(frozen=True)
class StepDraws:
    """Totals of a step in every draw [draws]."""

    step_s: FloatArray
    compute_s: FloatArray
    communication_s: FloatArray
    exposed_communication_s: FloatArray

    def tpot_s(self, tokens_per_step: float) -> FloatArray:
        """Return seconds per output token [draws]."""
        return self.step_s / tokens_per_step


def step_size(scenario: Scenario) -> StepSize:
    """Return one GPU's share of the scenario's step.

    Raises:
        SpecError: the scenario has no step.
    """
    step = scenario.step
    if step is None:
        raise SpecError(
            f"{scenario.where}: step: expected one, such as step: {{phase: decode, sequences_per_gpu: 96, "
            "context_tokens: 5000}}; got none; add it"
        )
    if step.phase == "decode":
        queries = float(1 + scenario.speculative.draft_tokens)
        return StepSize("decode", step.sequences_per_gpu, queries, step.context_tokens)
    queries = step.prompt_tokens - step.cached_tokens
    return StepSize("prefill", step.tokens_per_gpu / queries, queries, step.prompt_tokens)


def drawn_size(scenario: Scenario, *, draws: int = 1, seed: int = 0) -> StepSize:
    """Return one GPU's share of the step, with a context of its own for every rank where contexts are spread."""
    size, step, deployment = step_size(scenario), scenario.step, scenario.deployment
    if not isinstance(step, DecodeStep) or not step.context_spread:
        return size
    context = draw_contexts(
        step.context_tokens, step.context_spread, step.sequences_per_gpu * deployment.tp_size,
        ranks=_widest(deployment), tp_size=deployment.tp_size, draws=draws, seed=seed,
    )  # fmt: skip
    return replace(size, context=context)


def _widest(deployment: Deployment) -> int:
    """Return the ranks of the widest group that meets at a barrier."""
    return max(deployment.ep_size, deployment.dense_tp, deployment.tp_size)


def check_step(scenario: Scenario, size: StepSize) -> None:
    """Raise for an overlap that the step does not allow; warn of settings without effect.

    Raises:
        ScheduleError: no such schedule for this model, or two micro-batches of fewer than two sequences.
        SpecError: links that cannot carry the deployment.
    """
    deployment, model = scenario.deployment, scenario.model
    plan = schedule(deployment.overlap, model.layer_kind)
    if deployment.overlap != "none" and deployment.ep_size == 1:
        warnings.warn(
            f"overlap: {deployment.overlap} has no effect: with ep_size 1 there is no exchange to hide", stacklevel=3
        )
    elif plan.parts > 1 and size.phase == "decode" and float(np.min(size.sequences)) < plan.parts and not plan.whole:
        raise ScheduleError(
            f"{scenario.where}: deployment.overlap: {deployment.overlap} cuts a step into {plan.parts} micro-batches: "
            f"expected at least {plan.parts} sequences per GPU; got {float(np.min(size.sequences)):g}; use sbo or none"
        )
    check_topology(scenario.hardware, deployment)


def recorded_trace(scenario: Scenario) -> RoutingTrace | None:
    """Return the scenario's recorded routing, if it asks for one."""
    file = scenario.routing.file
    return RoutingTrace.load(Path(file)) if file is not None else None


def loads(scenario: Scenario, size: StepSize, *, draws: int, seed: int) -> LayerLoad | None:
    """Return random loads [layers, draws, ranks] for every MoE layer, the draft's included."""
    model = scenario.model
    layers = model.num_moe_layers + (scenario.speculative.draft_tokens if model.layer_kind == "moe" else 0)
    if not model.num_moe_layers:
        return None
    domain = scenario.hardware.domain_size
    tokens = float(size.rows) * (scenario.deployment.tp_size if scenario.deployment.ep_size == 1 else 1)
    return draw_loads(
        model, scenario.deployment, scenario.routing, tokens, layers=layers, draws=draws, seed=seed, domain=domain,
        trace=recorded_trace(scenario),
    )  # fmt: skip


def step_program(
    scenario: Scenario, op_times: OpTimesLike, *, draws: int = 1, seed: int = 0, load: LayerLoad | None = None,
    pricer: Pricer | None = None, ranks: int | None = None,
) -> Program:  # fmt: skip
    """Return the program of the scenario's step on all ranks of one expert-parallel group, or on ``ranks`` of them.

    Raises:
        UserError: whatever the step does not allow.
    """
    size = drawn_size(scenario, draws=draws, seed=seed)
    check_step(scenario, size)
    load = load or loads(scenario, size, draws=draws, seed=seed)
    blocks = step_graph(scenario.model, scenario.deployment, size, load, scenario.speculative.draft_tokens)
    return build_program(blocks, op_times, draws=draws, ranks=ranks or _widest(scenario.deployment), pricer=pricer)


def law_of(scenario: Scenario, op_times: OpTimesLike, contention: str | ContentionLaw) -> ContentionLaw:
    """Return the law to apply: the named one, with what the fit knows as measured over it."""
    law = contention_law(contention)
    if contention == "off":
        return law
    links = links_of(op_times)
    mode = exchange_mode(scenario.step.phase if scenario.step else "decode")
    known = hasattr(links, "overlap_rates")
    beside = links.overlap_rates(mode) if known else {}
    measured = links.contention_pairs(mode) if known else {}
    return MeasuredLaw(measured, beside, law) if measured or beside else law


def simulate_step(
    scenario: Scenario, op_times: OpTimesLike, *, seed: int = 0, contention: str | ContentionLaw = "max_min",
    stragglers: Mapping[int, float] | None = None, check: bool = True,
) -> StepResult:  # fmt: skip
    """Return one step, simulated event by event on every rank.

    ``stragglers`` maps a rank to the factor on its compute; ``contention`` is ``max_min``, ``off`` or a law.

    Raises:
        UserError: a step that the model, the schedule, the links or the memory do not allow.
    """
    found = step_memory(scenario)
    if check:
        _check_fit(scenario, found)
    program = step_program(scenario, op_times, seed=seed)
    if stragglers:
        program = program.scaled(stragglers)
    timeline = LaneEngine(program, law_of(scenario, op_times, contention)).run()
    totals = account(timeline, op_times)
    return StepResult(
        scenario, timeline, timeline.step_s, totals.compute_s, totals.communication_s, totals.exposed_s, found,
        _tag_shares(timeline), totals, list(program.notes),
    )  # fmt: skip


def simulate_draws(
    scenario: Scenario, op_times: OpTimesLike, draws: int | None = None, *, seed: int = 0,
    contention: str | ContentionLaw = "max_min", discrepancy: float = MODEL_DISCREPANCY,
) -> StepDraws:  # fmt: skip
    """Return the step's totals in every draw.

    Each draw is one of the routing, one of the calibration (``op_times.draw(i)``, where it has draws) and one of what
    the model of a step as a whole gets wrong (``discrepancy``).
    """
    count = draws or scenario.draws
    size = step_size(scenario)
    check_step(scenario, size)
    drawn = loads(scenario, size, draws=count, seed=seed)
    draw = getattr(op_times, "draw", None) if count > 1 else None
    pricer = Pricer(op_times, [draw(i) for i in range(count)] if draw else ())
    program = step_program(scenario, op_times, draws=count, seed=seed, load=drawn, pricer=pricer)
    totals = _arrays(program, law_of(scenario, op_times, contention))
    factor = discrepancy_factors(count, seed, discrepancy)
    return StepDraws(*(column * factor for column in totals))


def discrepancy_factors(draws: int, seed: int = 0, spread: float = MODEL_DISCREPANCY) -> FloatArray:
    """Return a factor on a step's time for each draw [draws]: log-normal around 1, stratified; 1 for a single draw."""
    if draws < 2:
        return np.ones(draws)
    rng = np.random.default_rng((seed, 3))
    levels = (np.arange(draws) + 0.5) / draws
    normal = np.array([NormalDist().inv_cdf(float(level)) for level in levels])
    return np.exp(spread * rng.permutation(normal))


def _arrays(program: Program, law: ContentionLaw) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    if len(program.order) <= 2:
        found = run_arrays(program, law)
        return found.step_s, found.compute_s.mean(1), found.communication_s.mean(1), found.exposed_s
    rows = []
    for draw in range(program.draws):
        totals = account(LaneEngine(program, law, draw).run())
        rows.append((totals.step_s, totals.compute_s, totals.communication_s, totals.exposed_s))
    step, compute, communication, exposed = (np.array(column) for column in zip(*rows, strict=True))
    return step, compute, communication, exposed


def slowest_context(scenario: Scenario, sequences: Any, context: Any, spread: float | None = None) -> Any:
    """Return the mean context of the rank that all others wait for; ``spread`` is by default that of the step."""
    deployment = scenario.deployment
    if spread is None:
        spread = scenario.step.context_spread if isinstance(scenario.step, DecodeStep) else 0.0
    if not spread:
        return context
    groups = _widest(deployment) // deployment.tp_size
    return context * busiest_context(spread, sequences * deployment.tp_size, groups)


def step_seconds_many(
    scenario: Scenario, op_times: OpTimesLike, sequences: Any, context: Any, *, phase: str = "decode",
    queries: Any = None, seed: int = 0, contention: str | ContentionLaw = "max_min", beside_sequences: Any = None,
    beside_context: Any = None, context_spread: float | None = None, fill: Any = 1.0,
) -> FloatArray:  # fmt: skip
    """Return the seconds of many steps at once [points]: one busiest rank stands for all, and layers in steady state
    are simulated once.

    ``sequences`` are per GPU and may be below 1 (then a step is as long as at 1 row). In prefill ``queries`` are the
    new tokens of each prompt and ``context`` what its last token attends to; ``beside_sequences`` of mean context
    ``beside_context`` decode in the same pass. ``context_spread`` is the coefficient of variation of the contexts in
    decode, by default that of the scenario's step. ``sequences`` are those of the GPU with the most of them; over all
    GPUs there are ``fill`` times as many (1: all have the same; prompts on 1 of 16 ranks: 1/16).
    """
    model, deployment = scenario.model, scenario.deployment

    def slowest(each: FloatArray, attended: FloatArray) -> FloatArray:
        return slowest_context(scenario, each, attended, context_spread)

    columns = np.broadcast_arrays(
        np.asarray(sequences, dtype=float), np.asarray(context, dtype=float),
        np.asarray(1.0 + scenario.speculative.draft_tokens if queries is None else queries, dtype=float),
    )  # fmt: skip
    shape = columns[0].shape
    batch, length, new = (np.maximum(column.reshape(-1, 1), 1e-9) for column in columns)
    beside = None
    if beside_sequences is not None:
        verified = 1.0 + scenario.speculative.draft_tokens
        decoding, attended = (
            np.broadcast_to(np.asarray(column, dtype=float), shape).reshape(-1, 1)
            for column in (beside_sequences, beside_context)
        )
        beside = StepSize("decode", decoding, verified, slowest(decoding, attended))
    if phase == "decode":
        length = slowest(batch, length)
    share = np.broadcast_to(np.asarray(fill, dtype=float), shape).reshape(-1, 1)
    size = StepSize(phase, batch, new, np.maximum(length, new), beside, share)
    load = None
    if model.num_moe_layers:
        domain = scenario.hardware.domain_size
        is_shared = deployment.ep_size > 1
        tokens = size.mean_rows(deployment.ep_size, deployment.tp_size) if is_shared else size.rows * deployment.tp_size
        load = typical_load(
            model, deployment, scenario.routing, tokens, seed=seed, domain=domain, trace=recorded_trace(scenario)
        )
        if is_shared and (share < 1).any():  # the fullest rank sends what its own rows make
            own = typical_load(
                model, deployment, scenario.routing, size.rows, seed=seed, domain=domain, trace=recorded_trace(scenario)
            )
            load = replace(load, sent=own.sent, fan_out=own.fan_out)
    drafts = scenario.speculative.draft_tokens if phase == "decode" else 0
    blocks = step_graph(model, deployment, size, load, drafts)
    law = law_of(scenario, op_times, contention)
    pricer = Pricer(op_times)
    cuts = {at: min(block.count, STEADY_LAYERS) for at, block in enumerate(blocks)}

    def seconds(layers: dict[int, int]) -> FloatArray:
        cut = [replace(block, count=layers[at]) for at, block in enumerate(blocks)]
        return _arrays(build_program(cut, op_times, draws=len(batch), ranks=1, pricer=pricer), law)[0]

    result = base = seconds(cuts)
    for at, block in enumerate(blocks):
        if block.count > cuts[at]:  # the rest of a long block takes a steady layer's time each
            result = result + (block.count - cuts[at]) * (seconds({**cuts, at: cuts[at] + 1}) - base)
    return result.reshape(shape)


def step_memory(scenario: Scenario) -> Memory:
    """Return what the fullest GPU holds during the scenario's step: the one with the longest contexts, in decode."""
    size = step_size(scenario)
    decode = size.phase == "decode"
    context = slowest_context(scenario, size.sequences, size.context) if decode else size.context
    return memory(
        scenario.model, scenario.deployment, scenario.hardware, sequences_per_gpu=size.sequences,
        tokens_per_sequence=float(context), rows_per_gpu=float(size.rows), decode=decode,
        speculative=scenario.speculative.draft_tokens > 0, routing=scenario.routing,
    )  # fmt: skip


def replica_kv_tokens(scenario: Scenario, serve: Serve, role: str = "shared") -> tuple[float, Memory]:
    """Return the tokens of KV cache for which a serving replica has room (negative: none), and its memory.

    A replica that prefills holds the activations and exchange buffers of a whole token budget; one that only decodes
    (``role`` ``decode``) those of its sequences.
    """
    deployment, scheduler = scenario.deployment, serve.scheduler
    decoding = scheduler.max_num_seqs * (1 + scenario.speculative.draft_tokens)
    rows = decoding if role == "decode" else scheduler.max_num_batched_tokens
    if role != "decode" and not scheduler.chunked_prefill:  # a whole prompt is on one rank
        rows *= deployment.dp_size
    found = memory(
        scenario.model, deployment, scenario.hardware, sequences_per_gpu=0.0, tokens_per_sequence=0.0,
        rows_per_gpu=rows / deployment.num_gpus, decode=role == "decode",
        speculative=scenario.speculative.draft_tokens > 0, routing=scenario.routing,
    )  # fmt: skip
    holders = deployment.num_gpus / deployment.tp_size  # ranks of a tensor-parallel group hold the same tokens
    each = kv_bytes_per_token(scenario.model, deployment, speculative=scenario.speculative.draft_tokens > 0)
    return found.free_for_kv_bytes / each * holders, found


def _check_fit(scenario: Scenario, found: Memory) -> None:
    size = step_size(scenario)
    drafting = scenario.speculative.draft_tokens > 0
    token = kv_bytes_per_token(scenario.model, scenario.deployment, speculative=drafting)
    each = size.context * token * scenario.deployment.tp_size
    check_memory(found, kv_bytes_per_sequence=each, where=f"{scenario.where}: step", sequences=size.sequences)


def _tag_shares(timeline: Timeline) -> dict[Tag, float]:
    """Return each tag's share of the op time of rank 0."""
    spent: dict[Tag, float] = {}
    lengths = timeline.own_end_s[:, 0] - timeline.start_s[:, 0]
    for item, seconds in zip(timeline.program.items, lengths, strict=True):
        spent[item.tag] = spent.get(item.tag, 0.0) + float(seconds)
    total = sum(spent.values()) or 1.0
    return {tag: seconds / total for tag, seconds in spent.items()}
