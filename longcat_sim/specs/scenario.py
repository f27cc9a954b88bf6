"""``Scenario``: everything one simulation needs, loaded from YAML, changed by dotted paths."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from longcat_sim.errors import SpecError
from longcat_sim.specs.base import Count, FlopPerSecond, Part, Seconds
from longcat_sim.specs.changes import apply_changes
from longcat_sim.specs.deployment import DecodeStep, Deployment, Overlap, PrefillStep, Routing, Speculative
from longcat_sim.specs.hardware import HardwareSpec, hardware_names, load_hardware
from longcat_sim.specs.loading import Lines, dotted, read_yaml, sentence, unknown_name, validate
from longcat_sim.specs.model import ModelSpec, model_spec
from longcat_sim.specs.price import Price
from longcat_sim.specs.serve import Serve

Positive = Annotated[float, Field(gt=0)]
PRESETS = Path(__file__).resolve().parents[1] / "presets" / "scenarios"


class Search(Part):
    """What a capacity search may change and what it wants. An empty list leaves the scenario's value."""

    hardware: tuple[str, ...] = ()
    max_gpus: int = Field(default=512, ge=1)
    """Of the whole fleet where there is traffic, else of one replica."""
    num_gpus: tuple[Count, ...] = ()
    """Of one replica; empty: the ep_size (or the tp_size, without experts) where that list is given."""
    ep_size: tuple[Count, ...] = ()
    tp_size: tuple[Count, ...] = ()
    dense_tp_size: tuple[Count, ...] = ()
    overlap: tuple[Overlap, ...] = ()
    sequences_per_gpu: tuple[Positive, ...] = ()
    """Two values are the ends of a range; more are the values themselves."""
    tpot: Seconds | None = None
    """Service level where there is no ``serve.slo``: seconds per output token of one user, at most."""
    probability: float = Field(default=0.5, gt=0, lt=1)
    """Chance with which the winner must meet the service level, over calibration, routing and model error."""
    attainment: float = Field(default=0.95, gt=0, lt=1)
    """Share of the requests of each class of traffic that must be within ``serve.slo``."""
    output_tokens_per_s: Positive | None = None
    """What the whole fleet must make, where there is no traffic: its replicas follow. Unset: ``max_gpus`` are used."""
    spare_replicas: int = Field(default=0, ge=0)
    """Replicas of each pool beyond what the traffic needs (1: N+1)."""
    survivors: Count = 50
    """Screened candidates that are simulated."""
    objective: Literal["usd_per_million_output_tokens", "tokens_per_s_per_user", "ttft_s", "num_gpus"] = (
        "usd_per_million_output_tokens"
    )


class _Document(Part):
    """The YAML form of a scenario."""

    model: str
    hardware: str
    deployment: Deployment
    routing: Routing = Routing()
    speculative: Speculative = Speculative()
    step: Annotated[DecodeStep | PrefillStep, Field(discriminator="phase")] | None = None
    serve: Serve | None = None
    search: Search | None = None
    price: Price = Price()
    seed: int = Field(default=0, ge=0)
    draws: int = Field(default=32, ge=1, le=4096)


