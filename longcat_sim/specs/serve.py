"""The ``serve:`` section of a scenario: traffic, replicas, router, scheduler, service levels and faults."""

from __future__ import annotations

from math import inf
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from longcat_sim.specs.base import (
    Bytes,
    BytesPerSecond,
    Count,
    ParsedFloat,
    Part,
    PerSecond,
    PositiveSeconds,
    Ratio,
    Seconds,
)

NonNegativeInt = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
TraceFormat = Literal["mooncake", "azure", "jsonl"]


def _bare_number(value: Any) -> Any:
    """Read ``input_tokens: 1020`` as a constant distribution."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {"distribution": "constant", "mean": value}
    return value


class TokenCounts(Part):
    """A distribution of token counts; a bare number means that constant.

    ``fit`` draws from the lengths of a trace instead (its empirical distribution).
    """

    distribution: Literal["constant", "exponential", "lognormal", "gamma", "uniform", "empirical"] = "constant"
    mean: Positive | None = None
    cv: Positive = 1.0
    """Standard deviation over mean, of ``lognormal`` and ``gamma``."""
    min: Count = 1
    max: Count | None = None
    values: tuple[Count, ...] = ()
    """Observed lengths, of ``empirical``: each is drawn with the same chance."""
    fit: str | None = None
    """Path of a trace whose lengths are drawn (``empirical``)."""
    format: TraceFormat = "azure"

    @model_validator(mode="after")
    def _complete(self) -> TokenCounts:
        if self.max is not None and self.max < self.min:
            raise ValueError(f"expected min <= max, such as min: 1, max: 4096; got {self.min} > {self.max}; swap them")
        if self.distribution == "empirical":
            if bool(self.values) == (self.fit is not None):
                raise ValueError("empirical lengths need either values: [..] or fit: TRACE; give exactly one")
        elif self.distribution == "uniform":
            if self.max is None:
                raise ValueError("uniform lengths need max, such as {distribution: uniform, min: 30, max: 100}")
        elif self.mean is None:
            raise ValueError(f"{self.distribution} lengths need a mean, such as mean: 1020; got none; add it")
        elif not self.min <= self.mean <= (self.max or inf):
            bound = f"max {self.max}" if self.mean > self.min else f"min {self.min}"
            raise ValueError(
                f"expected a mean between min and max, such as {{mean: 1020, min: 1, max: 4096}}; got mean "
                f"{self.mean:g} and {bound}: lengths are cut there, and what is served would have another mean; change "
                "one"
            )
        return self


class Delay(Part):
    """A distribution of times between events of one session."""

    distribution: Literal["constant", "exponential", "lognormal"] = "exponential"
    mean: Seconds
    cv: Positive = 1.0


Tokens = Annotated[TokenCounts, BeforeValidator(_bare_number)]


class Arrivals(Part):
    """When requests (or sessions) arrive."""

    process: Literal["poisson", "gamma", "constant", "closed_loop", "diurnal"] = "poisson"
    rate: PerSecond | None = None
    """Mean arrivals per second, of every process but ``closed_loop``."""
    cv: Positive = 1.0
    """Standard deviation over mean of the gaps, of ``gamma``: 1 is Poisson, above 1 bursty."""
    concurrency: Count | None = None
    """Users of ``closed_loop``: each sends its next request when the last one is answered."""
    think_time: Delay | None = None
    """Pause of a ``closed_loop`` user between answer and next request; none by default."""
    amplitude: Ratio = 0.5
    """Of ``diurnal``: rate(t) = rate (1 + amplitude sin(2 pi t / period))."""
    period: Seconds = ParsedFloat(86400)

    @model_validator(mode="after")
    def _complete(self) -> Arrivals:
        if self.process == "closed_loop":
            if self.concurrency is None:
                raise ValueError("closed_loop arrivals need a concurrency, such as concurrency: 64; add it")
        elif self.rate is None:
            raise ValueError(f"{self.process} arrivals need a rate, such as rate: 3.5 /s; add it")
        if self.process == "diurnal" and self.period <= 0:
            raise ValueError("diurnal arrivals need a period above 0, such as period: 24 h")
        return self


class Sessions(Part):
    """Conversations: each turn's prompt is all that came before plus the user's new tokens.

    A turn is a tool call with probability ``tool_call_ratio``: a short output, then the tool's running time instead
    of a person's think time.
    """

    turns: Tokens
    think_time: Delay = Delay(mean=ParsedFloat(5))
    new_tokens: Tokens
    """Tokens that each turn after the first adds to the prompt (question or tool result)."""
    system_prompt_tokens: NonNegativeInt = 0
    """Leading tokens that all sessions share (prefix cache)."""
    tool_call_ratio: Ratio = 0.0
    tool_call_tokens: Tokens = TokenCounts(distribution="uniform", min=30, max=100)
    """Output of a tool-call turn. Source: LongCat-Flash report, section 7: 30 to 100 tokens."""
    tool_time: Delay = Delay(mean=ParsedFloat(1))


class Workload(Part):
    """What is sent: a recorded trace, or a synthetic process. With neither, one has to be set before it is served."""

    trace: str | None = None
    format: TraceFormat = "mooncake"
    time_scale: Positive = 1.0
    """Arrival times of a trace are divided by this: 2 doubles its rate."""
    arrivals: Arrivals | None = None
    input_tokens: Tokens | None = None
    output_tokens: Tokens | None = None
    sessions: Sessions | None = None
    num_requests: Count | None = None
    """Requests (sessions, where there are any) to generate, or the first rows of a trace to read."""
    duration: PositiveSeconds | None = None
    """Stop sending after this time."""
    warm_up: Seconds = ParsedFloat(0)
    """Requests that arrive before this are served but not counted in the metrics."""
    max_context_tokens: Count | None = None
    """Rows whose input and output exceed this are faults of the trace."""
    max_bad_rows: NonNegativeInt = 100
    """Faulty rows that are skipped and reported; one more refuses the trace."""

    @model_validator(mode="after")
    def _complete(self) -> Workload:
        if self.trace is not None and self.arrivals is not None:
            raise ValueError(
                "workload takes either trace: PATH or arrivals: {process: poisson, rate: 3.5 /s}; got both"
            )
        if self.duration is not None and self.warm_up >= self.duration and self.sessions is None:
            raise ValueError(
                f"warm_up: expected less than duration, such as {self.duration / 4:g} s; got a warm_up of "
                f"{self.warm_up:g} s and a duration of {self.duration:g} s, which leave no request to count; shorten "
                "warm_up or lengthen duration"
            )
        if self.arrivals is not None:
            if self.input_tokens is None or self.output_tokens is None:
                raise ValueError(
                    "a synthetic workload needs input_tokens and output_tokens, "
                    "such as {distribution: exponential, mean: 1020}"
                )
            if self.num_requests is None and self.duration is None:
                raise ValueError("a synthetic workload needs num_requests or duration, such as duration: 10 min")
        elif self.sessions is not None or self.input_tokens is not None or self.output_tokens is not None:
            raise ValueError(
                "sessions, input_tokens and output_tokens belong to a synthetic workload and have no effect on a "
                "trace; remove them or the trace"
            )
        return self


class Pool(Part):
    """The replicas that only prefill or only decode."""

    replicas: Count = 1
    hardware: str | None = None
    """Unset: the scenario's."""
    deployment: dict[str, Any] | None = None
    """Fields that differ from the scenario's deployment."""


