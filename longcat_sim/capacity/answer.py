"""``CapacityResult``: the winner, what it beat, what binds it, and the document that ``capacity --json`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from longcat_sim.capacity.candidates import search_of
from longcat_sim.capacity.screen import Screened
from longcat_sim.specs.scenario import Scenario


@dataclass
class Survivor:
    """One simulated candidate: its row of the screen and its simulated figures."""

    at: int
    screened: Mapping[str, Any]
    figures: Mapping[str, Any] | None
    faults: tuple[str, ...] = ()

    def figure(self, name: str) -> float:
        """Return a simulated figure; of one that does not simulate, the screened one."""
        if self.figures is not None and self.figures.get(name) is not None:
            return float(self.figures[name])
        return float(self.screened[name])

    def to_json(self) -> dict[str, Any]:
        """Return deployment, simulated figures, and the screened ones beside them."""
        row = {k: v for k, v in self.screened.items() if k in ("deployment", "changes", "sequences_per_gpu")}
        screened = {k: v for k, v in self.screened.items() if k not in row}
        return {**row, "simulated": dict(self.figures or {}), "screened": screened, "faults": list(self.faults)}


@dataclass
class CapacityResult:
    """The answer to a capacity question."""

    scenario: Scenario
    winner: Survivor
    survivors: list[Survivor]
    pareto: list[dict[str, Any]]
    binding: dict[str, Any]
    why: list[dict[str, Any]]
    rejected: dict[str, int]
    max_rate_at_slo: dict[str, Any]
    looked_at: int
    solved: int
    screen_wall_s: float
    simulate_wall_s: float
    interpolation_error: float
    screening_kendall_tau: float | None
    notes: list[str] = field(default_factory=list)
    screened: Screened | None = field(default=None, repr=False)

    @property
    def usd_basis(self) -> str:
        """Which GPUs the prices pay for."""
        return "decode_gpus" if self.scenario.serve is None else "fleet"

    def to_json(self) -> dict[str, Any]:
        """Return the document that ``capacity --json`` prints."""
        return {
            "winner": self.winner.to_json(), "pareto": self.pareto, "binding": self.binding, "why": self.why,
            "rejected": self.rejected, "max_rate_at_slo": self.max_rate_at_slo,
            "objective": search_of(self.scenario).objective, "usd_basis": self.usd_basis,
            "candidates_looked_at": self.looked_at, "candidates_solved": self.solved,
            "candidates_simulated": len(self.survivors), "screen_wall_s": self.screen_wall_s,
            "simulate_wall_s": self.simulate_wall_s, "screening_interpolation_error": self.interpolation_error,
            "screening_kendall_tau": self.screening_kendall_tau, "notes": self.notes,
        }  # fmt: skip

    def __str__(self) -> str:
        """Return the answer as a person wants it."""
        w, search, rate = self.winner, search_of(self.scenario), self.max_rate_at_slo
        usd, tpot = w.figure("usd_per_million_output_tokens"), w.figure("tpot_s")
        batch = w.screened.get("sequences_per_gpu")
        lines = [
            f"{self.looked_at:,} candidates looked at ({self.solved:,} solved) in {self.screen_wall_s:.1f} s, "
            f"{len(self.survivors)} simulated in {self.simulate_wall_s:.1f} s",
            "",
            f"winner      {w.screened['deployment']}" + (f", {batch:g} sequences per GPU" if batch else ""),
            f"cost        {usd:.4g} USD per million output tokens ({self.usd_basis})"
            + _range(w, "usd_per_million_output_tokens"),
            f"speed       {tpot * 1e3:.4g} ms per token{_range(w, 'tpot_s', 1e3)}, {1 / tpot:.3g} tokens/s per user",
        ]
        if "ttft_s" in (w.figures or {}):
            lines.append(f"            {w.figure('ttft_s'):.3g} s to the first token{_range(w, 'ttft_s')}")
        if w.figures and w.figures.get("probability") is not None:
            chance = w.figures["probability"]
            lines.append(f"service     met with probability {chance:.2f} (asked {search.probability})")
        fleet = f"fleet       {rate['replicas']} replicas on {rate['num_gpus']} GPUs: "
        fleet += f"{rate['output_tokens_per_s']:,.0f} output tokens/s"
        if rate["concurrent_users"] is not None:
            fleet += f", {rate['concurrent_users']:,.0f} users at once"
        if rate["requests_per_s"] is not None:
            fleet += f"; up to {rate['requests_per_s']:.3g} requests/s within the level"
        lines.append(fleet)
        lines += [f"binds       {self.binding['sentence']}", "", "why it wins (best candidate with another choice):"]
        lines += [
            f"  {row['choice']:<14} {row['value']!s:<12} {row['ratio']:.3g} x {row['objective']}" for row in self.why
        ]
        if self.rejected:
            lines += ["", "put aside: " + ", ".join(f"{count:,} {reason}" for reason, count in self.rejected.items())]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    __repr__ = __str__


def _range(survivor: Survivor, name: str, scale: float = 1.0) -> str:
    figures = survivor.figures or {}
    low, high = figures.get(f"{name}_p5"), figures.get(f"{name}_p95")
    return "" if low is None or high is None else f" [{low * scale:.4g}, {high * scale:.4g}]"