class Scenario:
    """A checked scenario. Build with ``scenario(name_or_path)``; change with ``what_if``.

    Attributes are the sections of the file: ``model`` (ModelSpec), ``hardware`` (HardwareSpec), ``deployment``,
    ``routing``, ``speculative``, ``step``, ``serve``, ``search``, ``price``, ``seed``, ``draws``.
    """

    def __init__(
        self, document: Mapping[str, Any], *, where: str = "scenario", lines: Lines | None = None,
        changes: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.where = where
        self.changes: dict[str, Any] = dict(changes or {})
        self._document, self._lines = document, lines
        outer: dict[str, Any] = {}
        inner: dict[str, dict[str, Any]] = {"model": {}, "hardware": {}}
        for path, value in self.changes.items():
            head, _, rest = path.partition(".")
            if head in inner and rest:
                inner[head][rest] = value
            else:
                outer[path] = value
        changed, faults = apply_changes(document, outer)
        named: list[str] = []
        self.hardware = self._named(changed, "hardware", _load_hardware, inner, named)
        self.model = self._named(changed, "model", _load_model, inner, named)
        parsed = None
        try:
            context = {"layer_kind": self.model.layer_kind} if self.model else None
            parsed = validate(_Document, changed, where=where, lines=lines, context=context)
        except SpecError as error:
            faults += error.faults
        faults += [*named, *self._across(parsed or _readable(changed))]
        if parsed is None or faults:
            raise SpecError(list(dict.fromkeys(faults)))
        self.deployment, self.routing, self.speculative = parsed.deployment, parsed.routing, parsed.speculative
        self.step, self.serve, self.search = parsed.step, parsed.serve, parsed.search
        self.price, self.seed, self.draws = parsed.price, parsed.seed, parsed.draws

    def _across(self, parts: Any) -> list[str]:
        """Return the faults between sections, as far as those have none of their own (else they are None)."""
        faults: list[str] = []
        if self.hardware and parts.price:
            searched = [Path(name).stem for name in (parts.search.hardware if parts.search else ())]
            known = sorted({*hardware_names(), *searched, self.hardware.name})
            where = f"{self._at('price')}.hardware_usd_per_gpu_hour"
            for name in parts.price.hardware_usd_per_gpu_hour:
                if name not in known:
                    faults += unknown_name("hardware", name, known, where=where).faults
        if self.model and parts.deployment and parts.routing:
            extra = parts.routing.redundant_experts
            try:
                check_deployment(self.model, parts.deployment, where=self._at("deployment"), redundant_experts=extra)
            except SpecError as error:
                faults += error.faults
        return faults

    def _at(self, key: str) -> str:
        line = self._lines.get((key,)) if self._lines else None
        return f"{self.where}:{line}: {key}" if line else f"{self.where}: {key}"

    def _named(
        self, document: Mapping[str, Any], key: str, load: Any,
        inner: Mapping[str, Mapping[str, Any]], faults: list[str],
    ) -> Any:  # fmt: skip
        """Return the profile or model that ``document[key]`` names, with its what-if changes applied."""
        name = document.get(key)
        if not isinstance(name, str):
            return None  # _Document has reported it
        try:
            return load(name, inner[key], self._at(key))
        except SpecError as error:
            faults += error.faults
            return None

    def what_if(self, changes: Mapping[str, Any]) -> Scenario:
        """Return this scenario with figures changed by dotted path, such as
        ``{"hardware.scale_out.bandwidth": "100 GB/s", "deployment.overlap": "tbo"}``.

        Raises:
            SpecError: an unknown path or a value that does not fit.
        """
        return Scenario(
            self._document, where=self.where, lines=self._lines,
            changes={**{path: value for path, value in self.changes.items() if path not in changes}, **changes},
        )  # fmt: skip

    @property
    def name(self) -> str:
        """File name without its ending."""
        return Path(self.where).stem

    @property
    def usd_per_gpu_hour(self) -> float:
        """The price, from the scenario or from the hardware profile; of owned GPUs, all that an hour costs.

        Raises:
            SpecError: neither has one.
        """
        try:
            return sum(self.price.gpu_hour_usd(self.hardware).values())
        except SpecError as error:
            raise SpecError([f"{self.where}: {fault}" for fault in error.faults]) from None

    def digest(self) -> str:
        """Return a hash of everything that decides the result."""
        whole = {"document": self._document, "changes": self.changes, "hardware": self.hardware.model_dump(mode="json")}
        return hashlib.sha256(json.dumps(whole, sort_keys=True, default=str).encode()).hexdigest()[:16]

    def __repr__(self) -> str:
        changed = f", changes={self.changes}" if self.changes else ""
        return f"Scenario({self.name!r}, model={self.model.name!r}, hardware={self.hardware.name!r}{changed})"


def _readable(document: Mapping[str, Any]) -> SimpleNamespace:
    """Return the sections of a faulty document that can be read, the others None."""
    kinds: dict[str, type[Part]] = {"deployment": Deployment, "routing": Routing, "price": Price, "search": Search}
    parts: dict[str, Any] = dict.fromkeys(kinds)
    for key, kind in kinds.items():
        with suppress(ValidationError):
            parts[key] = kind.model_validate(document.get(key, {}))
    return SimpleNamespace(**parts)


def _load_hardware(name: str, changes: Mapping[str, Any], where: str) -> HardwareSpec:
    """Return a profile with figures replaced by dotted path, each value read as if it stood in the file."""
    spec = load_hardware(name, where=where)
    faults: list[str] = []
    for path, value in changes.items():
        try:
            spec = _replaced(spec, path.split("."), value, where=f"hardware.{path}")
        except SpecError as error:
            faults += error.faults
    if faults:
        raise SpecError(faults)
    return spec


def _load_model(name: str, changes: Mapping[str, Any], where: str) -> ModelSpec:
    """Return a model with config keys replaced; what follows from them is derived anew."""
    try:
        spec = model_spec(name)
        faults = []
        for key in changes:
            if key not in type(spec).model_fields:
                near = difflib.get_close_matches(key, type(spec).model_fields, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(type(spec).model_fields)}"
                faults.append(f"model.{key}: expected a key of the model; got {key!r}; {hint}")
        if faults:
            raise SpecError(faults)
        return model_spec(name, **changes)
    except SpecError as error:
        raise SpecError([f"{where}: {fault.removeprefix('model: ')}" for fault in error.faults]) from None


def _replaced(node: Any, path: list[str], value: Any, *, where: str) -> Any:
    known = dict(node)
    head, rest = path[0], path[1:]
    if head not in known:
        near = difflib.get_close_matches(head, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "choose one"
        raise SpecError(f"{where}: expected one of {', '.join(sorted(known))}; got {head!r}; {hint}")
    if rest:
        if not isinstance(known[head], (Part, dict)):
            raise SpecError(f"{where}: expected a figure; {head} has no parts here; got {'.'.join(path)!r}")
        new = _replaced(known[head], rest, value, where=where)
    else:
        new = _read_as(node, head, value, where=where)
    return {**node, head: new} if isinstance(node, dict) else node.model_copy(update={head: new})


def _read_as(node: Any, name: str, value: Any, *, where: str) -> Any:
    """Return ``value`` validated as the field ``name`` of ``node`` (of a dict: as a peak rate, the only dict there)."""
    if isinstance(node, dict):
        kind: Any = FlopPerSecond
    else:
        field = type(node).model_fields[name]
        kind = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        faults = []
        for fault in error.errors():
            inner = dotted(fault["loc"])
            placed = {**fault, "loc": (name, *fault["loc"])}
            faults.append(f"{where}{'.' if inner else ''}{inner}: {sentence(placed, type(node))}")
        raise SpecError(faults) from None


def check_deployment(
    model: ModelSpec, deployment: Deployment, *, where: str = "deployment", redundant_experts: int = 0
) -> None:
    """Raise SpecError, with the sum written out, if the model's sizes do not divide over the deployment.

    Ranks hold equal numbers of experts, replicas included: 256 and 32 redundant ones lie on 144 ranks.
    """
    faults = []
    experts = model.n_routed_experts
    if experts and redundant_experts and (experts + redundant_experts) % deployment.ep_size:
        slots = experts + redundant_experts
        faults.append(
            f"{where}: ep_size must divide n_routed_experts + redundant_experts: {slots} % {deployment.ep_size} = "
            f"{slots % deployment.ep_size}; use {-experts % deployment.ep_size} redundant experts"
        )
    elif experts and not redundant_experts and experts % deployment.ep_size:
        near = [size for size in range(1, experts + 1) if experts % size == 0 and deployment.num_gpus % size == 0]
        faults.append(
            f"{where}: ep_size must divide n_routed_experts: {experts} % {deployment.ep_size} = "
            f"{experts % deployment.ep_size}; try one of {', '.join(map(str, near[-6:]))}"
        )
    if not experts and deployment.ep_size > 1:
        faults.append(f"{where}: ep_size: expected 1 for {model.name}, which has no experts; got {deployment.ep_size}")
    if deployment.pp_size > 1:
        faults.append(
            f"{where}: pp_size: expected 1; got {deployment.pp_size}; pipeline sends and bubbles are not simulated: "
            "use tp_size, dense_tp_size or ep_size"
        )
    if model.num_attention_heads % deployment.tp_size:
        faults.append(
            f"{where}: tp_size must divide num_attention_heads: {model.num_attention_heads} % {deployment.tp_size} = "
            f"{model.num_attention_heads % deployment.tp_size}; try a power of two"
        )
    if faults:
        raise SpecError(faults)


def scenario_names() -> list[str]:
    """Return the names of the packaged scenarios."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def scenario(name_or_path: str | Path | Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> Scenario:
    """Return a packaged scenario by name, one from a YAML file, or one from a mapping.

    Raises:
        SpecError: no such scenario (lists those there are), or every fault of the file.
    """
    if isinstance(name_or_path, Mapping):
        return Scenario(name_or_path, changes=changes)
    text = str(name_or_path)
    packaged = PRESETS / f"{text}.yaml"
    path = packaged if packaged.exists() else Path(text)
    if not path.exists():
        raise unknown_name("scenario", text, scenario_names())
    document, lines, faults = read_yaml(path)
    if not isinstance(document, dict):
        raise SpecError([*faults, f"{path.name}:1: expected a mapping with model, hardware, deployment; got a list"])
    for key in ("model", "hardware"):  # a file that is named there lies where the scenario says, or beside it
        named = document.get(key)
        if isinstance(named, str) and not Path(named).exists() and (path.parent / named).is_file():
            document[key] = str(path.parent / named)
    try:
        made = Scenario(document, where=path.name, lines=lines, changes=changes)
    except SpecError as error:
        raise SpecError([*faults, *error.faults]) from None
    if faults:
        raise SpecError(faults)
    return made
