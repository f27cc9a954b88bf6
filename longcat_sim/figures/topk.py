"""Figures of the top-k study, and the page that holds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from longcat_sim.figures.prediction import PALETTE
from longcat_sim.figures.report import Report

SHARING_NAMES = {"head": "a set per query head", "group": "a set per KV head", "all": "one set for all heads"}
DECODE_NAMES = {"dense": "all keys", "8": "top 8", "4": "top 4", "2": "top 2", "1": "top 1"}
MODEL_NAMES = {"base": "dense base", "dense_control": "dense control", "topk_sft": "top-k trained"}


def _series(figure: Any, x: Sequence[float], values: Sequence[Mapping], name: str, color: str, **more: Any) -> None:
    """Add means with their intervals as error bars."""
    mean = [v["mean"] for v in values]
    up = [0.0 if v.get("high") is None else v["high"] - v["mean"] for v in values]
    down = [0.0 if v.get("low") is None else v["mean"] - v["low"] for v in values]
    figure.add_scatter(
        x=x, y=mean, name=name, mode="lines+markers", marker={"color": color, "size": 7}, line={"color": color},
        error_y={"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 1}, **more,
    )  # fmt: skip


def _layout(figure: Any, title: str, x: str, y: str, **more: Any) -> Any:
    figure.update_layout(title=title, template="plotly_white", height=430, xaxis_title=x, yaxis_title=y, **more)
    return figure


def ratio_figure(study: Mapping, figure_name: str = "kl_nats", y: str = "KL to dense (nats)") -> Any:
    """Return quality against the share of keys kept, by who shares a set."""
    import plotly.graph_objects as go

    figure = go.Figure()
    context = min(row["context_tokens"] for row in study["fidelity"])
    for (sharing, name), color in zip(SHARING_NAMES.items(), PALETTE, strict=False):
        rows = [r for r in study["fidelity"] if r["family"] == "exact" and r["sharing"] == sharing]
        rows = sorted((r for r in rows if r["context_tokens"] == context), key=lambda r: r["ratio"])
        _series(figure, [100 * r["ratio"] for r in rows], [r[figure_name] for r in rows], name, color)
    figure.update_xaxes(type="log")
    if figure_name == "kl_nats":
        figure.update_yaxes(type="log")
    return _layout(figure, f"Exact top-k decoding, {context:,} tokens of context", "keys kept (% of the context)", y)


def precision_figure(study: Mapping) -> Any:
    """Return KL against the set precision under each miss rule, with trained and summary selectors beside."""
    import plotly.graph_objects as go

    figure = go.Figure()
    rows = [r for r in study["fidelity"] if r["family"] == "precision"]
    kept = rows[0]["kept"]
    for (miss, always, name), color in zip(
        (("random", 0, "random members missed"), ("lowest", 0, "lowest-scored members missed"),
         ("random", 1, "random missed, the best always kept")), PALETTE, strict=False,
    ):  # fmt: skip
        some = [r for r in rows if r["miss"] == miss and r["always_keep"] == always]
        some.sort(key=lambda r: r["set_precision"])
        _series(figure, [r["set_precision"] for r in some], [r["kl_nats"] for r in some], name, color)
    others = [r for r in study["fidelity"] if r["family"] in ("indexer", "blocks") and r["kept"] == kept]
    for row, color in zip(others, PALETTE[3:], strict=False):
        name = "lightning indexer, one set" if row["family"] == "indexer" else f"page {row['rule']}, set per KV head"
        _series(figure, [row["precision"]["mean"]], [row["kl_nats"]], name, color)
    figure.update_yaxes(type="log")
    return _layout(figure, f"Precision alone does not decide ({kept} keys kept)", "precision against per-head sets",
                   "KL to dense (nats)")  # fmt: skip


def entropy_figure(study: Mapping) -> Any:
    """Return dropped mass against entropy, a point per head of every layer, under the bound."""
    import math

    import plotly.graph_objects as go

    heads = study["heads"]
    layers = range(len(heads["entropy_nats"]))
    x = [v for layer in heads["entropy_nats"] for v in layer]
    figure = go.Figure()
    figure.add_scatter(
        x=x,
        y=[v for layer in heads["dropped"] for v in layer],
        mode="markers",
        marker={"color": [i for i in layers for _ in heads["entropy_nats"][i]], "colorscale": "Viridis", "size": 7,
                "colorbar": {"title": "layer"}},
        text=[f"layer {i}, head {h}" for i in layers for h in range(len(heads["entropy_nats"][i]))],
        name="head", showlegend=False,
    )  # fmt: skip
    top = max(x) * 1.05
    figure.add_scatter(x=[0, top], y=[0, top / math.log(heads["kept"] + 1)], mode="lines", name="bound H / ln(K + 1)",
                       line={"color": "#d1495b", "dash": "dash"})  # fmt: skip
    return _layout(figure, f"Low entropy caps what top-{heads['kept']} can drop", "attention entropy (nats)",
                   "probability dropped", legend={"x": 0.02, "y": 0.98})  # fmt: skip


def indexer_figure(study: Mapping) -> Any:
    """Return the indexers' precision against each exact set and their mass, by layer."""
    import plotly.graph_objects as go

    rows = study["indexer"]["by_layer"]
    figure = go.Figure()
    for (key, name, dash), color in zip(
        (("precision_against_head", "precision against per-head sets", None),
         ("precision_of_exact_shared", "the exact shared set's own precision", "dot"),
         ("precision_against_group", "precision against KV-head sets", None),
         ("precision_against_all", "precision against the shared set", None),
         ("mass", "mass kept", None), ("mass_of_exact_shared", "mass kept by the exact shared set", "dot")),
        (PALETTE[0], PALETTE[0], PALETTE[1], PALETTE[2], PALETTE[3], PALETTE[3]), strict=True,
    ):  # fmt: skip
        figure.add_scatter(x=list(range(len(rows))), y=[row[key] for row in rows], name=name, mode="lines+markers",
                           line={"color": color, "dash": dash}, marker={"size": 5})  # fmt: skip
    return _layout(figure, "Lightning indexers trained on the frozen model", "layer", "share")


