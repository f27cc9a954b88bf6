"""Serving engines of a scenario: step times from the step simulator, KV blocks from the memory check."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np

from longcat_sim.errors import MemoryFitError
from longcat_sim.ops.memory import kv_bytes_per_token, memory
from longcat_sim.ops.op import FloatArray, OpTimesLike
from longcat_sim.simulation.serving.cluster import Engine, KvLink
from longcat_sim.simulation.serving.ranked import RankedStepTimes, rank_share
from longcat_sim.simulation.serving.step_times import StepTimeGrid
from longcat_sim.simulation.serving.synthetic import Synthetic
from longcat_sim.simulation.serving.workload import TraceReader
from longcat_sim.simulation.step import replica_kv_tokens, step_seconds_many
from longcat_sim.specs.scenario import Scenario
from longcat_sim.specs.serve import Pool, Serve

WEIGHT_LOAD_BYTES_PER_S = 5e9
"""Rate at which a starting replica's GPU gets its weights where the profile has no host link. Assumed."""
MAX_CONTEXT_TOKENS = 131072
SAMPLED_REQUESTS = 2000
"""Requests that tell how far a workload's contexts lie apart (2 % of their coefficient of variation)."""
MOST_SPREADS = 256


@dataclass(frozen=True)
class StepFunction:
    """Seconds of a replica's step by (decode batch, mean context, prefill tokens, mean keys per prefill query, fill).

    A mixed step is one pass: its products see the rows of both parts, the prefill core attends for the prompts, and
    the decode core runs beside it on its own. Prefill tokens are those of the fullest data-parallel rank times the
    ranks; over all ranks there are ``fill`` times as many. So a prompt alone has fill 1 / ranks.
    """

    scenario: Scenario
    op_times: OpTimesLike

    def __call__(
        self, batch: FloatArray, context: FloatArray, prefill: FloatArray, keys: FloatArray,
        fill: FloatArray | float = 1.0,
    ) -> FloatArray:  # fmt: skip
        """Return seconds [N]; sizes are of the whole replica."""
        gpus = self.scenario.deployment.num_gpus
        spread = decode_context_spread(self.scenario.serve) if self.scenario.serve else None
        context, fill = np.maximum(context, 1.0), np.broadcast_to(fill, len(batch))
        seconds = np.zeros(len(batch))
        for chosen in (prefill <= 0, (prefill > 0) & (batch <= 0), (prefill > 0) & (batch > 0)):
            if not chosen.any():
                continue
            decoding, attended = batch[chosen] / gpus, context[chosen]
            if (prefill[chosen] <= 0).all():
                arguments: dict[str, Any] = {"sequences": decoding, "context": attended}
            else:
                arguments = self._prefill(prefill[chosen], keys[chosen]) | {"fill": fill[chosen]}
                if decoding.any():
                    arguments |= {"beside_sequences": decoding, "beside_context": attended}
            seconds[chosen] = step_seconds_many(self.scenario, self.op_times, context_spread=spread, **arguments)
        return seconds

    def _prefill(self, tokens: FloatArray, keys: FloatArray) -> dict[str, Any]:
        """Return sequences per GPU, queries and context of the fullest rank's prompts."""
        deployment = self.scenario.deployment
        own, keys = tokens / deployment.dp_size, np.maximum(keys, 1.0)
        chunk = keys >= (own + 1) / 2  # one chunk, perhaps after earlier ones; else several short prompts
        queries = np.where(chunk, own, np.minimum(2 * keys - 1, own))
        attended = np.where(chunk, keys + (own - 1) / 2, queries)
        sequences = tokens / queries / deployment.num_gpus
        return {"phase": "prefill", "sequences": sequences, "context": attended, "queries": queries}


_spreads: dict[str, float] = {}


def decode_context_spread(serve: Serve) -> float:
    """Return the coefficient of variation of the contexts that are in decode, from the workload's first requests.

    A sequence of i prompt and o output tokens is in decode for o steps, at contexts i to i + o. 0 without a workload.
    """
    key = serve.workload.model_dump_json()  # a Serve with pools has no hash: their deployments are dicts
    if key not in _spreads:
        if len(_spreads) >= MOST_SPREADS:
            _spreads.clear()
        _spreads[key] = _context_spread(serve)
    return _spreads[key]


def _context_spread(serve: Serve) -> float:
    workload = serve.workload
    if workload.trace is None and workload.arrivals is None:
        return 0.0
    source = TraceReader(serve) if workload.trace is not None else Synthetic(serve, 0)
    sizes = [(request.input, request.output) for request in islice(source, SAMPLED_REQUESTS)]
    prompt, output = np.array(sizes, dtype=float).reshape(-1, 2).T
    weight = output.sum()
    if not weight:
        return 0.0
    mean = (output * (prompt + output / 2)).sum() / weight
    square = (output * (prompt**2 + prompt * output + output**2 / 3)).sum() / weight
    return float(np.sqrt(max(0.0, square / mean**2 - 1)))


def step_grid(scenario: Scenario, op_times: OpTimesLike, serve: Serve) -> StepTimeGrid | RankedStepTimes:
    """Return the scenario's step times as a grid that the serving engine looks up."""
    scheduler, ranks = serve.scheduler, scenario.deployment.dp_size
    longest = scheduler.max_model_len or min(MAX_CONTEXT_TOKENS, scenario.model.max_position_embeddings)
    budget = scheduler.max_num_batched_tokens
    own = rank_share(budget, ranks) if scheduler.chunked_prefill else budget
    sizes: dict[str, Any] = {"max_batch": scheduler.max_num_seqs, "max_context": longest, "max_prefill_tokens": own}
    step = StepFunction(scenario, op_times)
    if ranks == 1:
        return StepTimeGrid.from_function(step, **sizes)
    return RankedStepTimes.from_function(step, ranks, **sizes)


