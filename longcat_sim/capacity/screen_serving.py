"""Screen fleets for traffic: replicas of shared or split pools, by a fluid model over the step function of the engine.

In a shared replica, per request: the steps that carry its prompt take E seconds more than they would without it, and
its output takes O / (b k) steps of T(b) seconds, where b sequences decode at once and k tokens come per step. So a
batch b carries r(b) = 1 / (E(b) + O T(b) / (b k)) requests per second, and the load of a replica fixes b. Waiting for a
prompt's turn is that of an M/D/1 queue.

Source: work conservation and Little's law; M/D/1 waiting time rho S / (2 (1 - rho)), Kleinrock, Queueing Systems I,
section 5.7.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np

from longcat_sim.capacity.candidates import Rejected, Shape, memory_at, reason_of, search_of, shapes
from longcat_sim.capacity.full_steps import full_steps, seconds_per_token
from longcat_sim.capacity.price import MILLION, SECONDS_PER_HOUR
from longcat_sim.capacity.screen import nothing_left
from longcat_sim.capacity.traffic import Traffic
from longcat_sim.errors import CapacityError, UserError
from longcat_sim.ops.op import FloatArray
from longcat_sim.simulation.serving.ranked import fill_nodes, rank_share
from longcat_sim.simulation.step import replica_kv_tokens
from longcat_sim.specs.scenario import Scenario
from longcat_sim.specs.serve import Scheduler

StepFn = Callable[[FloatArray, FloatArray, FloatArray, FloatArray, FloatArray], FloatArray]
"""(decode batch, mean context, prefill tokens of the fullest rank times the ranks, keys per prefill query, share of
those tokens that all ranks have together) of a replica -> seconds [N]."""
StepFunctionOf = Callable[[Scenario], StepFn]


@dataclass(frozen=True)
class Curve:
    """One replica's step times over its batch, and what prompts cost it."""

    shape: Shape
    batch: FloatArray
    step_s: FloatArray
    """Of a decode step [B]."""
    prompt_extra_s: FloatArray
    """What a prompt adds to the steps that carry it, beside a decode batch [B]."""
    prompt_s: FloatArray
    """A prompt's way through those steps, beside a decode batch [B]."""
    alone_s: FloatArray
    """A prompt's way through steps without a decode batch, at each of ``fills``."""
    fills: FloatArray
    """Shares of the data-parallel ranks that have a prompt."""
    turns: int
    """Steps of a prompt."""
    prompt_share_s: float
    """A prompt's share of full prefill steps: what limits a prefill pool."""
    usd_per_hour: float

    def alone_at(self, requests_per_s: float) -> float:
        """Return a prompt's way through a replica that only prefills, at a rate."""
        ranks, fill = 1.0 / self.fills[0], float(self.fills[0])
        for _ in range(ROUNDS):  # as many prompts are under way as the rate times how long one takes
            taken = float(np.interp(fill, self.fills, self.alone_s))
            fill = float(np.clip(requests_per_s * taken / ranks, self.fills[0], 1.0))
        return float(np.interp(fill, self.fills, self.alone_s))

    def requests_per_s(self, output_tokens: float, tokens_per_step: float, *, shared: bool) -> FloatArray:
        """Return the rate that each batch carries [B]."""
        decode = output_tokens * self.step_s / (self.batch * tokens_per_step)
        return 1 / (decode + (self.prompt_extra_s if shared else 0.0))


@dataclass
class ScreenedFleets:
    """Fleets as columns [N]; ``changes`` makes the scenario of one."""

    columns: dict[str, FloatArray]
    changes: list[dict[str, Any]]
    labels: list[str]
    looked_at: int
    rejected: Rejected
    wall_s: float

    def row(self, at: int) -> dict[str, Any]:
        """Return a fleet's figures, and its deployment in words."""
        figures = {name: float(values[at]) for name, values in self.columns.items()}
        return {"deployment": self.labels[at], "changes": dict(self.changes[at]), **figures}


