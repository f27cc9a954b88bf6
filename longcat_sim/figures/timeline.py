"""Timelines: what each lane of each rank does during a layer or a step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from longcat_sim.records.span import Span

if TYPE_CHECKING:
    from longcat_sim.simulation.step import StepResult

# validated for adjacent colours: products, attention, experts, exchange, collectives of tensor parallelism, passes
COLORS: dict[str, str] = {
    "product": "#2a6f97",
    "attention": "#7b4f9d",
    "experts": "#edae49",
    "exchange": "#d1495b",
    "TP collective": "#c06e9b",
    "small op": "#8a94a3",
}
GROUPS: dict[str, str] = {
    "gemm": "product", "bmm": "product", "router": "product", "grouped_gemm": "experts", "permute": "experts",
    "mla_decode": "attention", "gqa_decode": "attention", "attention_prefill": "attention", "sparse_mla": "attention",
    "indexer": "attention", "topk": "attention", "dispatch": "exchange", "combine": "exchange",
    "all_gather": "TP collective", "reduce_scatter": "TP collective", "all_reduce": "TP collective",
}  # fmt: skip
MAX_BARS = 1000
"""Plotly stays fluid below this many bars."""


def timeline_figure(rows: Sequence[tuple[Span, str]], *, title: str) -> Any:
    """Return a figure of (span, group) rows: one line per rank and lane, one colour per group, hover with the times.

    Times are shown from the first span's start. Beyond ``MAX_BARS`` the shortest spans are left out, and the title
    says how many.
    """
    import plotly.graph_objects as go

    kept = sorted(rows, key=lambda row: -row[0].duration_s)[:MAX_BARS]
    left_out = len(rows) - len(kept)
    zero = min((span.start_s for span, _ in rows), default=0.0)
    lanes = sorted({(span.rank, span.lane) for span, _ in kept}, key=lambda at: (at[0], at[1] != "compute", at[1]))
    many = len({rank for rank, _ in lanes}) > 1
    label = {at: f"rank {at[0]} {at[1]}" if many else at[1] for at in lanes}
    figure = go.Figure()
    for group, color in COLORS.items():
        spans = [span for span, of in kept if of == group]
        if not spans:
            continue
        figure.add_bar(
            base=[(span.start_s - zero) * 1e6 for span in spans],
            x=[span.duration_s * 1e6 for span in spans],
            y=[label[span.rank, span.lane] for span in spans],
            orientation="h",
            name=group,
            marker={"color": color, "line": {"width": 0.5, "color": "white"}},
            customdata=[
                [span.name, (span.start_s - zero) * 1e6, (span.end_s - zero) * 1e6, span.tag] for span in spans
            ],
            hovertemplate="%{customdata[0]}<br>%{customdata[1]:.1f} to %{customdata[2]:.1f} µs (%{x:.1f} µs)"
            "<br>%{customdata[3]}<extra></extra>",
        )
    note = f" ({left_out} shortest left out)" if left_out else ""
    figure.update_layout(
        title=title + note, barmode="overlay", bargap=0.35, xaxis_title="time, µs", template="plotly_white",
        height=140 + 56 * len(lanes), legend={"orientation": "h", "y": -0.35},
        margin={"l": 10, "r": 10, "t": 48, "b": 8},
    )  # fmt: skip
    figure.update_yaxes(categoryorder="array", categoryarray=[label[at] for at in reversed(lanes)], automargin=True)
    return figure


def _rows(result: StepResult, ranks: Iterable[int], layers: set[int]) -> list[tuple[Span, str]]:
    """Return the spans of some ranks and layers with their groups."""
    program, line = result.timeline.program, result.timeline
    rows = []
    for i, item in enumerate(program.items):
        if item.layer not in layers:
            continue
        group = GROUPS.get(item.kind, "small op")
        for rank in ranks:
            span = Span(
                item.name, program.lanes[item.lane], float(line.start_s[i, rank]), float(line.end_s[i, rank]), rank,
                item.layer, item.tag,
            )  # fmt: skip
            if span.duration_s > 0:
                rows.append((span, group))
    return rows


def layer_timeline(result: StepResult, layer: int | None = None, ranks: Sequence[int] = (0,)) -> Any:
    """Return the timeline of one layer (a middle one by default), by rank."""
    chosen = result.middle_layer() if layer is None else layer
    overlap = result.scenario.deployment.overlap
    title = f"{result.scenario.model.name or 'layer'}: layer {chosen} under {overlap}"
    return timeline_figure(_rows(result, ranks, {chosen}), title=title)
