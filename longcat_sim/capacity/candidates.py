"""Enumerate what a search may choose from: a device and a deployment each, checked for sizes, links and memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from longcat_sim.errors import CapacityError, MemoryFitError, SpecError, UnmeasuredOpError, UserError
from longcat_sim.ops.memory import Memory, memory
from longcat_sim.ops.op import FloatArray
from longcat_sim.simulation.network import check_topology
from longcat_sim.simulation.step import slowest_context
from longcat_sim.specs.hardware import load_hardware
from longcat_sim.specs.scenario import Scenario, Search

MOST_BATCHES = 4096
"""A range of batches wider than this is cut geometrically."""


@dataclass
class Rejected:
    """Candidates that were put aside: how many for which reason, and one example each."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, str] = field(default_factory=dict)

    def add(self, reason: str, example: str = "", count: int = 1) -> None:
        """Count ``count`` candidates under ``reason``."""
        if count:
            self.counts[reason] = self.counts.get(reason, 0) + count
            if example:
                self.examples.setdefault(reason, example)

    def merge(self, other: Rejected) -> None:
        """Add another's counts."""
        for reason, count in other.counts.items():
            self.add(reason, other.examples.get(reason, ""), count)


@dataclass(frozen=True)
class Shape:
    """One device and deployment: a replica. ``changes`` are those that make it from the scenario."""

    scenario: Scenario
    changes: dict[str, Any]

    @property
    def num_gpus(self) -> int:
        """GPUs of one replica."""
        return self.scenario.deployment.num_gpus

    @property
    def label(self) -> str:
        """Device and degrees in a few words."""
        d = self.scenario.deployment
        parts = [f"{d.num_gpus} x {self.scenario.hardware.name}"]
        parts += [f"EP{d.ep_size}"] if d.ep_size > 1 else []
        parts += [f"TP{d.tp_size}"] if d.tp_size > 1 else []
        parts += [f"dense TP{d.dense_tp}"] if d.dense_tp != d.tp_size else []
        return " ".join([*parts, d.overlap])


def search_of(scenario: Scenario) -> Search:
    """Return the scenario's search.

    Raises:
        CapacityError: it has none.
    """
    if scenario.search is None:
        raise CapacityError(
            f"{scenario.where}: search: expected what may change, such as search: {{ep_size: [16, 32, 64, 128], "
            "sequences_per_gpu: [8, 512]}; got none; add it, or give it with --set search.ep_size=[16,32]"
        )
    return scenario.search


def _choices(scenario: Scenario, search: Search) -> Iterator[dict[str, Any]]:
    """Yield the changes of every deployment; a degree that is not searched keeps its value."""
    now = scenario.deployment
    sizes: Sequence[Any] = search.ep_size or (now.ep_size,)
    for hardware, ep, tp, overlap in itertools.product(
        search.hardware or (scenario.changes.get("hardware") or scenario._document["hardware"],),
        sizes,
        search.tp_size or (now.tp_size,),
        search.overlap or (now.overlap,),
    ):
        if search.num_gpus:
            fleets: Sequence[int] = search.num_gpus
        elif search.ep_size and scenario.model.n_routed_experts:
            fleets = (max(ep, tp),)
        elif search.tp_size:
            fleets = (tp,)
        else:
            fleets = (now.num_gpus,)
        for num_gpus, dense in itertools.product(fleets, search.dense_tp_size or (now.dense_tp_size,)):
            changes: dict[str, Any] = {
                "deployment.num_gpus": num_gpus, "deployment.ep_size": ep, "deployment.tp_size": tp,
                "deployment.dense_tp_size": dense, "deployment.overlap": overlap,
            }  # fmt: skip
            yield changes if hardware == scenario.hardware.name else {"hardware": hardware, **changes}


def shapes(scenario: Scenario, *, weight: int = 1) -> tuple[list[Shape], Rejected]:
    """Return the deployments that sizes, links and memory allow, and what was put aside (``weight`` candidates each).

    Raises:
        CapacityError: no search in the scenario.
        SpecError: an unknown device.
    """
    search, found, rejected = search_of(scenario), [], Rejected()
    for name in search.hardware:  # an unknown device is a fault, not a rejection
        if "/" not in name:  # a path lies where the scenario says
            load_hardware(name, where=f"{scenario._at('search')}.hardware")
        scenario.what_if({"hardware": name})
    for changes in _choices(scenario, search):
        if changes["deployment.num_gpus"] > search.max_gpus:
            rejected.add(
                "max_gpus", f"a replica of {changes['deployment.num_gpus']} GPUs exceeds {search.max_gpus}", weight
            )
            continue
        try:
            shape = Shape(scenario.what_if(changes), changes)
        except SpecError as error:
            rejected.add("sizes do not divide", error.faults[0], weight)
            continue
        try:
            check_topology(shape.scenario.hardware, shape.scenario.deployment)
        except SpecError as error:
            rejected.add("links", error.faults[0], weight)
            continue
        if not memory_at(shape.scenario, 1.0, 1.0).fits:
            rejected.add("memory", f"{shape.label}: weights and buffers leave no room for KV cache", weight)
            continue
        found.append(shape)
    return found, rejected


