"""``run_study``: every part of the recipe at small scale, and one line per published claim."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from longcat_sim.errors import TrainingError
from longcat_sim.records.files import check_outputs, write_text
from longcat_sim.studies.training import budget, determinism, growth, routing, stability, transfer
from longcat_sim.studies.training.claims import Claim, finite, over_seeds, table, verdict
from longcat_sim.studies.training.tasks import Task, run_tasks


@dataclass(frozen=True)
class StudyResult:
    """The claims, and every run's figures by key."""

    claims: tuple[Claim, ...]
    runs: Mapping[str, Mapping[str, Any]]
    routing: Mapping[str, Any]
    wall_s: float
    core_s: float
    """Processor seconds of all runs together."""

    def __str__(self) -> str:
        return f"{table(self.claims)}\n{len(self.runs)} runs, {self.core_s:.0f} core seconds, {self.wall_s:.0f} s"

    def to_json(self) -> dict[str, Any]:
        """Return the claims and the routing statistics as a JSON document."""
        return {
            "claims": [claim.to_json() for claim in self.claims], "routing": finite(dict(self.routing)),
            "wall_s": self.wall_s, "core_s": self.core_s,
        }  # fmt: skip


def tasks(quick: bool, out: Path) -> list[Task]:
    """Return all runs of the study."""
    return [
        *budget.tasks(quick, out), *transfer.tasks(quick), *growth.tasks(quick), *stability.tasks(quick),
        *determinism.tasks(quick),
    ]  # fmt: skip


def run_study(
    out: Path,
    quick: bool = False,
    progress: bool = True,
    *,
    executor: Executor | None = None,
    workers: int | None = None,
) -> StudyResult:
    """Run what ``out`` does not hold yet, and write ``claims.json``, ``study.html`` and the recorded routing there.

    Full: at most 15 minutes on two cores. ``quick``: a minute, one seed, too short to decide most claims. Runs go to
    ``executor``, or to ``workers`` processes (default: one per core, at most 4; one means this process).

    Raises:
        UserError: ``out`` cannot be written.
        TrainingError: it cannot any more, such as on a full disk.
    """
    out = Path(out)
    began = time.perf_counter()
    check_outputs(folders={"--out": out})
    out.mkdir(parents=True, exist_ok=True)
    todo = tasks(quick, out)
    if workers is None:
        workers = 1 if quick else min(4, os.cpu_count() or 1)
    from tqdm import tqdm

    bar = tqdm(total=round(sum(task.cost for task in todo)), unit="core s", file=sys.stderr, disable=not progress,
               desc="training study", dynamic_ncols=True)  # fmt: skip
    core_s = 0.0

    def done(task: Task, result: dict[str, Any]) -> None:
        nonlocal core_s
        core_s += result["cpu_s"]
        bar.set_postfix_str(task.key, refresh=False)
        bar.update(round(task.cost))

    # Processes start anew (not forked): a forked torch may hang on its own thread pool.
    pool = (
        ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_one_thread)
        if executor is None and workers > 1
        else nullcontext(executor)
    )
    try:
        with pool as runner:
            runs = run_tasks(todo, out, executor=runner, done=done)
    except OSError as error:
        raise TrainingError(f"{out}: expected to write results; {error.strerror}; finished runs are kept") from None
    finally:
        bar.close()
    domains = runs["budget-32"]["domains"]
    cpu = time.process_time()
    recorded_at = {n: Path(runs[f"budget-{n}"]["folder"]) for n in (32, 64) if f"budget-{n}" in runs}
    analysis = routing.analyse(recorded_at, domains, out / "routing")
    core_s += time.process_time() - cpu
    claims = [
        *budget.claims(runs, quick), *routing.claims(analysis), *mtp_claims(runs), *transfer.claims(runs),
        *growth.claims(runs), *stability.claims(runs, quick), *determinism.claims(runs),
    ]  # fmt: skip
    result = StudyResult(tuple(claims), runs, analysis, time.perf_counter() - began, core_s)
    write_text(out / "claims.json", json.dumps(result.to_json(), indent=1))
    write_text(out / "study.html", report_html(result, quick))
    return result


