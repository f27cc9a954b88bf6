"""Expert layers measured in parts for one data- and expert-parallel deployment (``tp<N>/moe_components.json``).

Gate and finalisation see a rank's own rows, the experts the rows gathered from all ranks; each part was measured in
CUDA graphs and eagerly. Source: LLMServingSim documentation, native MoE components (format).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from longcat_sim.calibration.profile_tables import Curve, CurveFamily, curve, interpolate, numbers, table_rows, timed
from longcat_sim.errors import MeasurementError

LOCAL = ("gate_routing", "finalize_copy")


@dataclass(frozen=True)
class MoeComponents:
    """Parts of one expert layer on one rank, by mode (``graph`` or ``eager``)."""

    local: dict[str, list[Curve]]
    experts: dict[str, CurveFamily]
    """Over active experts, by gathered rows."""

    def us(self, rows: Sequence[int], active: float, is_graph: bool) -> float:
        """Return the time of one expert layer, collectives apart, on the rank with most rows of its own."""
        mode = (
            "graph"
            if is_graph and "graph" in self.experts
            else next(m for m in ("eager", "graph") if m in self.experts)
        )
        own = max(rows)
        return sum(interpolate(curve, own) for curve in self.local[mode]) + self.experts[mode].at(active, sum(rows))


def read_components(folder: Path, tp_size: int, dp_size: int) -> MoeComponents | None:
    """Return the parts measured for this deployment with full expert parallelism; none where there are none.

    Raises:
        MeasurementError: the index names a table that cannot be read.
    """
    index = folder / "moe_components.json"
    if not index.is_file():
        return None
    try:
        entries = json.loads(index.read_text(encoding="utf-8"))["entries"]
        wanted = {"tp": tp_size, "dp": dp_size, "ep": tp_size * dp_size}
        paths = [str(e["path"]) for e in entries if all(e["target"].get(key) == size for key, size in wanted.items())]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as fault:
        raise MeasurementError(
            f"{index}: expected {{entries: [{{target: {{tp: 1, dp: 2, ep: 2}}, path: ...}}]}}; got {fault!r}; mend it"
        ) from None
    if not paths:
        return None
    path = folder / paths[0] / "components.csv"
    local: dict[str, dict[str, dict[float, float]]] = defaultdict(lambda: defaultdict(dict))
    surface: dict[str, dict[float, dict[float, float]]] = defaultdict(lambda: defaultdict(dict))
    columns = [(name,) for name in ("component", "mode", "tokens", "activated_experts", "time_us")]
    for where, (part, mode, rows, experts, us) in table_rows(path, columns):
        (tokens, time), (active,) = timed(where, [rows, us]), numbers(where, [experts])  # active -1: says nothing
        if part in LOCAL:
            local[mode][part][tokens] = time
        elif part == "experts" and active > 0:
            surface[mode][active][tokens] = time
    unknown = sorted({*surface, *local} - {"graph", "eager"})
    lacking = [f"{part} ({mode})" for mode in surface for part in LOCAL if part not in local[mode]]
    if unknown or lacking:
        raise MeasurementError(
            f"{path}: expected the components {', '.join(LOCAL)} and experts, each in mode graph or eager; got "
            f"{'mode ' + unknown[0] if unknown else 'no ' + lacking[0]}; measure them or remove it"
        )
    if not surface:
        raise MeasurementError(f"{path}: expected rows of the component experts; got none; measure them or remove it")
    return MoeComponents(
        {m: [curve(points) for points in local[m].values()] for m in surface},
        {m: CurveFamily.of(points) for m, points in surface.items()},
    )
