"""Read the folder of a recorded vLLM run: its requests, the engine's settings, its deployment and its links."""

from __future__ import annotations

import csv
import difflib
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from longcat_sim.calibration.engine_links import PCIE5_PAIR, Link, law_link, measured_link
from longcat_sim.errors import MeasurementError
from longcat_sim.simulation.serving.published_loads import BalancerRules
from longcat_sim.specs.hardware import load_hardware
from longcat_sim.specs.loading import read_yaml
from longcat_sim.specs.model import ModelSpec, model_names, model_spec
from longcat_sim.studies.measure import sheet_of_card
from longcat_sim.studies.validate.vllm_files import is_number, read_json

BLOCK_TOKENS, MEMORY_SHARE = 16, 0.9
"""vLLM's default KV block on CUDA, and share of a card's memory."""
BATCH_DEFAULTS = {False: (256, 2048), True: (1024, 8192)}
"""By whether a card has 70 GiB at least and is no A100: a vLLM server's max_num_seqs and max_num_batched_tokens where
nobody sets them. Source: vLLM ``EngineArgs.get_batch_defaults`` (vllm/engine/arg_utils.py), usage context of an API
server; its offline class takes more tokens, and so do servers since v0.28 on cards of 160 GiB."""
LARGE_CARD_BYTES = 70 * 2**30
HOLDS = ("requests.jsonl", "meta.json", "config.json", "profile/")
USED = (
    "max_num_seqs", "max_num_batched_tokens", "tensor_parallel_size", "data_parallel_size", "pipeline_parallel_size",
    "enable_expert_parallel", "block_size", "gpu_memory_utilization", "enable_prefix_caching", "async_scheduling",
    "enforce_eager", "disable_custom_all_reduce", "cudagraph_mode", "cudagraph_capture_sizes",
)  # fmt: skip
"""Keys of ``engine_kwargs`` that change the prediction."""
ASYNC_SINCE = (0, 14)
"""vLLM decides the next step while one runs by default since v0.14.0 (its release notes, January 2026)."""
TEMPLATE_LINK = (16, 20000)
"""GiB/s and ns that the format's example deployments carry for every card, single ones too: they say nothing of one.
Source: LLMServingSim bench/examples/*/config.json @5daddb2; those with measured links left them out later."""


def find_model(names: Sequence[str], folder: Path) -> ModelSpec:
    """Return the model's shape: from a published config in the folder, else from the packaged models by name or path.

    Raises:
        MeasurementError: neither is there.
    """
    for candidate in (folder / "model_config.json", folder / "profile" / "config.json", folder / "config.json"):
        if candidate.is_file() and "num_hidden_layers" in read_json(candidate):
            return ModelSpec.from_hf_config(candidate)
    for name in names:
        short = name.rstrip("/").rsplit("/", 1)[-1].lower()
        matches = [known for known in model_names() if short == known or short.startswith(f"{known}-")]
        if matches:
            return model_spec(max(matches, key=len))
    raise MeasurementError(
        f"{folder}: expected the shape of {names[0] if names else 'a model'!r} in model_config.json (its published "
        f"config.json), or one of the packaged models {', '.join(model_names())}; add the file"
    )


def _plain(name: str) -> str:
    """Return a card's or model's name without its owner, case and punctuation."""
    return re.sub(r"[^a-z0-9]", "", name.rstrip("/").rsplit("/", 1)[-1].lower())


def _release(version: str) -> tuple[int, ...]:
    """Return the first two numbers of a version; none where it does not begin with two, or is a build's own."""
    found = re.match(r"v?(\d+)\.(\d+)(?!\.dev)", version)
    return tuple(map(int, found.groups())) if found else ()


def _is_local(names: Sequence[str]) -> bool:
    """Whether the first name says nothing of a model: it is a path, or missing."""
    return not names or not names[0] or names[0].startswith(("/", ".", "~"))