def needle_figure(study: Mapping) -> Any:
    """Return the share of needles found by setting, with exact binomial intervals."""
    import plotly.graph_objects as go

    settings = study["needles"]["settings"]
    names = list(settings)
    mean = [settings[n]["mean"] for n in names]
    figure = go.Figure()
    figure.add_bar(
        x=names, y=mean, marker_color=PALETTE[0],
        error_y={"type": "data", "symmetric": False,
                 "array": [settings[n]["high"] - settings[n]["mean"] for n in names],
                 "arrayminus": [settings[n]["mean"] - settings[n]["low"] for n in names]},
    )  # fmt: skip
    trials = settings[names[0]]["trials"]
    return _layout(figure, f"Needles found, {trials} trials", "who shares a set, ratio kept", "share found")


def mismatch_figure(study: Mapping, pairs: str) -> Any:
    """Return accuracy by training and decoding: the mismatch matrix."""
    import plotly.graph_objects as go

    accuracy = study["recall"]["accuracy"]
    models = list(accuracy)
    decodes = list(accuracy[models[0]][pairs])
    cells = [[accuracy[m][pairs][d] for d in decodes] for m in models]

    def words(cell: Mapping) -> str:
        spread = "" if cell["low"] is None else f"<br>±{100 * (cell['high'] - cell['mean']):.1f}"
        return f"{100 * cell['mean']:.1f}%{spread}"

    figure = go.Figure(
        go.Heatmap(
            z=[[cell["mean"] for cell in row] for row in cells],
            x=[DECODE_NAMES.get(d, d) for d in decodes],
            y=[MODEL_NAMES.get(m, m) for m in models],
            text=[[words(cell) for cell in row] for row in cells],
            texttemplate="%{text}", colorscale="Blues", zmin=0.3, zmax=1.0, showscale=False,
        )
    )  # fmt: skip
    return _layout(figure, f"Recall of {pairs} pairs", "attention when tested", "trained as")


