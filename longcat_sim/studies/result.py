"""What a simulation returns: figures with intervals, a table for people, one JSON document, a timeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from longcat_sim.capacity.interval import Interval
from longcat_sim.records.span import chrome_trace
from longcat_sim.simulation.serving.simulate import ServingResult
from longcat_sim.simulation.step import StepResult
from longcat_sim.specs.deployment import DecodeStep, PrefillStep
from longcat_sim.specs.scenario import Scenario
from longcat_sim.studies.engines import pools_of

# key -> (name for people, unit for people, factor)
SHOWN: dict[str, tuple[str, str, float]] = {
    "step_s": ("step", "ms", 1e3),
    "tpot_s": ("time per output token (TPOT)", "ms", 1e3),
    "ttft_s": ("time to first token (TTFT), no queue", "ms", 1e3),
    "tokens_per_s_per_user": ("output rate of one user", "tokens/s", 1.0),
    "tokens_per_s_per_gpu": ("output rate of one decode GPU (TGS)", "tokens/s", 1.0),
    "input_tokens_per_s_per_gpu": ("input rate of one prefill GPU", "tokens/s", 1.0),
    "usd_per_million_output_tokens": ("price of 1M output tokens", "USD", 1.0),
    "usd_per_million_input_tokens": ("price of 1M input tokens", "USD", 1.0),
    "compute_s": ("compute", "ms", 1e3),
    "communication_s": ("communication", "ms", 1e3),
    "exposed_communication_s": ("exposed communication and waiting", "ms", 1e3),
    "memory_bytes_per_gpu": ("memory per GPU", "GB", 1e-9),
}


def table(rows: list[tuple[str, str, str]]) -> str:
    """Return aligned lines of (name, figure, unit)."""
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    return "\n".join(f"{name:<{widths[0]}}  {value:>{widths[1]}}  {unit}" for name, value, unit in rows)


def _drafts(scenario: Scenario) -> list[str]:
    """Return the tokens of a decode step and where they come from, if drafts are used."""
    drafts = scenario.speculative
    if not drafts.draft_tokens:
        return []
    chances = ", ".join(f"{chance:g}" for chance in drafts.acceptance)
    return [f"{drafts.tokens_per_step:.3g} tokens a step (drafts accepted with {chances})"]


def _sizes(step: DecodeStep | PrefillStep) -> str:
    if isinstance(step, DecodeStep):
        return f"{step.sequences_per_gpu:g} sequences per GPU at {step.context_tokens:,.0f} tokens of context"
    return f"prompts of {step.prompt_tokens:,.0f} tokens, {step.tokens_per_gpu:,.0f} tokens per GPU"


def _price(scenario: Scenario) -> str:
    return f"{scenario.usd_per_gpu_hour:.4g} USD per GPU-hour"


@dataclass
class StepOutcome:
    """One simulated step with the spread of its draws. ``step`` holds the event-by-event run."""

    scenario: Scenario
    figures: dict[str, Interval]
    step: StepResult
    notes: list[str] = field(default_factory=list)
    extrapolated: bool = False

    def __getitem__(self, key: str) -> Interval:
        return self.figures[key]

    def rows(self) -> list[tuple[str, str, str]]:
        """Return (name, median [p5, p95], unit) of every figure."""
        return [(SHOWN[key][0], value.show(SHOWN[key][2]), SHOWN[key][1]) for key, value in self.figures.items()]

    def __str__(self) -> str:
        lines = [
            f"{self.scenario.name}: {self.scenario.model.name} on {self._fleet()}",
            self._given(),
            "",
            table(self.rows()),
            "",
        ]
        total = self.step.breakdown.step_s
        lines.append(
            f"where the time of one step goes, run event by event ({total * 1e3:.3f} ms; the parts, means over"
        )
        above = "; the figures above are medians over draws" if self.scenario.draws > 1 else ""
        lines.append(f"ranks, add up to it{above}):")
        parts = [(f"  {n}", f"{s * 1e3:.3f}", f"ms  {s / total:.1%}") for n, s in self.step.breakdown.parts().items()]
        lines.append(table(parts))
        moved = [
            f"{kind.replace('_', '-')} {own * 1e3:.2f} ms, {exposed * 1e3:.2f} exposed"
            for kind, (own, exposed) in self.step.breakdown.collectives_s.items()
        ]
        if moved:
            lines.append(f"  communication by kind (two at once count in both): {'; '.join(moved)}")
        lines += [f"note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _given(self) -> str:
        """Return the sizes, the drafts and the price that the result was made for."""
        step = self.scenario.step
        assert step is not None
        drafts = _drafts(self.scenario) if isinstance(step, DecodeStep) else []
        return "; ".join([_sizes(step), *drafts, _price(self.scenario)])

    def _fleet(self) -> str:
        deployment = self.scenario.deployment
        return f"{deployment.num_gpus} x {self.scenario.hardware.name}, EP{deployment.ep_size}, {deployment.overlap}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        body = "".join(f"<tr><td>{n}</td><td align=right>{v}</td><td>{u}</td></tr>" for n, v, u in self.rows())
        return f"<b>{self.scenario.name}</b> on {self._fleet()}<table>{body}</table>"

    def to_json(self) -> dict[str, Any]:
        """Return the ``simulate --json`` document of a step."""
        document: dict[str, Any] = {key: value.to_json() for key, value in self.figures.items()}
        document["usd_basis"] = "decode_gpus" if "tpot_s" in self.figures else "prefill_gpus"
        document["scenario"] = self.scenario.name
        document["draws"] = self.scenario.draws
        document["extrapolated"] = self.extrapolated
        document["tags"] = dict(self.step.tags)
        document["where_the_time_goes_s"] = self.step.breakdown.parts()
        document["collectives_s"] = {
            kind: {"own": own, "exposed": exposed} for kind, (own, exposed) in self.step.breakdown.collectives_s.items()
        }
        document["memory_parts_bytes_per_gpu"] = dict(self.step.memory.parts)
        document["layers"] = self.step.layer_ops()
        document["notes"] = self.notes
        return document

    def figure(self) -> Any:
        """Return the timeline of one layer as a plotly figure."""
        from longcat_sim.figures.timeline import layer_timeline

        return layer_timeline(self.step)

    def chrome_trace(self) -> dict[str, Any]:
        """Return the step's spans of a few ranks as a Chrome trace."""
        ranks = range(min(4, self.step.timeline.program.ranks))
        return chrome_trace(self.step.spans(ranks=ranks))


