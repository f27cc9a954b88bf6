"""``Span``: one occupied interval of one lane of one rank, simulated or measured; Chrome-trace export."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """An op or a segment that held a lane from ``start_s`` to ``end_s``."""

    name: str
    lane: str
    start_s: float
    end_s: float
    rank: int = 0
    layer: int = 0
    tag: str = "measured"

    @property
    def duration_s(self) -> float:
        """Length of the interval."""
        return self.end_s - self.start_s


def busy_s(spans: Iterable[Span]) -> float:
    """Return the length of the union of the spans' intervals."""
    total, reach = 0.0, float("-inf")
    for span in sorted(spans, key=lambda s: s.start_s):
        if span.end_s > reach:
            total += span.end_s - max(span.start_s, reach)
            reach = span.end_s
    return total


EXCHANGE_CHAIN = ("dispatch", "experts", "combine")
"""Spans whose names start so, one after the other, are joined by arrows."""


def _flows(spans: Iterable[Span], tracks: dict[tuple[int, str], int]) -> list[dict]:
    """Return arrows from each rank's dispatch to its experts and on to its combine, layer by layer."""
    events: list[dict] = []
    open_from: dict[int, tuple[int, Span]] = {}
    for span in sorted(spans, key=lambda s: (s.rank, s.start_s)):
        place = next((i for i, name in enumerate(EXCHANGE_CHAIN) if span.name.startswith(name)), None)
        if place is None:
            continue
        before = open_from.get(span.rank)
        if before is not None and before[0] + 1 == place:
            source = before[1]
            common = {"name": "exchange", "cat": "exchange", "pid": span.rank, "id": len(events)}
            end_us = source.end_s * 1e6
            events.append({**common, "ph": "s", "tid": tracks[source.rank, source.lane], "ts": end_us})
            events.append(
                {**common, "ph": "f", "bp": "e", "tid": tracks[span.rank, span.lane], "ts": span.start_s * 1e6}
            )
        if before is None or place != before[0] or place == 1:
            open_from[span.rank] = (place, span)
    return events


def chrome_trace(spans: Iterable[Span]) -> dict:
    """Return the spans as a Chrome trace document (opens in Perfetto): one process per rank, one track per lane,
    arrows from dispatch to experts to combine."""
    spans = list(spans)
    events: list[dict] = []
    tracks: dict[tuple[int, str], int] = {}
    for span in spans:
        if (span.rank, span.lane) not in tracks:
            tracks[span.rank, span.lane] = sum(1 for rank, _ in tracks if rank == span.rank)
        events.append(
            {
                "name": span.name,
                "cat": span.lane,
                "ph": "X",
                "pid": span.rank,
                "tid": tracks[span.rank, span.lane],
                "ts": span.start_s * 1e6,
                "dur": span.duration_s * 1e6,
                "args": {"layer": span.layer, "tag": span.tag},
            }
        )
    names = [
        {"name": "thread_name", "ph": "M", "pid": rank, "tid": track, "args": {"name": lane}}
        for (rank, lane), track in tracks.items()
    ]
    ranks = [
        {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}}
        for rank in sorted({rank for rank, _ in tracks})
    ]
    return {"traceEvents": ranks + names + events + _flows(spans, tracks), "displayTimeUnit": "ms"}
