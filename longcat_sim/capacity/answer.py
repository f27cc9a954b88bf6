"""``CapacityResult``: the winner, what it beat, what binds it, and the document that ``capacity --json`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from longcat_sim.capacity.candidates import search_of
from longcat_sim.capacity.replay import replay_command
from longcat_sim.capacity.screen import Screened, objective_of, tpot_limit_s
from longcat_sim.specs.scenario import Scenario


@dataclass
class Survivor:
    """One simulated candidate: its row of the screen and its simulated figures."""

    at: int
    screened: Mapping[str, Any]
    figures: Mapping[str, Any] | None
    faults: tuple[str, ...] = ()

    def figure(self, name: str, missing: Any = ...) -> Any:
        """Return a simulated figure; of one that does not simulate, the screened one; else ``missing``."""
        if self.figures is not None and self.figures.get(name) is not None:
            return float(self.figures[name])
        return float(self.screened[name]) if missing is ... or name in self.screened else missing

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
    source: str = ""
    """Name or path of the scenario, as it was given."""

    @property
    def usd_basis(self) -> str:
        """Which GPUs the prices pay for."""
        return "decode_gpus" if self.scenario.serve is None else "fleet"

    @property
    def tpot_limit_s(self) -> float | None:
        """The level on the time per output token, if there is one."""
        return tpot_limit_s(self.scenario)

    @property
    def replay(self) -> str | None:
        """The command that simulates the winner, None where there is none."""
        changes, batch = dict(self.winner.screened["changes"]), self.winner.screened.get("sequences_per_gpu")
        if batch is not None:
            changes["step.sequences_per_gpu"] = int(batch) if float(batch).is_integer() else batch
        return replay_command(self.scenario, changes, self.source)

    def to_json(self) -> dict[str, Any]:
        """Return the document that ``capacity --json`` prints."""
        return {
            "winner": self.winner.to_json(), "replay": self.replay, "pareto": self.pareto, "binding": self.binding,
            "why": self.why, "rejected": self.rejected, "max_rate_at_slo": self.max_rate_at_slo,
            "objective": objective_of(self.scenario)[0], "usd_basis": self.usd_basis,
            "candidates_looked_at": self.looked_at, "candidates_solved": self.solved,
            "candidates_simulated": len(self.survivors), "screen_wall_s": self.screen_wall_s,
            "simulate_wall_s": self.simulate_wall_s, "screening_interpolation_error": self.interpolation_error,
            "screening_kendall_tau": self.screening_kendall_tau, "notes": self.notes,
        }  # fmt: skip

    def __str__(self) -> str:
        """Return the answer as a person wants it."""
        lines = [
            f"{self.looked_at:,} candidates looked at ({self.solved:,} solved) in {self.screen_wall_s:.1f} s, "
            f"{len(self.survivors)} simulated in {self.simulate_wall_s:.1f} s",
            "",
            *(_line(name, text) for name, text in self._answer()),
            _line("binds", self.binding["sentence"]),
            *([_line("replay", self.replay)] if self.replay else []),
            "",
            f"why it wins (the best that chose otherwise, by {WORDS[search_of(self.scenario).objective]}):",
        ]
        others: dict[str, list[Mapping[str, Any]]] = {}
        for row in self.why:
            others.setdefault(row["deployment"], []).append(row)
        for deployment, rows in others.items():
            choices = ", ".join(f"{row['choice']} {row['value']}" for row in rows)
            how = "" if rows[0].get("is_simulated", True) else " (without a long run)"
            lines.append(f"  {rows[0]['ratio']:.3g} x with {choices}: {deployment}{how}")
        if not self.why:
            lines.append("  nothing else was possible")
        if self.rejected:
            lines += ["", "put aside: " + ", ".join(f"{count:,} {reason}" for reason, count in self.rejected.items())]
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    __repr__ = __str__

    def _answer(self) -> list[tuple[str, str]]:
        """Return the lines of the answer as (name, text)."""
        w, search = self.winner, search_of(self.scenario)
        batch = w.screened.get("sequences_per_gpu")
        rows = [("winner", w.screened["deployment"] + (f", {batch:g} sequences per GPU" if batch else ""))]
        if self.scenario.serve is None:
            rows.append(("cost", f"{_shown(w, 'usd_per_million_output_tokens')} USD per million output tokens"))
            rows.append(("", f"(of {self.usd_basis}: only these GPUs are paid)"))
            per_user = 1 / w.figure("tpot_s")
            rows.append(("speed", f"{_shown(w, 'tpot_s', 1e3)} ms per token, {per_user:.3g} tokens/s per user"))
            if search.tpot is not None:
                rows[-1] = ("speed", f"{rows[-1][1]} (level {search.tpot * 1e3:.4g} ms)")
        else:
            rows += self._bill() + self._latency()
        chance, is_asked = (w.figures or {}).get("probability"), tpot_asked(self.scenario)
        if chance is not None:
            words = f"kept with probability {chance:.2f} ({search.probability:g} asked)"
            rows.append(("service" if self.scenario.serve is None else "", words))
        elif is_asked:
            rows.append(("", "the level is kept by the point estimate; draws: 1 gives no probability"))
        return rows + self._fleet()

    def _bill(self) -> list[tuple[str, str]]:
        w, fleet = self.winner, self.max_rate_at_slo
        whole, name = fleet["usd_per_million_output_tokens"], "usd_per_million_output_tokens_all_in"
        to_mean = whole / w.figure(name)  # a run's tokens differ a little from those of the traffic
        rows = [
            ("cost", f"{_shown(w, name, to_mean)} USD per million output tokens, whole bill"),
            ("", f"its lines: {_shown(w, 'usd_per_million_input_tokens', to_mean)} per million input tokens, "
                 f"{_shown(w, 'usd_per_million_output_tokens', to_mean)} per million output tokens"),
        ]  # fmt: skip
        cached = "usd_per_million_cached_input_tokens"
        if w.figure(cached, None) is not None:
            rows.append(("", f"and {_shown(w, cached, to_mean)} per million cached input tokens"))
        rows.append(("", f"{w.figure('num_gpus'):g} GPUs, {fleet['usd_per_month']:,.0f} USD a month"))
        return rows

    def _latency(self) -> list[tuple[str, str]]:
        w, serve, search = self.winner, self.scenario.serve, search_of(self.scenario)
        assert serve is not None
        rows: list[tuple[str, str]] = []
        for name, title, scale, unit in (("ttft", "TTFT", 1.0, "s"), ("tpot", "TPOT", 1e3, "ms")):
            if w.figure(f"{name}_s", None) is None:
                continue
            limits = {level.name: getattr(level, name) for level in serve.slo if getattr(level, name) is not None}
            asked = ", ".join(
                f"{limit * scale:.4g} {unit}" + (f" for {of}" if len(serve.slo) > 1 else "")
                for of, limit in limits.items()
            )
            text = (
                f"{title} p99 {_shown(w, f'{name}_p99_s', scale)} {unit}, mean {_shown(w, f'{name}_s', scale)} {unit}"
            )
            rows.append(("" if rows else "latency", text + (f" (level {asked})" if asked else "")))
        rows.append(
            ("service", f"{_shown(w, 'attained', 100)} % of the requests of the worst class within its level "
                        f"({search.attainment:.0%} asked), over {w.figure('counted_requests'):,.0f} requests")
        )  # fmt: skip
        return rows

    def _fleet(self) -> list[tuple[str, str]]:
        rate = self.max_rate_at_slo
        each = " in each pool" if self.scenario.serve is not None and self.scenario.serve.is_disaggregated else ""
        spares = f" ({rate['spare_replicas']} spare{each})" if rate["spare_replicas"] else ""
        made = _with_interval(rate, "output_tokens_per_s", "{:,.0f}")
        if self.scenario.serve is None:
            users = f"{rate['concurrent_users']:,.0f} users at once"
            asked, whole = rate["asked_output_tokens_per_s"], rate["usd_per_million_output_tokens"]
            paid = f"{rate['usd_per_month']:,.0f} USD a month"
            if asked:
                paid += f", {whole:.4g} USD per million at the {asked:,.0f} tokens/s asked for"
                if rate.get("output_tokens_per_s_p5", asked) < asked:
                    paid += " (which the interval's lower end misses: a higher search.probability or a spare helps)"
                most = search_of(self.scenario).max_gpus
                if rate["num_gpus"] > most:
                    paid += f"; more GPUs than search.max_gpus, {most}"
            return [
                ("fleet", f"{rate['num_gpus']} GPUs, {rate['replicas']} replicas{spares}: {made} output tokens/s"),
                ("", f"= {users} at this level, {paid}"),
            ]
        highest = _with_interval(rate, "requests_per_s", "{:.3g}")
        without = "without its spares " if rate["spare_replicas"] else ""
        return [
            ("fleet", f"{rate['num_gpus']} GPUs, {rate['replicas']} replicas{spares}, for {made} output tokens/s"),
            ("headroom", f"{without}this fleet takes up to {highest} requests/s of this traffic within the level"),
            ("", f"= {rate['concurrent_users']:,.0f} requests in flight at once"),
        ]


WORDS = {
    "usd_per_million_output_tokens": "USD per output token", "tokens_per_s_per_user": "tokens/s per user",
    "ttft_s": "TTFT", "num_gpus": "GPUs",
}  # fmt: skip


def tpot_asked(scenario: Scenario) -> bool:
    """Whether the scenario asks for a service level."""
    levels = scenario.serve.slo if scenario.serve is not None else ()
    return search_of(scenario).tpot is not None or any(level.ttft or level.tpot or level.e2e for level in levels)


def _line(name: str, text: str) -> str:
    return f"{name:<10}  {text}"


def _shown(survivor: Survivor, name: str, scale: float = 1.0) -> str:
    """Return a figure with its interval, where it has one."""
    value = survivor.figure(name, None)
    if value is None:
        return "no"
    figures = survivor.figures or {}
    low, high = figures.get(f"{name}_p5"), figures.get(f"{name}_p95")
    spread = "" if low is None or high is None else f" [{low * scale:.4g}, {high * scale:.4g}]"
    return f"{value * scale:.4g}{spread}"


def _with_interval(row: Mapping[str, Any], name: str, form: str) -> str:
    low, high = row.get(f"{name}_p5"), row.get(f"{name}_p95")
    spread = "" if low is None or high is None else f" [{form.format(low)}, {form.format(high)}]"
    return form.format(row[name]) + spread
