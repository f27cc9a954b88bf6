"""``Traffic``: what screening needs of a workload: its rate and the means that a fluid model works with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np

from longcat_sim.errors import CapacityError
from longcat_sim.ops.op import FloatArray
from longcat_sim.simulation.serving.synthetic import Synthetic
from longcat_sim.simulation.serving.workload import TraceReader
from longcat_sim.specs.scenario import Scenario
from longcat_sim.specs.serve import Serve

SAMPLE = 4096
"""Requests that the means are taken over."""


@dataclass(frozen=True)
class Traffic:
    """Means of a workload. Prefix hits across sessions are not foreseen: only a session's own context is cached."""

    requests_per_s: float
    input_tokens: float
    """Per request, cached ones included."""
    computed_tokens: float
    """Prompt tokens per request that no earlier turn of its session left in the cache."""
    output_tokens: float
    decode_context: float
    """Mean context that an output token attends to."""
    prompt_keys: float
    """Mean positions that a computed prompt token attends to."""
    inputs: FloatArray = field(repr=False, default_factory=lambda: np.empty(0))
    computed: FloatArray = field(repr=False, default_factory=lambda: np.empty(0))
    """Per request, as ``computed_tokens``; both in order of arrival."""

    @classmethod
    def of(cls, scenario: Scenario) -> Traffic:
        """Return the means of the scenario's workload.

        Raises:
            CapacityError: a workload without a rate (a closed loop), or without requests.
        """
        serve = scenario.serve
        assert serve is not None
        arrivals = serve.workload.arrivals
        if arrivals is not None and arrivals.process == "closed_loop":
            raise CapacityError(
                f"{scenario.where}: serve.workload.arrivals: expected a process with a rate, such as {{process: "
                "poisson, rate: 8 /s}; a closed loop sends as fast as it is answered; give a rate"
            )
        rows = list(islice(_requests(serve, scenario.seed), SAMPLE))
        if len(rows) < 2:
            raise CapacityError(
                f"{scenario.where}: serve.workload: expected requests; got {len(rows)}; check the trace"
            )
        time, inputs, before, outputs = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
        computed = np.maximum(inputs - before, 1.0)
        if arrivals is not None and arrivals.rate is not None:
            sessions = max(1, int((before == 0).sum()))
            rate = arrivals.rate * len(rows) / sessions if serve.workload.sessions else arrivals.rate
        else:
            rate = (len(rows) - 1) / max((time.max() - time.min()) * 1e-9, 1e-9)
        return cls(
            rate, float(inputs.mean()), float(computed.mean()), float(outputs.mean()),
            float((outputs * (inputs + outputs / 2)).sum() / outputs.sum()),
            float((computed * (before + (computed + 1) / 2)).sum() / computed.sum()), inputs, computed,
        )  # fmt: skip


def _requests(serve: Serve, seed: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (arrival, input, input that an earlier turn left in the cache, output), a session's turns in a row."""
    source: Any = TraceReader(serve) if serve.workload.trace is not None else Synthetic(serve, seed)
    for request in source:
        before = 0
        while request is not None:
            yield request.arrival, request.input, min(before, request.input - 1), request.output
            before = request.input + request.output
            follow = getattr(source, "follow_up", None) if serve.workload.sessions else None
            request = follow(request, request.arrival, True) if follow else None
