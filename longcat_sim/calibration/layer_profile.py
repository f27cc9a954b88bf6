"""Read an LLMServingSim-style layer profile of one card and turn it into step times of a vLLM v1 engine.

A profile folder holds ``tp<N>/dense.csv`` (layer, tokens, us), ``per_sequence.csv`` (layer, sequences, us),
``attention.csv`` (prefill chunk, KV before it or mean keys, decode count, decode KV, us), optionally ``skew.csv``
(decode batches with unequal contexts) and ``moe.csv`` (tokens, activated experts, us). Times are of single kernels,
measured alone, so that a step is their sum.

Source: casys-kaist/LLMServingSim, documentation of the profiler's output bundle (format only).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from longcat_sim.calibration.attention_tables import AttentionTable, SkewTable
from longcat_sim.calibration.moe_components import MoeComponents, read_components
from longcat_sim.calibration.profile_tables import (
    Curve,
    CurveFamily,
    curve,
    interpolate,
    table_header,
    table_rows,
    timed,
)
from longcat_sim.errors import MeasurementError

TABLES = ("dense.csv", "per_sequence.csv", "attention.csv")
"""What a profile of one tensor-parallel degree must hold."""


def _curves(path: Path, axis: str) -> dict[str, Curve]:
    points: dict[str, dict[float, float]] = defaultdict(dict)
    for where, (layer, *row) in table_rows(path, (("layer",), (axis,), ("time_us",))):
        x, time = timed(where, row)
        points[layer][x] = time
    return {layer: curve(p) for layer, p in points.items()}


@dataclass
class LayerProfile:
    """The tables of one tensor-parallel degree."""

    dense: dict[str, Curve]
    per_sequence: dict[str, Curve]
    attention: AttentionTable
    skew: SkewTable
    moe: dict[int, CurveFamily]
    """Expert-parallel degree -> curves over tokens, by activated experts"""
    components: MoeComponents | None = None
    """Experts, gate and finalisation measured apart, for this very deployment."""
    has_forced_experts: bool = False
    """Whether ``moe`` is of the time before profilers recorded how they measured (a column ``measurement_protocol``):
    the same experts were forced in every run, and the kernel that picks them left out. Source: LLMServingSim
    documentation, output bundle and changelog."""
    routing_us: float = 0.0
    """Time of that kernel, where ``moe`` lacks it: that of the profile's shortest, for it is little more than a launch.
    """

    @classmethod
    def read(cls, profile: Path, tp_size: int, dp_size: int = 1) -> LayerProfile:
        """Read ``profile/tp<N>``, or ``profile`` itself if it holds the tables.

        Raises:
            MeasurementError: no tables for this degree, or a table without its columns.
        """
        folder = profile / f"tp{tp_size}"
        if folder.is_dir():
            missing = [name for name in TABLES if not (folder / name).is_file()]
            if missing:
                raise MeasurementError(
                    f"{folder}: expected the tables {', '.join(TABLES)}; got none of {', '.join(missing)}; copy the "
                    "whole profile, or profile those kernels"
                )
        else:
            folder = profile
        if not (folder / "dense.csv").is_file():
            have = sorted(p.name for p in profile.glob("tp*")) if profile.is_dir() else []
            raise MeasurementError(
                f"{profile}: expected tables of tensor parallelism {tp_size} in tp{tp_size}/; got "
                f"{', '.join(have) or 'none'}; profile that degree on the card"
            )
        moe_path = folder / "moe.csv"
        if not moe_path.is_file():
            moe_path = profile / "tp1" / "moe.csv"
        attention = AttentionTable.read(folder / "attention.csv")
        table = cls(
            _curves(folder / "dense.csv", "tokens"),
            _curves(folder / "per_sequence.csv", "sequences"),
            attention,
            SkewTable.read(folder / "skew.csv", attention),
            _read_moe(moe_path) if moe_path.is_file() else {},
            read_components(folder, tp_size, dp_size) if dp_size > 1 else None,
        )
        lacks = [name for name in ("qkv_proj", "o_proj") if name not in table.dense]
        lacks += [name for name in ("lm_head",) if name not in table.per_sequence]
        if not table.moe and not table.components:
            lacks += [name for name in ("gate_up_proj", "down_proj") if name not in table.dense]
        if lacks:
            raise MeasurementError(
                f"{folder}: expected qkv_proj, o_proj, gate_up_proj, down_proj (or moe.csv) in dense.csv and lm_head "
                f"in per_sequence.csv; got none of {', '.join(lacks)}; profile the missing kernels"
            )
        if table.moe and "measurement_protocol" not in table_header(moe_path):
            table.has_forced_experts = True
            table.routing_us = min(times[0] for _, times in table.dense.values())
        return table

    def with_experts_in_memory(self, expert_bytes: float, cache_bytes: float) -> LayerProfile:
        """Return the profile with no expert's weights read from a cache; itself where experts were not forced.

        A profiler that runs one layer with the same experts again and again finds the weights of a few in the cache; in
        a step those of all other layers pass in between. Counts of experts that fit (``expert_bytes`` each) are given
        the time on the line through the next two counts, where that is longer; below the fewest tokens of those, theirs
        counts. Source: LLMServingSim documentation, native MoE components (its later tables turn among as many copies
        of the weights as the cache cannot hold).
        """
        if not self.has_forced_experts:
            return self
        moe = {}
        for degree, family in self.moe.items():
            counts, curves = family.parameters, dict(family.curves)
            streamed = [count for count in counts if count * expert_bytes > cache_bytes][:2]
            for count in counts:
                if len(streamed) == 2 and count < streamed[0]:
                    nodes, times = curves[count]
                    weight = (count - streamed[0]) / (streamed[1] - streamed[0])
                    lines = [tuple(interpolate(curves[other], t) for other in streamed) for t in nodes]
                    least = [low + (high - low) * weight for low, high in lines]
                    curves[count] = nodes, [max(pair) for pair in zip(times, least, strict=True)]
            moe[degree] = CurveFamily(counts, curves)
        return replace(self, moe=moe)

    def calls_of(self, name: str) -> int:
        """Return how often a layer runs a normalisation: twice where the row is the time of one of its two kernels.

        Older profiles give the mean of the query's and the key's norm, newer ones their sum; at one token both
        are mere launches, as long as any other norm.
        """
        if name not in self.dense or "layernorm" not in self.dense:
            return 1
        return 2 if interpolate(self.dense[name], 1) < 1.35 * interpolate(self.dense["layernorm"], 1) else 1

    def attention_us(self, contexts: Sequence[int], chunks: Sequence[tuple[int, int]]) -> float:
        """Return the attention time of one layer: decode ``contexts`` and prefill (tokens, tokens before)."""
        tokens = sum(q for q, _ in chunks)
        keys = sum(q * (past + q / 2) for q, past in chunks)
        before = keys / tokens - tokens / 2 if tokens else 0.0
        count = len(contexts)
        if not count:
            return self.attention.us(tokens, before, 0, 0)
        mean, longest = sum(contexts) / count, max(contexts)
        low = self.attention.us(tokens, before, count, mean)
        if count < 2 or longest <= mean * 1.001:
            return low
        high = self.attention.us(tokens, before, count, longest)
        if high <= low:
            return low
        return low + self.skew.share(tokens, count, high / low - 1) * (high - low)

    def moe_us(self, ep_size: int, tokens: float, experts: float) -> float:
        """Return the time of the expert part of one layer for the tokens that one rank sees.

        A table of another degree is read where it has as many token-expert pairs.
        """
        degree = min(self.moe, key=lambda e: abs(e - ep_size))
        tokens = tokens * degree / ep_size
        return self.moe[degree].at(experts, tokens) + self.routing_us


def _read_moe(path: Path) -> dict[int, CurveFamily]:
    has_ep = "ep" in table_header(path)
    columns = [*([("ep",)] if has_ep else []), ("tokens", "local_tokens"), ("activated_experts",), ("time_us",)]
    nested: dict[int, dict[float, dict[float, float]]] = defaultdict(lambda: defaultdict(dict))
    for where, row in table_rows(path, columns):
        *degree, tokens, experts, time = timed(where, row)
        nested[int(degree[0]) if degree else 1][experts][tokens] = time
    return {ep: CurveFamily.of(by_experts) for ep, by_experts in nested.items()}