def curve(shape: Shape, step: StepFn, traffic: Traffic) -> Curve:
    """Return one replica's curve; its batch ends at ``max_num_seqs`` or where KV memory does."""
    serve = shape.scenario.serve
    assert serve is not None
    scheduler = serve.scheduler
    held = traffic.input_tokens + traffic.output_tokens / 2
    role = "decode" if serve.is_disaggregated else "shared"
    room = max(0.0, replica_kv_tokens(shape.scenario, serve, role)[0]) / held
    most = max(1.0, min(float(scheduler.max_num_seqs), room))
    batch = np.unique(np.geomspace(1.0, most, max(2, int(np.log2(most) * 2) + 2)))
    ranks = shape.scenario.deployment.dp_size
    turns = prompt_turns(scheduler, ranks, traffic.computed_tokens)
    fills = np.array(fill_nodes(ranks)) if ranks > 1 else np.ones(1)
    own = traffic.computed_tokens / turns
    keys = max(traffic.prompt_keys, (own + 1) / 2)
    many, n, f = np.concatenate, len(batch), len(fills)
    # every point in one call: decode alone; a prompt's chunk beside the batch, then alone, at every share of ranks that
    # have one; and full prefill steps, each on the ranks that the others may wait for
    full = full_steps(traffic, scheduler, ranks) if serve.is_disaggregated else np.zeros((0, 4))
    s = len(full)
    seconds = step(
        many([batch, np.repeat(batch, f), np.zeros(f + s)]),
        many([np.full(n + n * f, traffic.decode_context), np.ones(f + s)]),
        many([np.zeros(n), np.full(n * f + f, own * ranks), full[:, 2] * ranks]),
        many([np.ones(n), np.full(n * f + f, keys), full[:, 3] / full[:, 2]]),
        many([np.ones(n), np.tile(fills, n + 1), np.minimum(1.0, full[:, 1] / (full[:, 2] * ranks))]),
    )
    ends = np.cumsum([n, n * f, f])
    decode_s, beside_s, alone_s, full_s = np.split(seconds, ends)
    beside_s = beside_s.reshape(n, f)
    extra, way = _beside(
        shape.scenario, traffic, batch, decode_s, np.maximum(beside_s, decode_s[:, None]), fills, turns
    )
    return Curve(
        shape, batch, decode_s, extra, way, alone_s * turns, fills, turns,
        seconds_per_token(full, full_s) * traffic.computed_tokens, shape.scenario.usd_per_gpu_hour * shape.num_gpus,
    )  # fmt: skip


ROUNDS, SETTLED = 100, 1e-4
"""Most rounds in which the prompts under way and how long each takes settle, and the change that is none."""


def _beside(
    scenario: Scenario, traffic: Traffic, batch: FloatArray, decode_s: FloatArray, beside_s: FloatArray,
    fills: FloatArray, turns: int,
) -> tuple[FloatArray, FloatArray]:  # fmt: skip
    """Return (what a prompt adds to its steps, its way through them) beside each decode batch [B].

    Prompts that are under way at once, on ranks of their own, share what their steps take longer: by Little's law they
    are as many as the rate that the batch carries times a prompt's way.
    """
    ranks, per_step = round(1.0 / fills[0]), scenario.speculative.tokens_per_step
    flying = np.ones(len(batch))
    for _ in range(ROUNDS):
        step_s = np.array([np.interp(at / ranks, fills, row) for at, row in zip(flying, beside_s, strict=True)])
        extra, way = turns * (step_s - decode_s) / flying, turns * step_s
        rate = 1.0 / (extra + traffic.output_tokens * decode_s / (batch * per_step))
        before, flying = flying, np.clip(rate * way, 1.0, ranks)
        if np.abs(flying - before).max() < SETTLED * ranks:
            break
    return extra, way


def prompt_turns(scheduler: Scheduler, ranks: int, tokens: float) -> int:
    """Return the steps of a prompt on its data-parallel rank."""
    if not scheduler.chunked_prefill:
        return 1
    most = rank_share(scheduler.max_num_batched_tokens, ranks)
    return max(1, int(np.ceil(tokens / min(most, scheduler.long_prefill_token_threshold or most))))


def ttft_floor_s(scenario: Scenario, tokens: float) -> float:
    """Return a bound below which no schedule brings a prompt of ``tokens`` through this deployment.

    What the GPU with the prompt has to compute at its highest data-sheet peak: experts are spread over ``ep_size``
    GPUs, attention over ``tp_size``, dense FFNs over ``dense_tp_size``. Or one read of the weights that every step
    reads (not the experts) at the full memory bandwidth.
    """
    hardware, deployment = scenario.hardware, scenario.deployment
    flop = scenario.model.flop_per_token((tokens + 1) / 2, phase="prefill")
    cut = {"dense_ffn": deployment.dense_tp, "experts": max(deployment.ep_size, deployment.tp_size)}
    own = sum(each / cut.get(name, deployment.tp_size) for name, each in flop.items() if name != "head")
    parts = memory_at(scenario, 1.0, 1.0).parts
    read = parts["attention_weights"] + parts["dense_ffn_weights"]
    return max(own * tokens / max(hardware.peak.values()), read / hardware.memory_bandwidth)


