"""``Deployment``: how a model lies on GPUs, in which precision, under which schedule, routing and speculation."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationInfo, field_validator, model_validator

from longcat_sim.specs.base import Count, Part, Ratio

Dtype = Literal["fp32", "bf16", "fp16", "fp8", "int8", "fp4", "nvfp4"]

OVERLAPS: dict[str, tuple[str, ...]] = {
    "longcat": ("chunked", "none", "sbo", "sbo_engine", "tbo"),
    "moe": ("none", "sbo", "tbo", "tbo_prefill"),
}
"""Names of schedules by kind of layer (dense ones take all); what each does stands in ``ops.schedules``."""


def overlap_fault(name: str, layer: str | None = None) -> str:
    """Return why no schedule of that name fits a kind of layer (None: any kind), or ""."""
    known = OVERLAPS.get(layer or "") or sorted({each for names in OVERLAPS.values() for each in names})
    if name in known:
        return ""
    where = f" for a {layer} layer" if layer else ""
    return f"expected one of {', '.join(known)}{where}; got {name!r}; choose one of these"


def _known_overlap(name: str, info: ValidationInfo) -> str:
    fault = overlap_fault(name, (info.context or {}).get("layer_kind"))
    if fault:
        raise ValueError(fault)
    return name


Overlap = Annotated[str, AfterValidator(_known_overlap)]
"""Name of a schedule; a scenario knows its model, and takes those of its layers only."""


class Precision(Part):
    """The dtype of each part of a step."""

    weights: Dtype = "fp8"
    """Of expert and dense-FFN and projection products."""
    attention: Dtype = "bf16"
    """Of a prompt's attention core."""
    kv_cache: Dtype = "bf16"
    """Of what is stored, and so of the decode kernels that read it (published tables name them by it)."""
    dispatch: Dtype = "fp8"
    combine: Dtype = "bf16"


class Deployment(Part):
    """Degrees of parallelism, schedule and precision of one replica."""

    num_gpus: Count
    ep_size: Count = 1
    """Ranks over which routed experts lie."""
    tp_size: Count = 1
    """Tensor parallelism of attention; ``dp_size`` is its data parallelism."""
    dense_tp_size: Count | None = None
    """Tensor parallelism of dense FFNs; tp_size where not given."""
    pp_size: Count = 1
    overlap: Overlap = "none"
    precision: Precision = Precision()

    @model_validator(mode="after")
    def _degrees_divide(self) -> Deployment:
        faults = []
        for name in ("ep_size", "tp_size", "dense_tp_size", "pp_size"):
            size = getattr(self, name)
            if size is not None and self.num_gpus % size:
                divisors = [d for d in range(1, self.num_gpus + 1) if self.num_gpus % d == 0]
                near = ", ".join(map(str, divisors[-6:]))
                faults.append(
                    f"{name} must divide num_gpus: {self.num_gpus} % {size} = {self.num_gpus % size}; try one of {near}"
                )
        if not faults and self.num_gpus % (self.tp_size * self.pp_size):
            product = self.tp_size * self.pp_size
            faults.append(
                f"tp_size * pp_size must divide num_gpus: {self.num_gpus} % ({self.tp_size} * {self.pp_size}) = "
                f"{self.num_gpus % product}; choose smaller degrees"
            )
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def dp_size(self) -> int:
        """Data parallelism of attention: groups of ranks that hold sequences of their own."""
        return self.num_gpus // (self.tp_size * self.pp_size)

    @property
    def dense_tp(self) -> int:
        """Tensor parallelism of dense FFNs."""
        return self.dense_tp_size or self.tp_size


class Routing(Part):
    """Where expert loads come from."""

    source: Literal["balanced", "multinomial", "power_law", "recorded"] = "multinomial"
    file: str | None = None
    """A recorded RoutingTrace (JSON), for ``recorded``."""
    exponent: float = Field(default=1.01, gt=0)
    """Of ``power_law``: expert i's popularity is proportional to i^-exponent."""
    ffn_experts_mean: float | None = Field(default=None, ge=0)
    """FFN experts per token; the model's expectation where not given."""
    ffn_experts_std: float | None = Field(default=None, ge=0)
    placement: Literal["static", "eplb"] = "static"
    redundant_experts: int = Field(default=0, ge=0)
    """Extra replicas of busy experts, over all ranks, for ``eplb``."""

    @model_validator(mode="after")
    def _settings_have_an_effect(self) -> Routing:
        if (self.source == "recorded") != (self.file is not None):
            raise ValueError(
                "routing: expected file exactly when source is recorded, such as {source: recorded, file: r.json}; "
                f"got source {self.source!r}, file {self.file!r}"
            )
        if "exponent" in self.model_fields_set and self.source != "power_law":
            raise ValueError(f"exponent: expected source power_law; got {self.source!r}, under which it has no effect")
        if self.redundant_experts and self.placement != "eplb":
            raise ValueError(
                f"redundant_experts: expected placement eplb; got {self.placement!r}, under which it has no effect"
            )
        return self


class Speculative(Part):
    """Draft tokens per step and the chance that each is accepted given that those before it were."""

    draft_tokens: int = Field(default=0, ge=0, le=16)
    acceptance: tuple[Ratio, ...] = ()

    @field_validator("acceptance", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, (int, float)) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _one_rate_per_draft(self) -> Speculative:
        if len(self.acceptance) != self.draft_tokens:
            raise ValueError(
                f"acceptance: expected one rate per draft token ({self.draft_tokens}), such as [0.8]; "
                f"got {list(self.acceptance)}"
            )
        return self

    @property
    def tokens_per_step(self) -> float:
        """Expected output tokens per step: 1 + sum_i prod_{j<=i} a_j."""
        total, chain = 1.0, 1.0
        for rate in self.acceptance:
            chain *= rate
            total += chain
        return total


class DecodeStep(Part):
    """One steady-state decode step."""

    phase: Literal["decode"] = Field(default="decode", examples=["decode"])
    sequences_per_gpu: float = Field(gt=0)
    context_tokens: float = Field(gt=0)
    context_spread: float = Field(default=0.0, ge=0)
    """Coefficient of variation of the sequences' contexts: ranks that got long ones keep the others waiting.

    0 for a benchmark at one length. Of sequences in decode it is 0.58 in Azure's 2023 conversations, 0.92 in its 2023
    code and 1.26 in Mooncake's conversations (computed from the public traces, weighted by tokens in decode).
    """


class PrefillStep(Part):
    """One prefill step."""

    phase: Literal["prefill"]
    prompt_tokens: float = Field(gt=0)
    tokens_per_gpu: float = Field(gt=0)
    cached_tokens: float = Field(default=0, ge=0)
    """Tokens of each prompt whose KV cache is there already."""

    @model_validator(mode="after")
    def _something_to_compute(self) -> PrefillStep:
        if self.cached_tokens >= self.prompt_tokens:
            raise ValueError(
                f"cached_tokens: expected fewer than prompt_tokens ({self.prompt_tokens:g}); "
                f"got {self.cached_tokens:g}; a prompt computes at least one token"
            )
        return self
