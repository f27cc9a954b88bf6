"""How long a step takes, in integer nanoseconds: the only thing that the engine knows about model and hardware.

A decode step has ``batch`` sequences whose contexts (KV tokens that are attended to, the new one included) sum to
``total_context``. A mixed step also prefills ``prefill_tokens`` whose queries attend to ``pairs`` keys in all
(a chunk of q tokens after s others: q s + q (q + 1) / 2).

Whatever is transcendental happens when a grid is built. A look-up uses +, - and x on binary64 and rounds half to
even, so that Python scalars and numpy arrays give the same nanoseconds.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@runtime_checkable
class StepTimes(Protocol):
    """Times of steps. ``is_detailed`` objects see every sequence and are asked for one step at a time."""

    is_detailed: bool

    def decode_ns(self, batch: int, total_context: int) -> int:
        """Return the time of one decode step."""
        ...

    def decode_run_ns(self, batch: int, total_context: int, num_steps: int) -> list[int] | IntArray:
        """Return the times of ``num_steps`` decode steps in which every sequence grows by one token."""
        ...

    def decode_many_ns(self, batch: int, total_contexts: IntArray) -> IntArray:
        """Return the times of decode steps of one batch [N]."""
        ...

    def mixed_ns(self, batch: int, total_context: int, prefill_tokens: int, pairs: int) -> int:
        """Return the time of a step with prefill, and with decode where ``batch`` > 0."""
        ...

    def is_outside(self, batch: int, total_context: int, prefill_tokens: int) -> bool:
        """Whether the step lies outside what was evaluated, so that its time is extrapolated; then a step of more
        context does too."""
        ...


class DetailedStepTimes(Protocol):
    """Times that depend on every sequence: the recorded-run check uses it."""

    is_detailed: bool

    def step_ns(self, contexts: Sequence[int], chunks: Sequence[tuple[int, int]]) -> int:
        """Return the time of a step that decodes ``contexts`` and prefills ``chunks`` of (tokens, tokens before)."""
        ...


def steps_outside(times: StepTimes, batch: int, total_after: Callable[[int], int], steps: int) -> int:
    """Return how many of the next ``steps`` decode steps lie outside the grid: from the first one that does on, all.

    ``total_after(n)`` is the total context after n steps.
    """
    if not times.is_outside(batch, total_after(steps - 1), 0):
        return 0
    return steps - bisect_left(range(steps), True, key=lambda n: times.is_outside(batch, total_after(n), 0))


StepFunction = Callable[[FloatArray, FloatArray, FloatArray, FloatArray], FloatArray]
"""(decode batch, mean decode context, prefill tokens, mean keys per prefill query) -> seconds, all arrays [N].