def price_figure(rows: Sequence[Mapping], crossover_tokens: float | None, title: str) -> Any:
    """Return seconds of a step against the context, dense beside sparse."""
    import plotly.graph_objects as go

    figure = go.Figure()
    x = [row["context_tokens"] for row in rows]
    for (key, name), color in zip((("dense_s", "dense"), ("sparse_s", "sparse")), PALETTE, strict=False):
        figure.add_scatter(x=x, y=[1e3 * row[key] for row in rows], name=name, mode="lines+markers",
                           line={"color": color})  # fmt: skip
    if crossover_tokens:
        figure.add_vline(x=crossover_tokens, line_dash="dot", annotation_text=f"crossover {crossover_tokens:,.0f}")
    figure.update_xaxes(type="log")
    figure.update_yaxes(type="log")
    return _layout(figure, title, "context (tokens)", "decode step (ms)")


def _cell(value: Mapping, digits: int = 3) -> str:
    span = "" if value.get("low") is None else f" [{value['low']:.{digits}f}, {value['high']:.{digits}f}]"
    return f"{value['mean']:.{digits}f}{span}"


def describe(row: Mapping) -> str:
    """Return a setting in words."""
    if row["family"] == "exact":
        return f"exact, {SHARING_NAMES[row['sharing']]}"
    if row["family"] == "precision":
        kept = ", the best always kept" if row["always_keep"] else ""
        return f"precision {row['set_precision']:g}, {row['miss']} missed{kept}"
    if row["family"] == "indexer":
        return "lightning indexer, one set for all heads"
    return f"page {row['rule']} of {row['page_tokens']} tokens, a set per KV head"


def study_page(study: Mapping) -> str:
    """Return the study as one self-contained HTML page."""
    page = Report("Top-k sparse attention: what holds on a small model")
    page.text(f"{study['model']}; text: {study['text']}. Intervals: {study['interval']}.", note=True)
    if study["quick"]:
        page.text("A quick run: every part is shrunk until it says little.", note=True)
    page.heading("The four claims")
    page.table(
        ("claim", "rule", "verdict", "evidence"),
        [(c["claim"], c["rule"], c["verdict"], c["evidence"]) for c in study["claims"]],
    )
    page.heading("Decoding a real model with fewer keys")
    page.figure(ratio_figure(study))
    page.figure(ratio_figure(study, "mass", "attention mass kept"))
    page.figure(precision_figure(study))
    page.table(
        ("context", "kept", "how", "KL (nats)", "loss change (nats)", "top-1 same", "mass", "output error",
         "precision"),
        [
            (f"{r['context_tokens']:,}", r["kept"], describe(r), _cell(r["kl_nats"]), _cell(r["nll_change_nats"]),
             _cell(r["top1_same"], 2), _cell(r["mass"]), _cell(r["output_error"]), _cell(r["precision"]))
            for r in study["fidelity"]
        ],
        numbers=(0, 1),
    )  # fmt: skip
    page.heading("Lightning indexer")
    page.figure(indexer_figure(study))
    page.heading("Entropy")
    page.figure(entropy_figure(study))
    page.heading("Needles")
    page.figure(needle_figure(study))
    page.heading("Native training on associative recall")
    for pairs in study["recall"]["accuracy"]["base"]:
        page.figure(mismatch_figure(study, pairs), height=330)
    entropies = study["recall"]["entropy_nats"]
    page.table(
        ("model", *(f"entropy, {p} pairs (nats)" for p in entropies["base"])),
        [(MODEL_NAMES[m], *(_cell(v) for v in by_pairs.values())) for m, by_pairs in entropies.items()],
    )
    page.heading("What it saves at which context (simulated)")
    for priced in study["price"]:
        lent = ", indexer of DeepSeek-V3.2 lent" if priced["is_indexer_lent"] else ""
        title = f"{priced['model']} on {priced['hardware']}{lent}, {priced['sequences_per_gpu']:g} sequences per GPU"
        page.figure(price_figure(priced["rows"], priced["crossover_tokens"], title))
    return page.html()