def _one_thread() -> None:
    """Give a worker one torch thread and a lower priority than what the user works with."""
    import torch

    torch.set_num_threads(1)
    if hasattr(os, "nice"):
        os.nice(5)


def mtp_claims(results: Mapping[str, Any]) -> list[Claim]:
    """Return the line on the MTP head; intervals are over sequences."""
    accepted = results["budget-32"]["acceptance"]

    def share(name: str) -> str:
        values = accepted[name]
        mean = sum(values) / len(values)
        error = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))
        return f"{mean:.1%} ± {1.96 * error:.1%}"

    return [
        Claim(
            "MTP head, one dense layer trained from mid-way: acceptance of its draft",
            "92.1 % on MT-Bench at 6 B activated; theory assumes 80 %",
            f"greedy on held-out text {share('greedy')}, on the model's own continuation {share('generated')}; "
            f"speculative "
            f"sampling at temperature 1 {share('sampled')} ({len(accepted['greedy'])} sequences)",
            "not testable here",
            "measured for bytes and a small model trained for minutes: the level does not carry over, the way to "
            "measure it does",
        )
    ]


def report_html(result: StudyResult, quick: bool) -> str:
    """Return the page with the claims and the figures."""
    from longcat_sim.figures.report import Report
    from longcat_sim.figures.training import budget_figure, curves_figure, loss_figure

    runs = result.runs
    page = Report("The training recipe at small scale" + (" (quick form: decides little)" if quick else ""))
    page.table(
        ["claim", "published", "here", "verdict", "remark"],
        [[c.name, c.published, c.here, c.verdict, c.detail] for c in result.claims],
    )
    main = runs["budget-32"]
    history = [
        {"step": i, "loss": loss, "ffn_experts": mean, "ffn_experts_std": std}
        for i, (loss, mean, std) in enumerate(
            zip(main["loss"], main["ffn_experts"], main["ffn_experts_std"], strict=True)
        )
    ]
    page.heading("Budget")
    page.figure(budget_figure(history, main["expected"]))
    page.figure(loss_figure(history, title="Loss of the run with 32 + 16 experts"))
    page.heading("Learning rate by width")
    curves: dict[str, list[tuple[float, float, float, float]]] = {}
    for width, rule in ((transfer.PROXY, "none"), (transfer.TARGET, "full_align"), (transfer.TARGET, "none")):
        rows = [runs[k] for k in sorted(runs) if k.startswith(f"transfer-{width}-{rule}-")]
        name = f"width {width}" + (
            "" if width == transfer.PROXY else ", with the rule" if rule != "none" else ", without"
        )
        curves[name] = [
            (rate, *_band([row["losses"][i] for row in rows]))
            for i, rate in enumerate(rows[0]["rates"])
            if all(row["losses"][i] is not None for row in rows)
        ]
    page.figure(curves_figure(curves, title="Held-out loss", x="peak learning rate", y="nats per byte", log_x=True))
    page.heading("Growth")
    curves = {}
    for arm in ("scratch", "grown", "late"):
        rows = [runs[k] for k in sorted(runs) if k.startswith(f"growth-{arm}-")]
        if rows:
            curves[arm] = [
                (step, *_band([row["curve"][i][1] for row in rows])) for i, (step, _) in enumerate(rows[0]["curve"])
            ]
    page.figure(curves_figure(curves, title="Held-out loss", x="step", y="nats per byte"))
    return page.html()


def _band(values: list[float]) -> tuple[float, float, float]:
    """Return mean and interval for a plot; of one seed, no width."""
    found = over_seeds(values)
    return (found.mean, found.mean, found.mean) if math.isinf(found.low) else (found.mean, found.low, found.high)


__all__ = ["StudyResult", "run_study", "verdict"]