def check_ttft_reachable(scenario: Scenario, kept: list[Shape], limit_s: float | None) -> None:
    """Raise CapacityError if the level on the first token lies below the physical limit of every deployment."""
    if limit_s is None or not kept:
        return
    serve = scenario.serve
    assert serve is not None
    tokens = 1.0  # a cached prompt computes one token; without a cache, enough requests must be within the level
    if serve.workload.trace is None and serve.workload.sessions is None:
        tokens = float(np.quantile(Traffic.of(scenario).inputs, search_of(scenario).attainment))
    floor, label = min((ttft_floor_s(shape.scenario, tokens), shape.label) for shape in kept)
    if limit_s < floor:
        raise CapacityError(
            f"{scenario.where}: serve.slo ttft: expected at least {floor * 1e3:.3g} ms, the time that {label} needs "
            f"for a prompt of {tokens:,.0f} tokens at its data-sheet speed "
            f"({search_of(scenario).attainment:.0%} of the prompts are no longer); got {limit_s * 1e3:.3g} ms; "
            "loosen the level, or search larger or faster replicas"
        )


def screen_fleets(scenario: Scenario, step_function: StepFunctionOf) -> ScreenedFleets:
    """Return every fleet of the scenario's search that memory and ``max_gpus`` allow and that carries the traffic.

    Raises:
        CapacityError: no search, a workload without a rate, or nothing is left.
    """
    began = time.perf_counter()
    search, serve = search_of(scenario), scenario.serve
    assert serve is not None
    traffic = Traffic.of(scenario)
    kept, rejected = shapes(scenario)
    curves = []
    for shape in kept:
        try:
            curves.append(curve(shape, step_function(shape.scenario), traffic))
        except UserError as error:
            rejected.add(reason_of(error), f"{shape.label}: {error.faults[0]}")
    if not curves:
        raise nothing_left(scenario, rejected)
    per_step = scenario.speculative.tokens_per_step
    if serve.is_disaggregated:
        rows = _split(curves, traffic, per_step, search.max_gpus, search.spare_replicas, rejected)
    else:
        rows = _shared(curves, traffic, per_step, search.max_gpus, search.spare_replicas, rejected)
    looked_at = len(rows) + sum(rejected.counts.values())
    if not rows:
        raise nothing_left(scenario, rejected)
    names = [name for name in rows[0] if name not in ("changes", "deployment")]
    return ScreenedFleets(
        {name: np.array([row[name] for row in rows]) for name in names}, [row["changes"] for row in rows],
        [row["deployment"] for row in rows], looked_at, rejected, time.perf_counter() - began,
    )  # fmt: skip


def _figures(
    traffic: Traffic, usd_per_hour: float, num_gpus: float, tpot_s: float, ttft_s: float, **more: float
) -> Any:
    tokens_per_hour = traffic.requests_per_s * traffic.output_tokens * SECONDS_PER_HOUR
    return {
        "usd_per_million_output_tokens_all_in": usd_per_hour / tokens_per_hour * MILLION, "tpot_s": tpot_s,
        "ttft_s": ttft_s, "tokens_per_s_per_user": 1 / tpot_s, "num_gpus": num_gpus, "usd_per_hour": usd_per_hour,
        **more,
    }  # fmt: skip


def _waiting(load: float, service_s: float, step_s: float) -> float:
    """Return the mean wait of M/D/1: for the rest of the step under way (one lasts ``step_s``), then for the queue."""
    return load * step_s / 2 + load**2 * service_s / (2 * (1 - load))