@dataclass(frozen=True)
class RunFolder:
    """What ``meta.json`` and ``config.json`` say; the engine's own report (``resolved_config``) has the last word."""

    path: Path
    meta: Mapping[str, Any]
    config: Mapping[str, Any]
    profile: Mapping[str, Any]
    """``profile/meta.yaml``"""

    @classmethod
    def read(cls, path: Path) -> RunFolder:
        """Read the settings of a folder.

        Raises:
            MeasurementError: a file is missing or cannot be read.
        """
        if not path.is_dir():
            raise MeasurementError(
                f"{path}: expected the folder of a recorded engine run ({', '.join(HOLDS)}); got "
                f"{'a file' if path.exists() else 'no such folder'}; give the folder"
            )
        sheet = path / "profile" / "meta.yaml"
        profile: Any = read_yaml(sheet)[0] if sheet.is_file() else {}
        folder = cls(
            path,
            read_json(path / "meta.json"),
            read_json(path / "config.json"),
            profile if isinstance(profile, dict) else {},
        )
        folder.warn_of_misspelled()
        folder.warn_of_another_profile()
        return folder

    @cached_property
    def _resolved(self) -> dict[str, dict[str, Any]]:
        """Sections of the engine's own report; what is no mapping is none."""
        sections = self.meta.get("resolved_config")
        sections = sections if isinstance(sections, dict) else {}
        return {name: part for name, part in sections.items() if isinstance(part, dict)}

    def warn_of_misspelled(self) -> None:
        """Warn of each key of ``engine_kwargs`` that looks like one that is missing there."""
        given = self.meta.get("engine_kwargs") or {}
        resolved = [key for part in self._resolved.values() for key in part]
        missing = [key for key in USED if key not in given and key not in resolved]
        for key in given:
            likely = difflib.get_close_matches(key, missing, n=1, cutoff=0.8) if key not in USED else []
            if likely:
                warnings.warn(
                    f"{self.path / 'meta.json'}: engine_kwargs.{key}: not used; is {likely[0]} meant?",
                    stacklevel=3,
                )

    def warn_of_another_profile(self) -> None:
        """Warn where the profile says that it is of another card, model or version of vLLM than the run."""
        version, given = self.meta.get("vllm_version"), self.profile.get("vllm_version")
        pairs: list[tuple[str, list[Any], Any, Callable[[str], Any]]] = [
            ("hardware", [self.instance.get("hardware")], self.profile.get("hardware"), _plain),
            ("model", self._model_names(), self.profile.get("model"), _plain),
            ("vllm_version", [version], given, _release),
        ]
        for key, wanted, got, read in pairs:
            names = [str(name) for name in wanted if name and read(str(name))]
            if names and got and read(str(got)) and read(str(got)) not in map(read, names):
                warnings.warn(
                    f"{self.path / 'profile' / 'meta.yaml'}: {key}: the run had {names[0]}, the profile is of {got}; "
                    "its kernel times may not be this run's",
                    stacklevel=3,
                )

    def default(self, key: str, value: Any) -> Any:
        """Return ``value`` and warn that it was taken for a missing ``key``."""
        warnings.warn(
            f"{self.path / 'meta.json'}: no {key}: {value}, vLLM's default, is taken; add what the run had to "
            "engine_kwargs",
            stacklevel=4,
        )
        return value

    @property
    def max_num_seqs(self) -> int:
        """The most sequences of a step. As ``count``, but for vLLM's default, which depends on the card."""
        return self._batch_limit("max_num_seqs", 0)

    @property
    def max_num_batched_tokens(self) -> int:
        """The most tokens of a step, as above."""
        return self._batch_limit("max_num_batched_tokens", 1)

    def _batch_limit(self, key: str, index: int) -> int:
        if self.setting("scheduler_config", key) is None:
            card = str(self.profile.get("gpu") or self.instance.get("hardware") or "")
            is_large = (self._card_bytes or 0) >= LARGE_CARD_BYTES and "a100" not in card.lower()
            return int(self.default(key, BATCH_DEFAULTS[is_large][index]))
        return self.count("scheduler_config", key, 0)

    def setting(self, section: str, key: str, default: Any = None) -> Any:
        """Return what the engine resolved, else what it was given, else ``default``."""
        resolved = self._resolved.get(section, {}).get(key)
        if resolved is not None:
            return resolved
        given = (self.meta.get("engine_kwargs") or {}).get(key)
        return default if given is None else given

    def count(self, section: str, key: str, default: int) -> int:
        """Return a setting that must be a positive whole number.

        Raises:
            MeasurementError: it is something else.
        """
        value = self.setting(section, key, default)
        if not is_number(value) or int(value) != value or value < 1:
            raise MeasurementError(
                f"{self.path / 'meta.json'}: {key}: expected a whole number of 1 at least; got {value!r}"
            )
        return int(value)

    @property
    def instance(self) -> Mapping[str, Any]:
        """The first instance of the deployment."""
        try:
            for node in self.config.get("nodes") or []:
                for instance in node.get("instances") or []:
                    return dict(instance) | {"npu_mem": dict(instance.get("npu_mem") or {})}
        except (AttributeError, TypeError, ValueError):
            raise MeasurementError(
                f"{self.path / 'config.json'}: nodes: expected a list such as [{{instances: [{{model_name: .., "
                f"npu_mem: {{mem_size: 96}}}}]}}]; got {str(self.config['nodes'])[:80]}; mend it"
            ) from None
        return {}

    @property
    def version(self) -> tuple[int, ...]:
        """vLLM's version, two numbers; none where it does not begin with two, or is a build's own (0.1.dev)."""
        return _release(str(self.meta.get("vllm_version") or ""))

    @property
    def _no_version(self) -> str:
        given = self.meta.get("vllm_version")
        return f"no release in vllm_version {given!r}" if given else "no vllm_version"

    def balancer(self) -> BalancerRules:
        """Return how the front end deals requests out to data-parallel ranks."""
        if not self.version:
            warnings.warn(
                f"{self.path / 'meta.json'}: {self._no_version}: requests are dealt out to ranks as before vLLM 0.22; "
                'give it, as "0.19.0"',
                stacklevel=2,
            )
        return BalancerRules.of(self.version)

    @property
    def is_async(self) -> bool:
        """Whether the engine decides the next step while one runs."""
        given = self.setting("scheduler_config", "async_scheduling")
        if given is None and not self.version:
            warnings.warn(
                f"{self.path / 'meta.json'}: {self._no_version}: taken as older than 0.14, whose steps wait for their "
                'scheduling; give it, as "0.19.0"',
                stacklevel=2,
            )
        return self.version >= ASYNC_SINCE if given is None else bool(given)

    @property
    def is_eager(self) -> bool:
        """Whether no CUDA graphs were used."""
        mode = self.setting("compilation_config", "cudagraph_mode")
        return bool(self.setting("model_config", "enforce_eager")) or mode in (0, [0, 0]) or str(mode).endswith("NONE")

    def model(self) -> ModelSpec:
        """Return the shape of the model; a local path that tells nothing is looked up by the deployment's names.

        Raises:
            MeasurementError: nothing in the folder names or describes a known model.
        """
        names, own = self._model_names(), self.profile.get("model")
        return find_model([*names, str(own)] if own and _is_local(names) else names, self.path)

    def _model_names(self) -> list[str]:
        """Return what the run and its deployment call the model; the deployment's where the run's is a local path."""
        settings = self.meta.get("engine_kwargs") or {}
        names = [str(self.meta.get("model") or settings.get("model") or "")]
        if _is_local(names) and self.instance.get("model_name"):
            names.append(str(self.instance["model_name"]))
        return [name for name in names if name]

    def cached_share(self) -> float:
        """Return the share of prompt tokens that the engine found in its prefix cache (``timeseries.csv``), else 0.

        Warns where that file does not record the hits of a cache that was on. It is a count over the whole run: the
        requests say neither which prompts share a prefix nor how much.
        """
        path = self.path / "timeseries.csv"
        if not path.is_file():
            return 0.0
        try:
            with path.open(encoding="utf-8", newline="") as file:
                rows = [
                    (float(row["prompt_cached_throughput"]), float(row["prompt_throughput"]))
                    for row in csv.DictReader(file)
                    if row.get("prompt_cached_throughput") and row.get("prompt_throughput")
                ]
        except ValueError as fault:
            raise MeasurementError(f"{path}: expected numbers; got {fault}; mend the row or remove the file") from None
        if not rows and self.setting("cache_config", "enable_prefix_caching") is not False:
            warnings.warn(
                f"{path}: no prompt_cached_throughput: prefix hits, if the run had any, are taken as none; 3.4% of "
                "hits shortened a loaded run's mean time to first token by 2 to 3%, its others by 1%",
                stacklevel=3,
            )
        total = sum(prompt for _, prompt in rows)
        return min(sum(cached for cached, _ in rows) / total, 1.0) if total > 0 else 0.0

    @property
    def has_own_all_reduce(self) -> bool:
        """Whether tensor-parallel ranks reduce by vLLM's own kernel, where it can."""
        return not self.setting("parallel_config", "disable_custom_all_reduce", False)

    def link(self) -> Link:
        """Return the link between the cards.

        Measured (``hardware.yaml``), or by the deployment's law; where it has none, or only its template's, NCCL's
        published times on PCIe 5. Of vLLM's own all-reduce nothing is published: the template's law stands for it.

        Raises:
            MeasurementError: ``hardware.yaml`` cannot be read.
        """
        for candidate in (self.path / "hardware.yaml", self.path / "profile" / "hardware.yaml"):
            if candidate.is_file() and self.config.get("link_bw") is None:
                document = read_yaml(candidate)[0]
                found = measured_link(document if isinstance(document, dict) else {}, str(candidate))
                if found is not None:
                    return found
        tp, dp = (self.count("parallel_config", f"{kind}_parallel_size", 1) for kind in ("tensor", "data"))
        found = law_link(self.config, 0 if tp > 1 else -1)
        is_template = (self.config.get("link_bw"), self.config.get("link_latency")) == TEMPLATE_LINK
        is_nccl = dp > 1 or not self.has_own_all_reduce
        if found is not None and not (is_template and is_nccl):
            return found
        says = "only the template's link_bw and link_latency" if found else "no link_bw and link_latency"
        warnings.warn(
            f"{self.path / 'config.json'}: {says}, and no hardware.yaml beside it: NCCL's times between two cards on "
            "PCIe 5 x16 are taken",
            stacklevel=2,
        )
        return PCIE5_PAIR

    def kv_blocks(self, model: ModelSpec, tp_size: int, dp_size: int) -> tuple[int, int]:
        """Return (KV blocks of one data-parallel rank, tokens of a block).

        Reported, or else the share of memory that weights leave. vLLM reports the blocks of all data-parallel ranks
        together (its client adds them up) and the tokens of one rank; it keeps one block as the null block.

        Raises:
            MeasurementError: neither blocks nor memory are known, or weights leave nothing.
        """
        reported = self.meta.get("kv_cache") or {}
        given = reported.get("block_size") or self.setting("cache_config", "block_size")
        size = int(given or BLOCK_TOKENS)
        tokens = self.setting("cache_config", "kv_cache_size_tokens")
        if is_number(tokens) and tokens >= size:
            return int(tokens) // size - 1, size
        fitting = self._blocks_by_memory(model, tp_size, dp_size, size)
        blocks = reported.get("num_gpu_blocks") or self.setting("cache_config", "num_gpu_blocks")
        if is_number(blocks) and blocks > 1:
            if not given:  # the cache's tokens hang on it; where the memory is known they hardly do
                self.default("block_size", BLOCK_TOKENS)
            is_total = dp_size > 1 and (fitting is None or blocks > 1.3 * fitting)
            return int(blocks) // (dp_size if is_total else 1) - 1, size
        if fitting is None or fitting < 2:
            raise MeasurementError(
                f"{self.path}: expected kv_cache.num_gpu_blocks in meta.json, or a card's memory that holds more than "
                f"the weights (npu_mem.mem_size in GiB and mem_util in config.json); got {fitting} blocks; add one"
            )
        return fitting - 1, size

    def _blocks_by_memory(self, model: ModelSpec, tp_size: int, dp_size: int, size: int) -> int | None:
        memory = self.instance.get("npu_mem") or {}
        total = self._card_bytes
        if total is None:
            return None
        share = memory.get("mem_util") or self.setting("cache_config", "gpu_memory_utilization")
        if not share:
            share = self.default("gpu_memory_utilization", MEMORY_SHARE)
        experts = model.parameters_by_part["experts"]
        weights = ((model.num_parameters - experts) / tp_size + experts / (tp_size * dp_size)) * 2.0
        per_block = model.kv_bytes_per_token(bytes_per_value=2) / tp_size * size
        return max(0, int((total * share - weights) / per_block))

    @property
    def cache_bytes(self) -> float:
        """The card's last-level cache, by its packaged profile; 0 where there is none."""
        sheet = sheet_of_card(str(self.profile.get("gpu", "")))
        return (load_hardware(sheet).l2 or 0.0) if sheet else 0.0

    @cached_property
    def _card_bytes(self) -> float | None:
        """Return a card's memory: the deployment's, what the engine saw, or its packaged profile's."""
        given: Any = (self.instance.get("npu_mem") or {}).get("mem_size")
        if given is not None:
            if not is_number(given) or given <= 0:
                raise MeasurementError(
                    f"{self.path / 'config.json'}: npu_mem.mem_size: expected GiB as a number, such as 96; got "
                    f"{given!r}; mend it"
                )
            return float(given) * 2**30
        seen: Any = (self.meta.get("hardware") or {}).get("device_total_memory_bytes")
        if is_number(seen):
            return float(seen)
        sheet = sheet_of_card(str(self.profile.get("gpu", "")))
        if sheet is None:
            return None
        memory = load_hardware(sheet).memory
        warnings.warn(
            f"{self.path}: no npu_mem.mem_size in config.json: the memory of {sheet.stem} is taken, "
            f"{memory / 2**30:.1f} GiB a card",
            stacklevel=4,
        )
        return memory