A first chunk of p tokens has (p + 1) / 2 keys per query, one after s others s + (p + 1) / 2; fewer keys than
(p + 1) / 2 means several short prompts. ``f`` may return [Q, N], one row per quantile.
"""

SCALAR_STEPS = 24
"""Runs shorter than this are computed on Python numbers, longer ones on arrays (measured: equal near 24)."""


def geometric_nodes(first: int, last: int, per_octave: int = 2) -> list[int]:
    """Return integers from ``first`` to ``last``, about ``per_octave`` in each doubling."""
    num = max(2, round(np.log2(max(last, first + 1) / first) * per_octave) + 1)
    return sorted({round(x) for x in np.geomspace(first, last, num)} | {first, last})


@dataclass
class StepTimeGrid:
    """A precomputed grid of step times with one multilinear look-up. Build it with ``from_function``.

    Between nodes it is linear in batch, total context, prefill tokens and keys; beyond the last node it goes on with
    the last slope, and ``is_outside`` says so.
    """

    batch_nodes: list[int]
    context_nodes: list[int]
    prefill_nodes: list[int]
    key_nodes: list[int]
    decode_s: FloatArray
    """[Q, B, C]"""
    mixed_s: FloatArray
    """[Q, 1 + B, C, P, K]; row 0 has no decode."""
    quantiles: tuple[float, ...] = (0.5,)
    quantile: int = 0
    """Row of ``quantiles`` that look-ups use."""
    interpolation_error: float = 0.0
    """95th percentile of the relative error half-way between nodes, measured when the grid was built."""
    is_detailed: bool = False
    _rows: dict[int, tuple[list[float], list[float], list[float]]] = field(default_factory=dict, repr=False)
    _arrays: dict[int, tuple[FloatArray, ...]] = field(default_factory=dict, repr=False)
    _mixed: list = field(default_factory=list, repr=False)

    @classmethod
    def from_function(
        cls,
        f: StepFunction,
        *,
        max_batch: int,
        max_context: int,
        max_prefill_tokens: int,
        batch_nodes: Sequence[int] | None = None,
        context_nodes: Sequence[int] | None = None,
        prefill_nodes: Sequence[int] | None = None,
        key_nodes: Sequence[int] | None = None,
        quantiles: Sequence[float] = (0.5,),
        error_points: int = 64,
    ) -> StepTimeGrid:
        """Evaluate ``f`` on all nodes (arrays of all points at once) and measure the interpolation error.

        Raises:
            ValueError: ``f`` gives a time that is not above 0.
        """
        batches = list(batch_nodes or geometric_nodes(1, max_batch, 2))
        contexts = list(context_nodes or geometric_nodes(min(128, max_context), max_context, 1))
        prefills = list(prefill_nodes or geometric_nodes(min(16, max_prefill_tokens), max_prefill_tokens, 1))
        keys = list(key_nodes or geometric_nodes(min(64, max_context), max_context, 1))
        mixed_batches = [0, *batches[:: max(1, len(batches) // 6)]]
        if mixed_batches[-1] != batches[-1]:
            mixed_batches.append(batches[-1])
        b, c = (x.ravel().astype(float) for x in np.meshgrid(batches, contexts, indexing="ij"))
        axes = np.meshgrid(mixed_batches, contexts, prefills, keys, indexing="ij")
        mb, mc, mp, mk = (x.ravel().astype(float) for x in axes)
        num_quantiles = len(quantiles)

        def call(*args: FloatArray) -> FloatArray:
            values = np.asarray(f(*args), dtype=float)
            return np.broadcast_to(values, (num_quantiles, len(args[0]))) if values.ndim == 1 else values

        zero = np.zeros_like(b)
        decode = call(b, c, zero, zero).reshape(num_quantiles, len(batches), len(contexts))
        mixed = call(mb, np.where(mb > 0, mc, 0.0), mp, mk).reshape(num_quantiles, *axes[0].shape)
        for values in (decode, mixed):
            if not (np.isfinite(values) & (values > 0)).all():
                raise ValueError(f"step times must be above 0 s; got {values[~(values > 0)][:3]}; mend the function")
        grid = cls(batches, contexts, prefills, keys, decode, mixed, tuple(quantiles))
        grid._mixed_batches = mixed_batches
        if error_points:
            grid.interpolation_error = grid._measure_error(call, error_points)
        return grid

    _mixed_batches: list[int] = field(default_factory=list, repr=False)

    def _measure_error(self, call: Callable[..., FloatArray], points: int) -> float:
        draw = np.random.Generator(np.random.Philox(key=[1, 2]))

        def middles(nodes: Sequence[int]) -> FloatArray:
            if len(nodes) == 1:
                return np.full(points, float(nodes[0]))
            at = draw.integers(0, len(nodes) - 1, points)
            return np.floor((np.asarray(nodes)[at] + np.asarray(nodes)[at + 1]) / 2.0)

        b, c, p = middles(self.batch_nodes), middles(self.context_nodes), middles(self.prefill_nodes)
        k = middles(self.key_nodes)
        row = self.quantile
        zero = np.zeros(points)
        truth = np.concatenate([call(b, c, zero, zero)[row], call(b, c, p, k)[row]])
        ours = [self.decode_ns(int(x), int(x * y)) for x, y in zip(b, c, strict=True)]
        ours += [self.mixed_ns(int(x), int(x * y), int(z), int(z * w)) for x, y, z, w in zip(b, c, p, k, strict=True)]
        return float(np.quantile(np.abs(np.array(ours) * 1e-9 / truth - 1), 0.95))

    def at_quantile(self, quantile: float) -> StepTimeGrid:
        """Return the grid whose look-ups use the stored quantile nearest to ``quantile``."""
        row = min(range(len(self.quantiles)), key=lambda i: abs(self.quantiles[i] - quantile))
        grid = replace(self, quantile=row, _rows={}, _arrays={}, _mixed=[])
        return grid

    def scaled(self, factor: float) -> StepTimeGrid:
        """Return the grid with all times multiplied: one draw of a common error."""
        decode_s, mixed_s = self.decode_s * factor, self.mixed_s * factor
        return replace(self, decode_s=decode_s, mixed_s=mixed_s, _rows={}, _arrays={}, _mixed=[])

    # -- decode ---------------------------------------------------------------------------------------------------
    def _row(self, batch: int) -> tuple[list[float], list[float], list[float]]:
        """Return (nodes in total context, nanoseconds there, nanoseconds per token) of one batch."""
        row = self._rows.get(batch)
        if row is None:
            nodes = self.batch_nodes
            table = self.decode_s[self.quantile] * 1e9
            if len(nodes) == 1:
                values = table[0]
            else:
                j = min(max(bisect_right(nodes, batch) - 1, 0), len(nodes) - 2)
                values = table[j] + (table[j + 1] - table[j]) * ((batch - nodes[j]) / (nodes[j + 1] - nodes[j]))
            at = [float(batch * c) for c in self.context_nodes]
            slopes = list(np.diff(values) / np.diff(at)) if len(at) > 1 else [0.0]
            row = (at[: len(slopes)], [float(v) for v in values[: len(slopes)]], [float(s) for s in slopes])
            self._rows[batch] = row
        return row

    def decode_ns(self, batch: int, total_context: int) -> int:
        """Return the time of one decode step."""
        at, base, slope = self._row(batch)
        j = bisect_right(at, total_context) - 1
        if j < 0:
            j = 0
        return round(base[j] + slope[j] * (total_context - at[j]))

    def decode_run_ns(self, batch: int, total_context: int, num_steps: int) -> list[int] | IntArray:
        """Return the times of ``num_steps`` decode steps in which every sequence grows by one token."""
        at, base, slope = self._row(batch)
        j = bisect_right(at, total_context) - 1
        if j < 0:
            j = 0
        last = total_context + batch * (num_steps - 1)
        if j + 1 >= len(at) or last < at[j + 1]:
            a, s = base[j], slope[j]
            x = total_context - at[j]
            if num_steps < SCALAR_STEPS:
                if num_steps == 1:
                    return [round(a + s * x)]
                return [round(a + s * (x + y)) for y in range(0, batch * num_steps, batch)]
            ns = np.arange(x, x + batch * num_steps, batch)
            ns *= s
            ns += a
            return np.rint(ns, ns).astype(np.int64)
        if num_steps < SCALAR_STEPS:
            return [self.decode_ns(batch, y) for y in range(total_context, last + 1, batch)]
        return self.decode_many_ns(batch, np.arange(total_context, last + 1, batch))

    def decode_many_ns(self, batch: int, total_contexts: IntArray) -> IntArray:
        """Return the times of decode steps of one batch [N]."""
        arrays = self._arrays.get(batch)
        if arrays is None:
            arrays = self._arrays[batch] = tuple(np.array(x) for x in self._row(batch))
        at, base, slope = arrays
        j = np.maximum(np.searchsorted(at, total_contexts, side="right") - 1, 0)
        return np.rint(base[j] + slope[j] * (total_contexts - at[j])).astype(np.int64)

    # -- mixed ----------------------------------------------------------------------------------------------------
    def _build_mixed(self) -> list:
        batches = self._mixed_batches
        if len(batches) < 2 or len(self.context_nodes) < 2 or len(self.prefill_nodes) < 2 or len(self.key_nodes) < 2:
            raise ValueError("a step-time grid needs two nodes at least on every axis of its mixed part")
        inverse = [
            [1.0 / (y - x) for x, y in itertools.pairwise(nodes)]
            for nodes in (batches, self.context_nodes, self.prefill_nodes, self.key_nodes)
        ]
        top = max(self.prefill_nodes[-1], batches[-1]) * 2 + 2
        reciprocal = [0.0, *[1.0 / n for n in range(1, top)]]
        self._mixed = [batches, inverse, reciprocal, (self.mixed_s[self.quantile] * 1e9).tolist()]
        return self._mixed

    def mixed_ns(self, batch: int, total_context: int, prefill_tokens: int, pairs: float) -> int:
        """Return the time of a step with prefill, and with decode where ``batch`` > 0."""
        batches, (ib, ic, ip, ik), reciprocal, table = self._mixed or self._build_mixed()
        if prefill_tokens >= len(reciprocal) or batch >= len(reciprocal):
            reciprocal.extend(1.0 / n for n in range(len(reciprocal), max(prefill_tokens, batch) + 1))
        nodes = self.prefill_nodes
        j = bisect_right(nodes, prefill_tokens) - 1
        p = 0 if j < 0 else j if j < len(ip) else len(ip) - 1
        wp = (prefill_tokens - nodes[p]) * ip[p]
        keys = pairs * reciprocal[prefill_tokens]
        nodes = self.key_nodes
        j = bisect_right(nodes, keys) - 1
        k = 0 if j < 0 else j if j < len(ik) else len(ik) - 1
        wk = (keys - nodes[k]) * ik[k]
        j = bisect_right(batches, batch) - 1
        b = j if j < len(ib) else len(ib) - 1
        wb = (batch - batches[b]) * ib[b]
        mean = total_context * reciprocal[batch]
        nodes = self.context_nodes
        j = bisect_right(nodes, mean) - 1
        c = 0 if j < 0 else j if j < len(ic) else len(ic) - 1
        wc = (mean - nodes[c]) * ic[c]
        q, n, d = p + 1, k + 1, c + 1
        # linear along keys, then prefill tokens, then context, then batch; written out because it is called so often
        rows = table[b]
        plane = rows[c]
        x, y = plane[p], plane[q]
        u = x[k] + (x[n] - x[k]) * wk
        near = u + (y[k] + (y[n] - y[k]) * wk - u) * wp
        plane = rows[d]
        x, y = plane[p], plane[q]
        u = x[k] + (x[n] - x[k]) * wk
        near += (u + (y[k] + (y[n] - y[k]) * wk - u) * wp - near) * wc
        if wb:
            rows = table[b + 1]
            plane = rows[c]
            x, y = plane[p], plane[q]
            u = x[k] + (x[n] - x[k]) * wk
            far = u + (y[k] + (y[n] - y[k]) * wk - u) * wp
            plane = rows[d]
            x, y = plane[p], plane[q]
            u = x[k] + (x[n] - x[k]) * wk
            far += (u + (y[k] + (y[n] - y[k]) * wk - u) * wp - far) * wc
            near += (far - near) * wb
        ns = round(near)
        return ns if ns > 0 else 1

    def is_outside(self, batch: int, total_context: int, prefill_tokens: int) -> bool:
        """Whether the step lies outside the nodes."""
        return (
            batch > self.batch_nodes[-1]
            or total_context > batch * self.context_nodes[-1]
            or prefill_tokens > self.prefill_nodes[-1]
        )


@dataclass(frozen=True)
class LinearStepTimes:
    """Step time = ``fixed_ns`` + ``per_sequence_ns`` x batch + ``per_prefill_token_ns`` x tokens, all integers.

    The degenerate engine of queueing theory: ``fixed_ns`` alone makes every sequence a server of its own (M/M/c with
    ``max_num_seqs`` c); ``per_sequence_ns`` alone shares one processor among all (processor sharing).
    """

    fixed_ns: int = 0
    per_sequence_ns: int = 0
    per_prefill_token_ns: int = 0
    is_detailed: bool = False

    def decode_ns(self, batch: int, total_context: int) -> int:
        """Return the time of one decode step."""
        return self.fixed_ns + self.per_sequence_ns * batch

    def decode_run_ns(self, batch: int, total_context: int, num_steps: int) -> list[int] | IntArray:
        """Return equal times."""
        return np.full(num_steps, self.decode_ns(batch, total_context), dtype=np.int64)

    def decode_many_ns(self, batch: int, total_contexts: IntArray) -> IntArray:
        """Return equal times [N]."""
        return np.full(len(total_contexts), self.decode_ns(batch, 0), dtype=np.int64)

    def mixed_ns(self, batch: int, total_context: int, prefill_tokens: int, pairs: int) -> int:
        """Return the time of a step with prefill."""
        return max(1, self.decode_ns(batch, total_context) + self.per_prefill_token_ns * prefill_tokens)

    def is_outside(self, batch: int, total_context: int, prefill_tokens: int) -> bool:
        """Return False: the law holds everywhere."""
        return False