def _shared(
    curves: list[Curve], traffic: Traffic, per_step: float, max_gpus: int, spare: int, rejected: Rejected
) -> list[dict[str, Any]]:
    rows = []
    for one in curves:
        carried = np.maximum.accumulate(one.requests_per_s(traffic.output_tokens, per_step, shared=True))
        for count in range(1 + spare, max_gpus // one.shape.num_gpus + 1):
            each = traffic.requests_per_s / (count - spare)
            if each > carried[-1]:
                rejected.add("traffic", f"{one.shape.label}: a replica carries {carried[-1]:.3g} requests/s")
                continue
            batch = float(np.interp(each, carried, one.batch)) if each > carried[0] else max(each / carried[0], 1e-6)
            extra = float(np.interp(batch, one.batch, one.prompt_extra_s))
            load = min(each * extra, 0.999)
            step_s = float(np.interp(batch, one.batch, one.step_s))
            # of a request's decoding time, others' prompts take the share ``load``
            tpot = step_s / per_step / (1 - load)
            way = float(np.interp(batch, one.batch, one.prompt_s))
            ttft = way + step_s / 2 + _waiting(load, extra, way / one.turns)
            changes = {**one.shape.changes, "serve.replicas": count}
            rows.append(
                {
                    "deployment": f"{count} replicas of {one.shape.label}", "changes": changes,
                    **_figures(
                        traffic, one.usd_per_hour * count, float(count * one.shape.num_gpus), tpot, ttft,
                        batch=batch, load=each / float(carried[-1]),
                    ),
                }
            )  # fmt: skip
    return rows


MOST_SPLIT_REPLICAS = 64
SCREEN_ERROR = 1.2
"""Times by which the fluid model may be off: what misses by less is simulated. Assumed."""


def _split(
    curves: list[Curve], traffic: Traffic, per_step: float, max_gpus: int, spare: int, rejected: Rejected
) -> list[dict[str, Any]]:
    """Return fleets of a prefill and a decode pool: every pair of deployments and counts."""

    def counts(one: Curve, capacity: float) -> range:
        least = int(np.ceil(traffic.requests_per_s / capacity + 1e-9)) + spare
        needed = least * one.shape.num_gpus
        if needed > max_gpus:
            rejected.add("traffic", f"{one.shape.label}: a pool needs {least} replicas, {needed} GPUs of {max_gpus}")
        return range(least, min(max_gpus // one.shape.num_gpus, MOST_SPLIT_REPLICAS) + 1)

    prefills: list[tuple[Curve, int, float, float]] = []
    decodes: list[tuple[Curve, int, float, float, float]] = []
    for one in curves:
        for count in counts(one, SCREEN_ERROR / one.prompt_share_s):
            each = traffic.requests_per_s / (count - spare)
            load, way = min(each * one.prompt_share_s, 0.999), one.alone_at(each)
            prefills.append((one, count, way + _waiting(load, one.prompt_share_s, way / one.turns), load))
        carried = np.maximum.accumulate(one.requests_per_s(traffic.output_tokens, per_step, shared=False))
        for count in counts(one, float(carried[-1])):
            each = traffic.requests_per_s / (count - spare)
            batch = float(np.interp(each, carried, one.batch)) if each > carried[0] else 1e-6
            tpot = float(np.interp(batch, one.batch, one.step_s)) / per_step
            decodes.append((one, count, tpot, batch, each / float(carried[-1])))
    prefills = _fronts(prefills, lambda row: row[2])
    decodes = _fronts(decodes, lambda row: row[2])
    rows = []
    for first, num_prefill, ttft, load in prefills:
        for second, num_decode, tpot, batch, fill in decodes:
            gpus = num_prefill * first.shape.num_gpus + num_decode * second.shape.num_gpus
            if gpus > max_gpus:
                rejected.add("max_gpus")
                continue
            rows.append(
                {
                    "deployment": f"prefill {num_prefill} x [{first.shape.label}], decode {num_decode} x "
                    f"[{second.shape.label}]",
                    "changes": {
                        **_pool("prefill", first.shape, num_prefill), **_pool("decode", second.shape, num_decode)
                    },
                    **_figures(
                        traffic, first.usd_per_hour * num_prefill + second.usd_per_hour * num_decode, float(gpus), tpot,
                        ttft, batch=batch, load=max(load, fill),
                    ),
                }
            )  # fmt: skip
    return rows


def _fronts(rows: list[Any], time_of: Callable[[Any], float]) -> list[Any]:
    """Return the rows (load last) that no cheaper one beats in time by more than the screen may be off. One that may
    turn out to be full beats none: at 95 requests/s one pool of 32 GPUs did not carry what two of 16 do."""
    rows = sorted(rows, key=lambda row: row[0].usd_per_hour * row[1])
    kept: list[Any] = []
    least = np.inf
    for _, alike in groupby(rows, key=lambda row: row[0].usd_per_hour * row[1]):
        same = list(alike)
        kept += [row for row in same if time_of(row) <= SCREEN_ERROR * least]
        least = min([least, *(time_of(row) for row in same if row[-1] * SCREEN_ERROR <= 1)])
    return kept


def _pool(name: str, shape: Shape, count: int) -> Mapping[str, Any]:
    fields = {
        key.removeprefix("deployment."): value for key, value in shape.changes.items() if key.startswith("deployment.")
    }  # fmt: skip
    changes: dict[str, Any] = {f"serve.{name}.replicas": count, f"serve.{name}.deployment": fields}
    if "hardware" in shape.changes:
        changes[f"serve.{name}.hardware"] = shape.changes["hardware"]
    return changes