@dataclass
class ServeOutcome:
    """One simulated stretch of traffic, its prices, and the spread over draws."""

    scenario: Scenario
    run: ServingResult
    figures: dict[str, Any]
    intervals: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    def __getitem__(self, key: str) -> Any:
        return self.figures[key]

    def rows(self) -> list[tuple[str, str, str]]:
        """Return (name, figure, unit) of the figures that people ask for first."""
        got, rows = self.figures, []
        fleet = " + ".join(
            f"{pool.num_replicas} x {pool.num_gpus} {part.hardware.name}"
            for pool, part in zip(self.run.pools.values(), self._parts(), strict=True)
        )
        rows.append(("fleet (replicas x GPUs)", fleet, ""))
        batch = f"{got['decode_sequences_per_replica']:.4g}"
        rows.append(
            (
                "sequences decoding or waiting to, mean",
                batch,
                "of a decode replica" if len(self._parts()) > 1 else "of a replica",
            )
        )
        left_out = len(self.run.records) - got["requests"]
        unit = f"{left_out} of the warm-up left out" if left_out else ""
        rows.append(("requests completed", f"{got['completed']} of {got['requests']}", unit))
        gone = [name for name in ("rejected", "failed", "retried") if got[name]]
        if gone:
            rows.append((f"requests {' / '.join(gone)}", " / ".join(str(got[name]) for name in gone), ""))
        for key, name, unit, factor in (
            ("ttft_s", "TTFT", "s", 1.0), ("tpot_s", "TPOT", "ms", 1e3), ("e2e_s", "end to end", "s", 1.0),
        ):  # fmt: skip
            if got[key] is not None:
                spread = (self.intervals or {}).get(key) or {}
                each = []
                for at in ("mean", "p50", "p90", "p99"):
                    one = [got[key][at], *([spread[at]["p5"], spread[at]["p95"]] if at in spread else [])]
                    # three digits keep four figures with their intervals on one line
                    texts = [f"{value * factor:.{3 if at in spread else 4}g}" for value in one]
                    each.append(texts[0] + (f" [{texts[1]}, {texts[2]}]" if at in spread else ""))
                rows.append((f"{name} mean / p50 / p90 / p99", " / ".join(each), unit))
        for key, name, unit in (
            ("input_tokens_per_s", "input rate", "tokens/s"),
            ("output_tokens_per_s", "output rate", "tokens/s"),
            ("goodput_requests_per_s", "goodput within the SLO", "requests/s"),
            ("prefix_hit_ratio", "prefix cache hits", "of input tokens"),
            ("gpu_hours", "paid", "GPU-hours"),
            ("usd_per_million_input_tokens", "price of 1M input tokens", "USD"),
            ("usd_per_million_cached_input_tokens", "price of 1M cached input tokens", "USD"),
            ("usd_per_million_output_tokens", "price of 1M output tokens", "USD"),
            ("usd_per_million_output_tokens_all_in", "whole bill per 1M output tokens", "USD"),
        ):
            if got.get(key) is not None:
                spread = (self.intervals or {}).get(key)
                shown = f"{got[key]:.4g}"
                if isinstance(spread, Mapping):
                    shown += f" [{spread['p5']:.4g}, {spread['p95']:.4g}]"
                rows.append((name, shown, unit))
        for name, level in got["slo"].items():
            if level["attained_ratio"] is not None:
                rows.append((f"within the SLO {name}", f"{level['attained_ratio']:.1%}", "of requests offered"))
        bill = got.get("bill_usd")
        if bill and bill["total"]:
            rows.append(("idle share of the bill", f"{bill['idle'] / bill['total']:.1%}", ""))
        return rows

    def _window(self) -> float:
        """Return the seconds that rates and prices are over."""
        start, end = self.figures["window_s"]
        return float(end - start)

    def _parts(self) -> list[Scenario]:
        """Return the scenario of each pool."""
        assert self.scenario.serve is not None
        return list(pools_of(self.scenario, self.scenario.serve).values())

    def __str__(self) -> str:
        assert self.scenario.serve is not None
        prices = {name: _price(part) for name, part in pools_of(self.scenario, self.scenario.serve).items()}
        if len(set(prices.values())) > 1:
            prices = {name: f"{price} ({name})" for name, price in prices.items()}
        given = "; ".join([*_drafts(self.scenario), *dict.fromkeys(prices.values())])
        lines = [f"{self.scenario.name}: {self._window():.0f} s of traffic", given, "", table(self.rows())]
        if self.figures["unstable"]:
            rate = self.figures["sustainable_requests_per_s"]
            lines.append(
                f"UNSTABLE: the queue grows without bound; about {rate:.3g} requests/s can be kept up with "
                "a queue that is never empty, which says nothing of the SLO: capacity finds the rate within it"
            )
        lines += [f"note: {note}" for note in self.notes]
        lines.append(f"simulated in {self.figures['wall_s']:.2f} s")
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        body = "".join(f"<tr><td>{n}</td><td align=right>{v}</td><td>{u}</td></tr>" for n, v, u in self.rows())
        return f"<b>{self.scenario.name}</b><table>{body}</table>"

    def to_json(self) -> dict[str, Any]:
        """Return the ``simulate --json`` document of a serving run."""
        document = {**self.figures, "usd_basis": "fleet", "scenario": self.scenario.name, "notes": self.notes}
        if self.intervals is not None:
            document["intervals"] = self.intervals
        return document

    def figure(self) -> Any:
        """Return TTFT and TPOT over the run as a plotly figure."""
        from longcat_sim.figures.serving import latency_figure

        return latency_figure(self.run)

    def chrome_trace(self) -> dict[str, Any]:
        """Return the kept window of steps as a Chrome trace."""
        return chrome_trace(self.run.spans or [])