class KvTransfer(Part):
    """How KV cache goes from a prefill to a decode replica."""

    link: Literal["scale_out", "scale_up", "host"] = "scale_out"
    bandwidth: BytesPerSecond | None = None
    """Per replica; unset: the link's of all GPUs of the narrower side."""
    latency: Seconds | None = None
    layer_wise: bool = True
    """Layers leave while later ones are computed, so that only what is left after the last layer delays the token."""


class KvTier(Part):
    """A slower place for evicted prefix blocks."""

    name: str
    capacity: Bytes
    """Per replica."""
    bandwidth: BytesPerSecond
    latency: Seconds = ParsedFloat(0)


class Scheduler(Part):
    """The engine's scheduler, with vLLM v1's names and rules; sizes are those of a whole replica.

    With data-parallel attention each rank has its share of the token budget, and a prompt is prefilled on one rank.
    """

    policy: Literal["fcfs", "priority"] = "fcfs"
    max_num_seqs: Count = 256
    max_num_batched_tokens: Count = 8192
    chunked_prefill: bool = True
    long_prefill_token_threshold: NonNegativeInt = 0
    """Most prompt tokens of one request in one step; 0: the whole budget."""
    num_kv_blocks: Count | None = None
    """Observed number of KV blocks of a replica; unset: from the memory check."""
    block_tokens: Count = 16
    watermark: Ratio = 0.0
    """Share of KV blocks that admission leaves free."""
    prefix_cache: bool = True
    multi_step: Count = 1
    """Forward steps per scheduling decision; their KV slots are reserved ahead."""
    async_scheduling: bool = False
    """Decide each step while the one before runs (vLLM's default since v0.14): what arrives or ends during a step
    counts one step later."""
    max_model_len: Count | None = None
    """Requests whose input and output exceed this are rejected."""