def memory_at(scenario: Scenario, sequences_per_gpu: float, context: float) -> Memory:
    """Return what the fullest GPU holds in a decode step of this batch of mean ``context``."""
    return _memory(scenario, sequences_per_gpu, float(slowest_context(scenario, sequences_per_gpu, context)))


def _memory(scenario: Scenario, sequences_per_gpu: float, tokens_per_sequence: float) -> Memory:
    queries = 1 + scenario.speculative.draft_tokens
    return memory(
        scenario.model, scenario.deployment, scenario.hardware, sequences_per_gpu=sequences_per_gpu,
        tokens_per_sequence=tokens_per_sequence, rows_per_gpu=sequences_per_gpu * queries,
        speculative=scenario.speculative.draft_tokens > 0, routing=scenario.routing,
    )  # fmt: skip


def room_of(scenario: Scenario, context: float = 1.0) -> float:
    """Return the most sequences per GPU of mean ``context`` that fit on the fullest GPU; 0: not even one.

    Every part of the memory check is affine in the sequences and in their tokens.
    """
    from scipy.optimize import brentq

    one, two, token = _memory(scenario, 1.0, 0.0), _memory(scenario, 2.0, 0.0), _memory(scenario, 1.0, 1.0)
    each, per_token = two.total_bytes - one.total_bytes, token.total_bytes - one.total_bytes

    def free(sequences: float) -> float:
        held = sequences * float(slowest_context(scenario, sequences, context)) * per_token
        return one.capacity_bytes - one.total_bytes - (sequences - 1) * each - held

    if free(1.0) < 0:
        return 0.0
    even = 1 + (one.capacity_bytes - one.total_bytes - context * per_token) / (each + context * per_token)
    return even if free(even) >= 0 else float(brentq(free, 1.0, even, rtol=1e-6))


def batches_of(scenario: Scenario) -> FloatArray:
    """Return the batches (sequences per GPU) to look at: whole numbers of a range, or the listed values.

    Raises:
        CapacityError: a range that ends before it starts.
    """
    wanted = search_of(scenario).sequences_per_gpu
    if len(wanted) > 2 or len(wanted) == 1:
        return np.array(sorted(wanted), dtype=float)
    low, high = wanted if wanted else (1.0, 512.0)
    if high < low:
        raise CapacityError(
            f"{scenario.where}: search.sequences_per_gpu: expected [lowest, highest], such as [8, 512]; got "
            f"[{low:g}, {high:g}]; swap them"
        )
    whole = np.arange(np.ceil(low), np.floor(high) + 1)
    if len(whole) == 0:
        return np.array([low, high])
    return whole if len(whole) <= MOST_BATCHES else np.unique(np.round(np.geomspace(low, high, MOST_BATCHES)))


def nodes_over(values: FloatArray, per_octave: int = 4) -> FloatArray:
    """Return batches from the lowest to the highest value at which a step is solved; others lie between them."""
    low, high = float(values[0]), float(values[-1])
    if high <= low:
        return np.array([low])
    return np.unique(np.geomspace(low, high, max(3, int(np.ceil(np.log2(high / low) * per_octave)) + 1)))


def tpot_floor_s(scenario: Scenario) -> float:
    """Return a bound below which no schedule or batch of this deployment brings the time per output token.

    The weights that every step reads (attention, dense FFN, head; not the experts) at the full memory bandwidth, plus
    one latency of the exchange's link each way per MoE layer, over the tokens of a step.
    """
    hardware, model, deployment = scenario.hardware, scenario.model, scenario.deployment
    parts = memory_at(scenario, 1.0, 1.0).parts
    read = parts["attention_weights"] + parts["dense_ffn_weights"] + parts["embedding_and_head"] / 2
    latency = 0.0
    if deployment.ep_size > 1:
        domain = hardware.domain_size
        link = hardware.scale_up if deployment.ep_size <= domain else hardware.scale_out
        latency = 2 * model.num_moe_layers * (link.latency if link else 0.0)
    seconds = read / hardware.memory_bandwidth + latency
    return seconds / scenario.speculative.tokens_per_step


def reason_of(error: UserError) -> str:
    """Return under which heading a shape that cannot be evaluated is counted."""
    if isinstance(error, MemoryFitError):
        return "memory"
    if isinstance(error, UnmeasuredOpError):
        return "not measured"
    return "schedule"
