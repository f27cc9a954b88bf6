"""Attention of a layer profile: times of chunks beside decoding sequences, and what unequal contexts add."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from longcat_sim.calibration.profile_tables import (
    Curve,
    bracket,
    curve,
    interpolate,
    numbers,
    table_header,
    table_rows,
)
from longcat_sim.errors import MeasurementError


@dataclass
class AttentionTable:
    """Attention time by (prefill tokens, mean keys before the chunk, decode count, decode KV), multilinear.

    Several short prompts in one chunk have fewer keys before them than one long prompt: less than none. Below the
    smallest measured keys each of so many equal prompts takes what a chunk of its length takes alone, all but the
    launch; what decoding adds stays.
    """

    chunks: list[float]
    tables: dict[float, tuple[list[float], dict[float, tuple[list[float], dict[float, Curve]]]]]
    """prefill tokens -> (nodes of keys before, node -> (decode counts, count -> curve over decode KV))"""

    @classmethod
    def read(cls, path: Path) -> AttentionTable:
        """Read ``attention.csv``; ``prefill_key`` (mean keys per query) and ``kv_prefill`` are both understood."""
        header = table_header(path)
        has_keys = "prefill_key" in header
        columns = [("prefill_chunk",), ("prefill_key", "kv_prefill"), ("n_decode",), ("kv_decode",), ("time_us",)]
        nested: dict[float, dict[float, dict[float, dict[float, float]]]] = defaultdict(
            lambda: defaultdict(lambda: defaultdict(dict))
        )
        extra = [name for name in ("decode_q_len", "layer") if name in header]
        columns.extend((name,) for name in extra)
        kernels: set[str] = set()
        for row in table_rows(path, columns):
            chunk, keys, count, kv, time = numbers(path, row[:5])
            more = dict(zip(extra, row[5:], strict=True))
            if float(more.get("decode_q_len") or 1) != 1:
                continue
            kernels.add(more.get("layer", "attention"))
            before = keys - chunk / 2 if has_keys else keys
            nested[chunk][before][count][kv] = time
        if len(kernels) != 1 or not any(nested[0.0].values()):
            raise MeasurementError(
                f"{path}: expected the times of one attention kernel, with rows of pure decode (prefill_chunk 0); got "
                f"{', '.join(sorted(kernels)) or 'no rows'}; models with several attention kernels are not covered"
            )
        tables = {}
        for chunk, by_keys in nested.items():
            full = {k: by_count for k, by_count in by_keys.items() if chunk == 0 or len(by_count) > 1}
            tables[chunk] = (
                sorted(full),
                {k: (sorted(by_count), {n: curve(c) for n, c in by_count.items()}) for k, by_count in full.items()},
            )
        return cls(sorted(c for c, (nodes, _) in tables.items() if nodes), tables)

    def __post_init__(self) -> None:
        prefills = [c for c in self.chunks if c > 0]
        self._smallest = 0.0
        if prefills:
            nodes, by_keys = self.tables[prefills[0]]
            self._smallest = self._line(by_keys[nodes[0]], 0.0, 0.0) if 0.0 in by_keys[nodes[0]][1] else 0.0

    def us(self, tokens: float, before: float, count: float, kv: float) -> float:
        """Return the attention time of one layer."""
        if tokens <= 0:
            return self._plane(0.0, 0.0, count, kv) if count else 0.0
        # between no prefill at all and the smallest measured one lies another kernel, not a line
        nodes = [c for c in self.chunks if c > 0]
        j, weight = bracket(nodes, max(tokens, nodes[0]))
        low = self._plane(nodes[j], before, count, kv)
        if not weight or len(nodes) == 1:
            return low
        return low + (self._plane(nodes[j + 1], before, count, kv) - low) * weight

    def _plane(self, chunk: float, before: float, count: float, kv: float) -> float:
        nodes, by_keys = self.tables[chunk]
        if chunk and before < nodes[0]:
            return self._few_keys(chunk, before, count, kv)
        j, weight = bracket(nodes, before)
        low = self._line(by_keys[nodes[j]], count, kv)
        if not weight:
            return low
        return low + (self._line(by_keys[nodes[j + 1]], count, kv) - low) * weight

    def _few_keys(self, chunk: float, before: float, count: float, kv: float) -> float:
        nodes, by_keys = self.tables[chunk]
        first = by_keys[nodes[0]]
        alone = self._line(first, 0.0, 0.0) if 0.0 in first[1] else 0.0
        least = min(alone, self._smallest)
        prompt = max(2 * (before + chunk / 2), self.chunks[0] or self.chunks[min(1, len(self.chunks) - 1)])
        several = least + chunk / prompt * (self.us(prompt, 0.0, 0, 0) - least)
        return self._line(first, count, kv) - max(alone - several, 0.0)

    @staticmethod
    def _line(by_count: tuple[list[float], dict[float, Curve]], count: float, kv: float) -> float:
        counts, curves = by_count
        j, weight = bracket(counts, max(count, counts[0]))
        low = interpolate(curves[counts[j]], kv)
        if not weight:
            return low
        return low + (interpolate(curves[counts[j + 1]], kv) - low) * weight


@dataclass
class SkewTable:
    """How far the time of unequal contexts lies between that of the mean and that of the longest, 0..1.

    Each measured case gives one share; cases are pooled by prefill size, decode count (nearest power of two) and
    relative gap, and the median that minimises the relative error of the time is kept.
    """

    shares: dict[tuple[int, int, int], float] = field(default_factory=dict)
    GAPS = (0.25, 0.5, 1.0, 2.0)
    LEAST = 6
    """Cases that a pool needs; with fewer, the count's pool without regard to gap is used."""

    @staticmethod
    def _chunk(tokens: float) -> int:
        return 0 if tokens <= 0 else 1 + int(np.log2(max(tokens, 16.0) / 16) / 2)

    def _key(self, tokens: float, count: float, gap: float) -> tuple[int, int, int]:
        return self._chunk(tokens), round(float(np.log2(max(count, 1)))), bisect_left(self.GAPS, gap)

    @classmethod
    def read(cls, path: Path, attention: AttentionTable) -> SkewTable:
        """Read ``skew.csv``; an absent file corrects nothing.

        Each case was measured with its controls (all contexts at the mean, all at the longest) in one series, so
        that the share does not depend on how often the series ran each. Where a case has none, the controls are what
        the attention table says of its requests.

        Raises:
            MeasurementError: the table has neither controls nor requests.
        """
        table = cls()
        header = table_header(path)
        if not header:
            return table
        names = [name for name in ("n", "pc", "t_mean_us", "t_max_us", "requests_json") if name in header]
        if "requests_json" not in names and len(names) < 4:
            raise MeasurementError(
                f"{path}:1: expected columns n, pc, t_mean_us, t_max_us, or requests_json; got {', '.join(header)}; "
                "is this a table of unequal contexts?"
            )
        rows = []
        for values in table_rows(path, [(name,) for name in (*names, "t_skew_us")]):
            cells = dict(zip(names, values, strict=False))
            if all(cells.get(name) for name in ("n", "pc", "t_mean_us", "t_max_us")):
                rows.append(numbers(path, [*(cells[n] for n in ("n", "pc", "t_mean_us", "t_max_us")), values[-1]]))
            elif cells.get("requests_json"):
                rows.append([*_controls(cells["requests_json"], attention), *numbers(path, values[-1:])])
        pools: dict[tuple[int, int, int], list[tuple[float, float]]] = defaultdict(list)
        for row in rows:
            count, tokens, low, high, time = row
            if high - low <= 0.02 * low:
                continue
            share, weight = (time - low) / (high - low), (high - low) / time
            chunk, size, gap = table._key(tokens, count, (high - low) / low)
            pools[chunk, size, gap].append((share, weight))
            pools[chunk, size, -1].append((share, weight))
        for key, cases in pools.items():
            if len(cases) >= cls.LEAST:
                cases.sort()
                weights = np.cumsum([weight for _, weight in cases])
                median = cases[int(np.searchsorted(weights, weights[-1] / 2))][0]
                table.shares[key] = min(max(median, 0.0), 1.0)
        return table

    def share(self, tokens: float, count: float, gap: float) -> float:
        """Return the share for a step; 0 where nothing was measured."""
        chunk, size, at = self._key(tokens, count, gap)
        for key in ((chunk, size, at), (chunk, size, -1), (chunk, size - 1, -1), (chunk, size + 1, -1)):
            if key in self.shares:
                return self.shares[key]
        return 0.0


def _controls(requests: str, attention: AttentionTable) -> tuple[float, float, float, float]:
    """Return (decode count, prefill tokens, us at the mean context, us at the longest) of [[query, history], ...]."""
    pairs = json.loads(requests)
    contexts = [past for query, past in pairs if query == 1] or [0]
    tokens = sum(query for query, _ in pairs if query > 1)
    keys = sum(query * (past + query / 2) for query, past in pairs if query > 1)
    before = keys / tokens - tokens / 2 if tokens else 0.0
    count = len(contexts)
    low, high = (attention.us(tokens, before, count, kv) for kv in (sum(contexts) / count, max(contexts)))
    return count, tokens, low, high