class ServiceLevel(Part):
    """A class of requests and what it is promised; ``None`` promises nothing."""

    name: str = "default"
    ttft: Seconds | None = None
    tpot: Seconds | None = None
    e2e: Seconds | None = None
    share: Positive = 1.0
    """Weight of the class among synthetic requests."""
    priority: int = 0
    """Lower is served first under the priority policy."""


FAULT_KEYS = {
    "replica_loss": ("pool", "replica", "in_flight"),
    "slow_rank": ("pool", "replica", "slowdown"),
    "link_degradation": ("slowdown",),
}
FAULT_EXAMPLES = {
    "replica_loss": "{kind: replica_loss, at: 60 s, duration: 30 s, replica: 0, in_flight: retry}",
    "slow_rank": "{kind: slow_rank, at: 60 s, duration: 30 s, replica: 0, slowdown: 2}",
    "link_degradation": "{kind: link_degradation, at: 60 s, duration: 30 s, slowdown: 4}",
}


class Fault(Part):
    """Something that breaks at a time, and comes back after ``duration`` (never, if unset).

    ``replica_loss`` and ``slow_rank`` strike one replica of a pool; ``link_degradation`` the whole KV link between
    prefill and decode pools, for the transfers that begin while it lasts, and no step.
    """

    kind: Literal["replica_loss", "slow_rank", "link_degradation"] = Field(examples=["slow_rank"])
    at: Seconds = Field(examples=["60 s"])
    duration: Seconds | None = None
    pool: Literal["shared", "prefill", "decode"] = "shared"
    replica: NonNegativeInt = 0
    slowdown: Annotated[float, Field(ge=1)] = 2.0
    """Factor on step times (``slow_rank``) or on KV transfer times (``link_degradation``). Of several at once on one
    replica or on the link the largest counts: all wait for the slowest part."""
    in_flight: Literal["retry", "fail"] = "retry"
    """What becomes of requests on a lost replica."""

    @model_validator(mode="after")
    def _keys_fit_the_kind(self) -> Fault:
        fitting = FAULT_KEYS[self.kind]
        odd = sorted(self.model_fields_set - {"kind", "at", "duration", *fitting})
        if odd:
            what = "strikes the whole KV link between the pools and" if self.kind == "link_degradation" else ""
            raise ValueError(
                f"{' '.join(filter(None, (self.kind, what)))} takes {', '.join(fitting)} beside at and duration, such "
                f"as {FAULT_EXAMPLES[self.kind]}; got {' and '.join(odd)}; remove {'them' if len(odd) > 1 else 'it'}, "
                f"or use another kind of {', '.join(FAULT_KEYS)}"
            )
        return self


class Autoscaler(Part):
    """Start a replica when the queue per live replica is long, stop one when it is idle."""

    min_replicas: Count = 1
    max_replicas: Count
    interval: Seconds = ParsedFloat(10)
    scale_up_queue: Positive = 4.0
    """Waiting requests per live replica above which one more is started."""
    scale_down_load: Ratio = 0.3
    """Share of max_num_seqs in use, over all live replicas, below which one is drained."""

    @model_validator(mode="after")
    def _ordered(self) -> Autoscaler:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"expected min_replicas <= max_replicas; got {self.min_replicas} > {self.max_replicas}")
        return self


