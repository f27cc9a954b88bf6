"""What the replicas of a pool are, and the pool while it runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from longcat_sim.simulation.serving.drafts import Drafts
from longcat_sim.simulation.serving.kv_cache import Tier
from longcat_sim.specs.serve import KvTier, Scheduler

if TYPE_CHECKING:
    from longcat_sim.simulation.serving.replica import Replica

NS = 1_000_000_000


@dataclass(frozen=True)
class Engine:
    """What one replica of a pool is: its step times and sizes."""

    step_times: Any
    """A ``StepTimes``, ``DetailedStepTimes``, or ``RankedStepTimes`` (attention is data parallel)."""
    kv_blocks: int
    """KV blocks of ``scheduler.block_tokens``; ``scheduler.num_kv_blocks`` overrides."""
    num_gpus: int = 1
    weight_load_s: float = 0.0
    """From start to ready (cold start, autoscaler)."""
    kv_bytes_per_token: float = 0.0
    """Of the whole replica: sizes KV transfers and slower tiers."""
    num_layers: int = 1


@dataclass(frozen=True)
class KvLink:
    """The way from a prefill replica to a decode replica."""

    bytes_per_s: float
    latency_s: float = 0.0
    layer_wise: bool = True
    ranks: int = 1
    """Data-parallel ranks that share ``bytes_per_s``: a prompt's KV lies on one, which has its part of it."""


@dataclass
class PoolRun:
    """One pool while it runs."""

    name: str
    engine: Engine
    scheduler: Scheduler
    tiers: tuple[KvTier, ...]
    acceptance: tuple[float, ...]
    seed: int
    replicas: list[Replica] = field(default_factory=list)
    live: list[Replica] = field(default_factory=list)
    """Replicas that take new requests, by index."""
    turn: int = 0

    def __post_init__(self) -> None:
        self.step_times = self.engine.step_times
        self.kv_blocks = self.scheduler.num_kv_blocks or self.engine.kv_blocks
        self.is_prefill = self.name == "prefill"

    def make_tiers(self) -> list[Tier]:
        """Return empty slower tiers for one replica."""
        block_bytes = self.engine.kv_bytes_per_token * self.scheduler.block_tokens
        return [
            Tier(t.name, int(t.capacity / block_bytes), block_bytes / t.bandwidth * 1e9, round(t.latency * NS))
            for t in self.tiers
        ]

    def make_drafts(self) -> Drafts | None:
        """Return the speculative part of one replica."""
        return Drafts(self.acceptance, self.seed) if self.acceptance and not self.is_prefill else None
