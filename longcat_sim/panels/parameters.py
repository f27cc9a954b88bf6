"""What one token costs a model: parameters held and used, by part, while its number of FFN experts moves."""

from __future__ import annotations

from typing import Any

from longcat_sim.panels.base import Control, Panel
from longcat_sim.specs.model import ModelSpec

NAMES = {
    "embedding": "embedding", "attention": "attention", "dense_ffn": "dense FFN", "experts": "FFN experts",
    "shared_experts": "shared experts", "router": "router", "norms": "norms", "head": "output head",
}  # fmt: skip
LEAST_SHARE = 1e-3
"""Parts smaller than this share of the model are not drawn."""


class ParametersPanel(Panel):
    """Bars of held and used parameters (billions, logarithmic), and a sentence with FLOP and KV cache."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        whole = spec.num_parameters
        self.parts = {part: n for part, n in spec.parameters_by_part.items() if n > LEAST_SHARE * whole}
        controls = [Control("context_tokens", "context, tokens", 5000.0, 128.0, 131072.0, is_log=True)]
        if spec.n_routed_experts:
            most = float(spec.moe_topk)
            controls.insert(
                0, Control("ffn_experts", "FFN experts of a token", spec.expected_ffn_experts, 0.0, most, 0.5)
            )
        super().__init__(controls)

    def _build(self) -> Any:
        import plotly.graph_objects as go

        figure = go.Figure()
        names = [NAMES[part] for part in self.parts]
        figure.add_bar(
            x=names, y=[n / 1e9 for n in self.parts.values()], name="held", marker={"color": "#c3cad3"},
            hovertemplate="%{x}: %{y:.4g} B held<extra></extra>",
        )  # fmt: skip
        figure.add_bar(
            x=names, y=[], name="used by one token", marker={"color": "#2a6f97"},
            hovertemplate="%{x}: %{y:.4g} B used<extra></extra>",
        )  # fmt: skip
        figure.update_layout(
            height=380, barmode="group", margin={"l": 10, "r": 10, "t": 30, "b": 8},
            yaxis={"title": "billion parameters", "type": "log"},
        )  # fmt: skip
        return figure

    def used(self) -> dict[str, float]:
        """Return the parameters of each drawn part that one token uses."""
        spec, held = self.spec, dict(self.parts)
        used: dict[str, float] = {part: float(n) for part, n in held.items() if part != "embedding"}
        if "experts" in used:
            used["experts"] = spec.num_moe_layers * self.values["ffn_experts"] * spec.expert_parameters
        return used

    def _update(self) -> None:
        spec, chosen = self.spec, self.values.get("ffn_experts")
        used = self.used()
        self.figure.data[1].y = [used.get(part, 0.0) / 1e9 or None for part in self.parts]
        active = spec.num_active_parameters(chosen)
        context = self.values["context_tokens"]
        flop = sum(spec.flop_per_token(context, ffn_experts=chosen).values())
        cache = spec.kv_bytes_per_token() * context
        self.text = (
            f"{active / 1e9:.2f} B of {spec.num_parameters / 1e9:.2f} B parameters used; {flop / 1e9:.0f} GFLOP a "
            f"token and {cache / 1e9:.2g} GB of bf16 cache at {context:,.0f} tokens of context"
        )
