"""A request while it is in the system, and the columns in which finished requests are kept."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from longcat_sim.records.request import RequestRecord, Status
from longcat_sim.simulation.serving.kv_cache import Chain, Run

STATUSES: tuple[Status | None, ...] = (None, "completed", "rejected", "failed")
COMPLETED, REJECTED, FAILED = 1, 2, 3
NEVER = -1


class Request:
    """One request in flight. Times are integer nanoseconds; ``NEVER`` until they happen."""

    __slots__ = (
        "arrival",
        "cached",
        "chain",
        "computed",
        "context",
        "cumulative",
        "done_at",
        "first",
        "generated",
        "hit_done",
        "id",
        "input",
        "inserted",
        "is_remote",
        "last",
        "load_done",
        "node",
        "output",
        "preemptions",
        "priority",
        "prompt",
        "queued",
        "retries",
        "scheduled",
        "segment",
        "session",
        "shared",
        "slo_class",
        "start_step",
        "tool",
        "turn",
    )

    def __init__(
        self, number: int, arrival: int, input_tokens: int, output_tokens: int, chain: Chain = (), priority: int = 0
    ) -> None:
        self.id = number
        self.arrival = arrival
        self.input = input_tokens
        self.output = output_tokens
        self.chain = chain
        self.priority = priority
        self.slo_class = 0
        self.session = NEVER
        self.turn = 0
        self.tool = False
        self.retries = 0
        self.preemptions = 0
        self.queued = arrival
        self.first = self.last = self.scheduled = NEVER
        self.cached = NEVER
        self.generated = 0
        self.cumulative: npt.NDArray[np.int64] | None = None
        """Tokens emitted after each decode step (drafts): index 0 is before the first."""
        self.reset()

    def reset(self) -> None:
        """Forget what a replica computed: after a preemption or a move."""
        self.prompt = self.input + self.generated
        """Tokens to prefill: after a preemption the generated ones too."""
        self.computed = 0
        self.inserted = 0
        """Keys of that segment."""
        self.context = 0
        """Tokens in KV when decode started, the one to be computed next included."""
        self.start_step = 0
        self.done_at = NEVER
        self.node: Run | None = None
        """Last pinned run of its chain."""
        self.shared = 0
        """Blocks that it holds in pinned runs."""
        self.is_remote = False
        """Its KV came from a prefill replica, so there is nothing to compute before decode."""
        self.segment = 0
        """Segment of the chain up to which keys are dealt with (hit, cached or duplicate)."""
        self.hit_done = 0
        """Leading blocks found on the device."""
        self.load_done = 0
        """Leading blocks there once a slower tier has brought its part."""

    def restart(self) -> None:
        """Begin from the prompt: the replica was lost, and what was streamed is void."""
        self.generated = 0
        self.first = self.last = NEVER
        self.retries += 1
        self.reset()


class Columns:
    """One array per field of the record, indexed by request number; records are made when looked at."""

    def __init__(self, class_names: tuple[str, ...], has_sessions: bool = False) -> None:
        self.class_names = class_names
        self.reasons: dict[int, str] = {}
        self.arrival = array("q")
        self.scheduled = array("q")
        self.first = array("q")
        self.last = array("q")
        self.input = array("i")
        self.output = array("i")
        self.cached = array("i")
        self.preemptions = array("H")
        self.retries = array("H")
        self.replica = array("h")
        self.decode_replica = array("h")
        self.status = array("b")
        self.slo_class = array("b")
        self.has_sessions = has_sessions
        self.session = array("i")
        self.turn = array("H")
        self.tool = array("b")

    def __len__(self) -> int:
        return len(self.arrival)

    def open(self, request: Request) -> None:
        """Append a row for a request that has just arrived."""
        self.arrival.append(request.arrival)
        self.scheduled.append(NEVER)
        self.first.append(NEVER)
        self.last.append(NEVER)
        self.input.append(request.input)
        self.output.append(0)
        self.cached.append(0)
        self.preemptions.append(0)
        self.retries.append(0)
        self.replica.append(NEVER)
        self.decode_replica.append(NEVER)
        self.status.append(0)
        self.slo_class.append(request.slo_class)
        if self.has_sessions:
            self.session.append(request.session)
            self.turn.append(request.turn)
            self.tool.append(request.tool)

    def close(self, request: Request, status: int, reason: str = "") -> None:
        """Fill the row of a request that has left."""
        at = request.id
        assert self.status[at] == 0, f"request {at} left twice"
        self.status[at] = status
        self.scheduled[at] = request.scheduled
        self.first[at] = request.first
        self.last[at] = request.last
        self.output[at] = request.generated
        self.cached[at] = request.cached if request.cached > 0 else 0
        if request.preemptions:
            self.preemptions[at] = request.preemptions
        if request.retries:
            self.retries[at] = request.retries
        if reason:
            self.reasons[at] = reason

    def numpy(self, name: str) -> npt.NDArray[Any]:
        """Return one column as an array that shares its memory [N]."""
        column: array = getattr(self, name)
        kinds = {"q": np.int64, "i": np.int32, "H": np.uint16, "h": np.int16, "b": np.int8}
        return np.frombuffer(column, dtype=kinds[column.typecode]) if len(column) else np.empty(0, np.int64)

    def __getitem__(self, at: int) -> RequestRecord:
        if at < 0:
            at += len(self)
        status = STATUSES[self.status[at]]
        assert status is not None, f"request {at} is still in flight"

        def seconds(value: int) -> float | None:
            return None if value == NEVER else value * 1e-9

        return RequestRecord(
            request=at,
            arrival_s=self.arrival[at] * 1e-9,
            input_tokens=self.input[at],
            output_tokens=self.output[at],
            status=status,
            reason=self.reasons.get(at, ""),
            scheduled_s=seconds(self.scheduled[at]),
            first_token_s=seconds(self.first[at]),
            last_token_s=seconds(self.last[at]),
            cached_tokens=self.cached[at],
            preemptions=self.preemptions[at],
            retries=self.retries[at],
            replica=self.replica[at],
            decode_replica=self.decode_replica[at],
            slo_class=self.class_names[self.slo_class[at]],
            session=self.session[at] if self.has_sessions else NEVER,
            turn=self.turn[at] if self.has_sessions else 0,
            is_tool_call=bool(self.tool[at]) if self.has_sessions else False,
        )

    def __iter__(self) -> Iterator[RequestRecord]:
        return (self[at] for at in range(len(self)))


class GapHistogram:
    """Times between tokens, pooled: exact sum and count, percentiles to 0.1 % (1,024 bins per doubling)."""

    def __init__(self) -> None:
        self.count = 0
        self.sum_ns = 0
        self.zero = 0
        self.bins = np.zeros(46 * 1024, dtype=np.int64)
        self.gaps: list[int] = []
        self.weights: list[int] = []
        self.runs: list[tuple[npt.NDArray[np.int64], int]] = []
        self.buffered = 0

    def flush(self) -> None:
        """Move the buffered gaps into the bins."""
        if self.gaps:
            self._count(np.array(self.gaps, dtype=np.int64), np.array(self.weights, dtype=np.int64))
        if self.runs:
            gaps = np.concatenate([run for run, _ in self.runs])
            self._count(gaps, np.repeat([w for _, w in self.runs], [len(run) for run, _ in self.runs]))
        self.gaps.clear()
        self.weights.clear()
        self.runs.clear()
        self.buffered = 0

    def _count(self, gaps: npt.NDArray[np.int64], weights: npt.NDArray[np.int64]) -> None:
        self.count += int(weights.sum())
        self.sum_ns += int((gaps * weights).sum())
        # the exponent and ten bits of the mantissa of the binary64 number
        at = (np.maximum(gaps, 1).astype(np.float64).view(np.int64) >> 42) - (1023 << 10)
        np.add.at(self.bins, np.minimum(at, len(self.bins) - 1), weights)

    def add_run(self, gaps: list[int] | npt.NDArray[np.int64], weight: int) -> None:
        """Add each gap ``weight`` times."""
        if type(gaps) is list:
            self.gaps += gaps
            self.weights += [weight] * len(gaps)
        else:
            self.runs.append((gaps, weight))  # type: ignore[arg-type]
        self.buffered += len(gaps)
        if self.buffered > 65536:
            self.flush()

    def add(self, gap: int, weight: int = 1) -> None:
        """Add one gap."""
        self.gaps.append(gap)
        self.weights.append(weight)
        self.buffered += 1

    def mean_s(self) -> float | None:
        """Return the mean gap, zero gaps of accepted drafts included."""
        self.flush()
        total = self.count + self.zero
        return self.sum_ns / total * 1e-9 if total else None

    def percentile_s(self, percent: float) -> float | None:
        """Return a percentile: the middle of its bin."""
        self.flush()
        total = self.count + self.zero
        if not total:
            return None
        rank = percent / 100 * total
        if rank <= self.zero:
            return 0.0
        at = int(np.searchsorted(np.cumsum(self.bins) + self.zero, rank))
        exponent, mantissa = divmod(at, 1024)
        return 2.0**exponent * (1 + (mantissa + 0.5) / 1024) * 1e-9
