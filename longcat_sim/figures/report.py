"""A self-contained HTML report: tables and figures in one file, with plotly.js inside."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2733; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #d8dee6; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 0.92rem; }
th, td { padding: 0.3rem 0.6rem; border-bottom: 1px solid #e6eaef; text-align: left; vertical-align: top; }
td.number, th.number { text-align: right; white-space: nowrap; } td.bad { color: #b3261e; } td.good { color: #1b6e3c; }
p.note { color: #55606e; }
"""


@dataclass
class Report:
    """A page under construction: add parts in reading order, then ``html()``."""

    title: str
    parts: list[str] = field(default_factory=list)
    has_figure: bool = False

    def text(self, paragraph: str, *, note: bool = False) -> None:
        """Add a paragraph."""
        kind = ' class="note"' if note else ""
        self.parts.append(f"<p{kind}>{html.escape(paragraph)}</p>")

    def heading(self, words: str) -> None:
        """Add a section heading."""
        self.parts.append(f"<h2>{html.escape(words)}</h2>")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[Any]], numbers: Sequence[int] = ()) -> None:
        """Add a table; ``numbers`` are the indices of right-aligned columns."""
        numeric = set(numbers)
        head = "".join(
            f"<th{' class=number' if i in numeric else ''}>{html.escape(c)}</th>" for i, c in enumerate(columns)
        )
        body = "".join(
            "<tr>"
            + "".join(
                f"<td{' class=number' if i in numeric else ''}>{html.escape(str(cell))}</td>"
                for i, cell in enumerate(row)
            )
            + "</tr>"
            for row in rows
        )
        self.parts.append(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>")

    def figure(self, figure: Any, height: int = 420) -> None:
        """Add a plotly figure; the first one brings plotly.js along."""
        import plotly.io

        self.parts.append(
            plotly.io.to_html(
                figure,
                include_plotlyjs=not self.has_figure,
                full_html=False,
                default_height=f"{height}px",
                config={"displaylogo": False},
            )
        )
        self.has_figure = True

    def html(self) -> str:
        """Return the page."""
        return (
            f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(self.title)}</title>'
            f"<style>{STYLE}</style></head><body><h1>{html.escape(self.title)}</h1>{''.join(self.parts)}</body></html>"
        )