class Serve(Part):
    """The ``serve:`` section. Shared replicas do prefill and decode; or two pools instead."""

    workload: Workload
    replicas: Count = 1
    prefill: Pool | None = None
    decode: Pool | None = None
    kv_transfer: KvTransfer = KvTransfer()
    kv_tiers: tuple[KvTier, ...] = ()
    router: Literal["round_robin", "least_loaded", "prefix_aware"] = "least_loaded"
    scheduler: Scheduler = Scheduler()
    slo: tuple[ServiceLevel, ...] = (ServiceLevel(),)
    faults: tuple[Fault, ...] = Field(
        default=(), examples=["[{kind: slow_rank, at: 60 s, duration: 30 s, replica: 0, slowdown: 2}]"]
    )
    autoscaler: Autoscaler | None = None
    cold_start: bool = False
    """Replicas start by loading their weights, at time 0 too."""
    max_queue: Count | None = None
    """Requests waiting at one replica beyond which an arrival is rejected; unset: no bound."""

    @property
    def is_disaggregated(self) -> bool:
        """Whether prefill and decode have pools of their own."""
        return self.prefill is not None

    @model_validator(mode="after")
    def _consistent(self) -> Serve:
        if (self.prefill is None) != (self.decode is None):
            raise ValueError("serve needs both prefill and decode pools, or neither; add the other one")
        if not self.slo:
            raise ValueError("slo needs one class at least, such as [{name: default, ttft: 2 s, tpot: 30 ms}]")
        names = [level.name for level in self.slo]
        if len(set(names)) < len(names):
            raise ValueError(f"slo classes need names of their own; got {', '.join(names)}; rename one")
        if self.autoscaler is not None and self.is_disaggregated:
            raise ValueError("autoscaler works on shared replicas only; got prefill and decode pools; remove one")
        for number, fault in enumerate(self.faults):
            if fault.kind == "link_degradation":
                if not self.is_disaggregated:
                    raise ValueError(
                        f"faults[{number}].kind: expected prefill and decode pools for link_degradation, which slows "
                        "the KV link between them; got shared replicas, which have none; use slow_rank for a slow "
                        "replica, or change hardware.scale_up.bandwidth for a slow network inside one"
                    )
                continue
            pool = {"shared": None, "prefill": self.prefill, "decode": self.decode}[fault.pool]
            if (fault.pool == "shared") == self.is_disaggregated:
                has = "prefill or decode" if self.is_disaggregated else "shared, or no pool"
                raise ValueError(
                    f"faults[{number}].pool: expected {has}, whose replica it strikes; got {fault.pool!r}; change it"
                )
            size = pool.replicas if pool else self.num_shared_replicas
            if fault.replica >= size:
                raise ValueError(f"faults[{number}].replica: expected 0..{size - 1}; got {fault.replica}")
        self._no_loss_of_what_is_down()
        return self

    def _no_loss_of_what_is_down(self) -> None:
        losses = [(round(fault.at * 1e9), n) for n, fault in enumerate(self.faults) if fault.kind == "replica_loss"]
        back: dict[tuple[str, int], tuple[float, int]] = {}
        found = []
        for at, number in sorted(losses):
            fault = self.faults[number]
            until, earlier = back.get((fault.pool, fault.replica), (0, 0))
            if at < until:
                found.append(
                    f"faults[{number}]: {fault.pool} replica {fault.replica} is lost at {fault.at:g} s, but "
                    f"faults[{earlier}] has it down until {'the end' if until == inf else f'{until / 1e9:g} s'}"
                )
            lasts: float = inf if fault.duration is None else round(fault.duration * 1e9)
            if lasts < inf or self.autoscaler is None:  # an autoscaler starts what is down, too
                back[fault.pool, fault.replica] = max((at + lasts, number), (until, earlier))
        if found:
            raise ValueError("; ".join(found) + "; move one of each, or make them one with a longer duration")

    @property
    def num_shared_replicas(self) -> int:
        """Shared replicas that can ever be up."""
        return max(self.replicas, self.autoscaler.max_replicas if self.autoscaler else 1)