def kv_blocks(scenario: Scenario, serve: Serve, role: str = "shared") -> int:
    """Return the KV blocks of one replica: what weights, activations and buffers leave free.

    Raises:
        MemoryFitError: not one block fits.
    """
    tokens, found = replica_kv_tokens(scenario, serve, role)
    blocks = int(tokens // serve.scheduler.block_tokens)
    if blocks < 1:
        short = found.total_bytes - found.capacity_bytes
        raise MemoryFitError(
            f"{scenario.where}: serve: expected room for KV cache; weights and buffers take "
            f"{found.total_bytes / 1e9:.1f} GB of {found.capacity_bytes / 1e9:.1f} GB, {max(short, 0) / 1e9:.1f} GB "
            "too much; use more GPUs per replica, a larger ep_size or tp_size, or fp8 weights"
        )
    return blocks


def engine(scenario: Scenario, op_times: OpTimesLike, serve: Serve, role: str = "shared") -> Engine:
    """Return one replica of the scenario's deployment."""
    deployment = scenario.deployment
    found = memory(
        scenario.model, deployment, scenario.hardware, sequences_per_gpu=0.0, tokens_per_sequence=0.0,
        rows_per_gpu=1.0, routing=scenario.routing,
    )  # fmt: skip
    weights = sum(size for name, size in found.parts.items() if name.endswith("weights") or "embedding" in name)
    link = scenario.hardware.host_link
    return Engine(
        step_times=step_grid(scenario, op_times, serve),
        kv_blocks=kv_blocks(scenario, serve, role),
        num_gpus=deployment.num_gpus,
        weight_load_s=weights / (link.bandwidth if link else WEIGHT_LOAD_BYTES_PER_S),
        kv_bytes_per_token=kv_bytes_per_token(
            scenario.model, deployment, speculative=scenario.speculative.draft_tokens > 0
        )
        * (1 if scenario.model.is_mla else deployment.tp_size),
        num_layers=scenario.model.num_layers,
    )


def pool_scenario(scenario: Scenario, pool: Pool) -> Scenario:
    """Return the scenario of one pool: unset fields inherit from the whole.

    Raises:
        SpecError: a pool's deployment or hardware that cannot be used.
    """
    changes: dict[str, Any] = {}
    if pool.hardware is not None:
        changes["hardware"] = pool.hardware
    for key, value in (pool.deployment or {}).items():
        changes[f"deployment.{key}"] = value
    return scenario.what_if(changes) if changes else scenario


def pools_of(scenario: Scenario, serve: Serve) -> dict[str, Scenario]:
    """Return the scenario of each pool by its role: ``shared``, or ``prefill`` and ``decode``."""
    if serve.prefill is None or serve.decode is None:
        return {"shared": scenario}
    return {"prefill": pool_scenario(scenario, serve.prefill), "decode": pool_scenario(scenario, serve.decode)}


FEW_TOKENS = 512
"""Prompt tokens of a rank and step below which steps are mostly reads of weights: of LongCat-Flash on 16 H800, a lone
chunk of 128 tokens takes 29 ms, of 512 44, of 2,048 108."""


def budget_notes(pools: Mapping[str, Scenario], serve: Serve) -> list[str]:
    """Return what to know where data-parallel ranks share so small a token budget that prompts take many steps."""
    budget = serve.scheduler.max_num_batched_tokens
    found = []
    for name, part in pools.items():
        ranks = part.deployment.dp_size
        each = rank_share(budget, ranks)
        if name != "decode" and ranks > 1 and each < FEW_TOKENS and serve.scheduler.chunked_prefill:
            found.append(
                f"serve.scheduler.max_num_batched_tokens = {budget} is a whole replica's: each of its {ranks} "
                f"data-parallel ranks prefills {each} tokens of a prompt a step; {ranks * 2048} gives them 2048"
            )
    return found


def kv_link(scenario: Scenario, serve: Serve) -> KvLink | None:
    """Return the way from prefill to decode replicas, or None where replicas are shared.

    Raises:
        SpecError: the hardware has no such link.
    """
    if serve.prefill is None or serve.decode is None:
        return None
    from longcat_sim.errors import SpecError

    sides = [pool_scenario(scenario, pool) for pool in (serve.prefill, serve.decode)]
    transfer = serve.kv_transfer
    narrow = min(sides, key=lambda side: side.deployment.num_gpus)
    name = "host_link" if transfer.link == "host" else transfer.link
    link = getattr(narrow.hardware, name)
    if link is None and transfer.bandwidth is None:
        raise SpecError(
            f"{scenario.where}: serve.kv_transfer.link: expected a link that {narrow.hardware.name} has; it has no "
            f"{name}; add it to the profile, or give kv_transfer.bandwidth, such as 50 GB/s"
        )
    bandwidth = transfer.bandwidth or link.bandwidth * narrow.deployment.num_gpus
    latency = transfer.latency if transfer.latency is not None else (link.latency if link else 0.0)
    return KvLink(bandwidth, latency, transfer.layer_wise, 1 if transfer.bandwidth else narrow.deployment.dp_size)
