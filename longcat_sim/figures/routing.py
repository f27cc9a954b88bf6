"""Routing in pictures: how many FFN experts a token gets when some of its choices are zero-computation experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from longcat_sim.figures.prediction import PALETTE
from longcat_sim.records.routing import RoutingTrace


def ffn_experts_figure(trace: RoutingTrace) -> Any:
    """Return the share of tokens by number of FFN experts, beside choices drawn blindly among all experts.

    Blind choices without repetition follow the hypergeometric law.
    """
    import plotly.graph_objects as go
    from scipy.stats import hypergeom

    counts = np.arange(trace.moe_topk + 1)
    chosen = trace.ffn_experts().ravel()
    shares = np.bincount(chosen, minlength=len(counts)) / chosen.size
    blind = hypergeom(trace.n_routed_experts + trace.zero_expert_num, trace.n_routed_experts, trace.moe_topk)
    figure = go.Figure()
    figure.add_bar(x=counts, y=100 * shares, name="recorded", marker={"color": PALETTE[0]})
    figure.add_scatter(
        x=counts, y=100 * blind.pmf(counts), name="blind choice", mode="lines+markers", line={"color": PALETTE[1]}
    )
    figure.update_layout(
        title=f"{chosen.mean():.2f} FFN experts a token on average, of {trace.moe_topk} choices",
        template="plotly_white", height=380, xaxis_title="FFN experts of a token", yaxis_title="% of tokens",
    )  # fmt: skip
    return figure
