"""Attention of a layer profile: times of chunks beside decoding sequences, and what unequal contexts add."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
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
    timed,
)
from longcat_sim.errors import MeasurementError

NODE_SHARE = 3
"""A context is a node where it was measured with a third of the chunks or more: of two grids each holds about half of
all, but contexts that both have hold all."""
Curves = tuple[list[float], dict[float, Curve]]
"""(ascending nodes, node -> curve over another size)"""


def _curves(points: Mapping[float, Mapping[float, float]]) -> Curves:
    return sorted(points), {node: curve(row) for node, row in points.items()}


def _plane(curves: Curves, x: float, y: float) -> float:
    """Return the bilinear value; below the first nodes theirs, above the last ones their slopes."""
    nodes, by_node = curves
    j, weight = bracket(nodes, max(x, nodes[0]))
    low = interpolate(by_node[nodes[j]], y)
    return low if not weight else low + (interpolate(by_node[nodes[j + 1]], y) - low) * weight


@dataclass
class AttentionTable:
    """Attention time of one layer by (prefill tokens, mean keys before the chunk, decode count, decode KV).

    A profile may lay two grids into each other: chunks of one with the KV of one. So chunks and keys are interpolated
    first, at each (count, KV) among the chunks that were measured there, and then KV and counts: time bends with KV
    where a cache no longer holds what heads share, and chunk by chunk most KV would be read off too coarse a grid. Over
    counts the bend is at as much KV in all, so that of the lines at equal KV and at equal KV in all the lower is
    nearer. Rows, a chunk and a count left out of an RTX PRO 6000's table are held to 1.5, 2 and 5 % by
    tests/oracle/test_vllm_run.py.

    Several short prompts in one chunk have fewer keys before them than one long prompt: less than none. Below the
    smallest measured keys each of so many equal prompts takes what a chunk of its length takes alone, all but the
    launch; what decoding adds stays.
    """

    decode: Curves
    """Decode count -> curve over KV."""
    alone: Curves
    """Prefill tokens -> curve over keys before, without decoding sequences."""
    beside: dict[float, tuple[list[float], dict[float, Curves]]]
    """Decode count -> (KV nodes, KV -> prefill tokens -> curve over keys before)."""

    @classmethod
    def read(cls, path: Path) -> AttentionTable:
        """Read ``attention.csv``; ``prefill_key`` (mean keys per query) and ``kv_prefill`` are both understood.

        Raises:
            MeasurementError: several kernels, or no times of decoding alone.
        """
        header = table_header(path)
        has_keys = "prefill_key" in header
        columns = [("prefill_chunk",), ("prefill_key", "kv_prefill"), ("n_decode",), ("kv_decode",), ("time_us",)]
        decode: dict[float, dict[float, float]] = defaultdict(dict)
        alone: dict[float, dict[float, float]] = defaultdict(dict)
        beside: dict[float, dict[float, dict[float, dict[float, float]]]] = defaultdict(
            lambda: defaultdict(lambda: defaultdict(dict))
        )
        extra = [name for name in ("decode_q_len", "layer") if name in header]
        columns.extend((name,) for name in extra)
        kernels: set[str] = set()
        for where, row in table_rows(path, columns):
            chunk, keys, count, kv, time = timed(where, row[:5])
            more = dict(zip(extra, row[5:], strict=True))
            if numbers(where, [more.get("decode_q_len") or "1"]) != [1]:
                continue
            kernels.add(more.get("layer", "attention"))
            before = keys - chunk / 2 if has_keys else keys
            if chunk == 0:
                decode[count][kv] = time
            elif count == 0:
                alone[chunk][before] = time
            else:
                beside[count][kv][chunk][before] = time
        if len(kernels) != 1 or not decode:
            raise MeasurementError(
                f"{path}: expected the times of one attention kernel, with rows of pure decode (prefill_chunk 0); got "
                f"{', '.join(sorted(kernels)) or 'no rows'}; models with several attention kernels are not covered"
            )
        if not alone or not beside:
            lacks = "n_decode above 0" if alone else "n_decode 0"
            raise MeasurementError(
                f"{path}: expected rows of prefill chunks alone (n_decode 0) and beside decoding sequences, such as "
                f"prefill_chunk 256, n_decode 0 and 8; got none with prefill_chunk above 0 and {lacks}; profile them"
            )
        mixed = {}
        for count, by_kv in beside.items():
            most = max(map(len, by_kv.values()))
            nodes = [kv for kv in sorted(by_kv) if NODE_SHARE * len(by_kv[kv]) >= most]
            mixed[count] = nodes, {kv: _curves(by_kv[kv]) for kv in nodes}
        return cls(_curves(decode), _curves(alone), mixed)

    def __post_init__(self) -> None:
        self.counts = [0.0, *sorted(self.beside)]

    def us(self, tokens: float, before: float, count: float, kv: float) -> float:
        """Return the attention time of one layer."""
        if tokens <= 0:
            return _plane(self.decode, count, kv) if count else 0.0
        tokens = max(tokens, self.alone[0][0])  # between no prefill at all and the smallest lies another kernel
        if not count:
            return _plane(self.alone, tokens, before) - self._saved(tokens, before)
        j, weight = bracket(self.counts, count)
        low, high, total = self.counts[j], self.counts[j + 1], count * kv
        time = self._line(low, kv, tokens, before)
        time += (self._line(high, kv, tokens, before) - time) * weight
        if low and weight < 1:  # beyond the counts nothing says which line is nearer
            same_total = self._line(low, total / low, tokens, before)
            same_total += (self._line(high, total / high, tokens, before) - same_total) * weight
            time = min(time, same_total)
        return time - self._saved(tokens, before)

    def _line(self, count: float, kv: float, tokens: float, before: float) -> float:
        """Return the time beside a measured count of sequences, or beside none."""
        if not count:
            return _plane(self.alone, tokens, before)
        nodes, by_kv = self.beside[count]
        # contexts that were measured with chunks of about this size
        near = [kv for kv in nodes if by_kv[kv][0][0] <= 2 * tokens and tokens <= 2 * by_kv[kv][0][-1]]
        nodes = near or nodes
        j, weight = bracket(nodes, max(kv, nodes[0]))
        low = _plane(by_kv[nodes[j]], tokens, before)
        return low if not weight else low + (_plane(by_kv[nodes[j + 1]], tokens, before) - low) * weight

    def _saved(self, tokens: float, before: float) -> float:
        """Return what several short prompts take less than one of so many tokens."""
        nodes = self.alone[0]
        j, weight = bracket(nodes, tokens)
        saved = [self._saved_of(chunk, before) for chunk in nodes[j : j + 2]]
        return saved[0] if not weight else saved[0] + (saved[1] - saved[0]) * weight

    def _saved_of(self, chunk: float, before: float) -> float:
        nodes, by_chunk = self.alone
        keys, times = by_chunk[chunk]
        if before >= keys[0]:
            return 0.0
        least = min(times[0], by_chunk[nodes[0]][1][0])
        prompt = max(2 * (before + chunk / 2), nodes[0])
        several = least + chunk / prompt * (_plane(self.alone, prompt, 0.0) - least)
        return max(times[0] - several, 0.0)


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
        for where, values in table_rows(path, [(name,) for name in (*names, "t_skew_us")]):
            cells = dict(zip(names, values, strict=False))
            if all(cells.get(name) for name in ("n", "pc", "t_mean_us", "t_max_us")):
                given = [*(cells[n] for n in ("n", "pc", "t_mean_us", "t_max_us")), values[-1]]
                rows.append(timed(where, given, num_times=3))
            elif cells.get("requests_json"):
                rows.append([*_controls(where, cells["requests_json"], attention), *timed(where, values[-1:])])
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


def _controls(where: str, requests: str, attention: AttentionTable) -> tuple[float, float, float, float]:
    """Return (decode count, prefill tokens, us at the mean context, us at the longest) of [[query, history], ...]."""
    try:
        pairs = [(int(query), float(past)) for query, past in json.loads(requests)]
        if any(query < 1 or not 0 <= past < inf for query, past in pairs):
            raise ValueError("a query below 1 or a history below 0")
    except (json.JSONDecodeError, TypeError, ValueError, OverflowError) as fault:
        raise MeasurementError(
            f"{where}: expected requests_json as [[query, history], ...], such as [[1, 512], [1, 4096]]; got {fault}"
        ) from None
    contexts = [past for query, past in pairs if query == 1] or [0]
    tokens = sum(query for query, _ in pairs if query > 1)
    keys = sum(query * (past + query / 2) for query, past in pairs if query > 1)
    before = keys / tokens - tokens / 2 if tokens else 0.0
    count = len(contexts)
    low, high = (attention.us(tokens, before, count, kv) for kv in (sum(contexts) / count, max(contexts)))
    return count, tokens, low, high
