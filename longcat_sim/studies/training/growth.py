"""Model growth: a shallow model stacked x2 in mid-run, against the deep model from scratch at equal tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from longcat_sim.studies.training.claims import Claim, over_seeds, verdict
from longcat_sim.studies.training.sizes import short_spec
from longcat_sim.studies.training.tasks import Task

SHALLOW = 2
STACKED_SEEDS = tuple(range(3, 10))
"""Seeds that stop right after stacking: the step in the loss is small, and cheap to see again."""


def tasks(quick: bool) -> list[Task]:
    """Return the runs: from scratch, grown after a fifth of the tokens, and grown late (the report warns of it)."""
    seeds, steps = ((0,), 40) if quick else ((0, 1, 2), 300)
    arms = {"scratch": 0.0, "grown": 0.2} | ({} if quick else {"late": 0.6})
    runs = [
        Task(f"growth-{arm}-{seed}", "growth:arm", {"seed": seed, "steps": steps, "share": share},
             cost=steps * (0.125 - 0.06 * share))
        for arm, share in arms.items() for seed in seeds
    ]  # fmt: skip
    share = arms["grown"]
    stacked = [
        Task(f"growth-stacked-{seed}", "growth:arm", {"seed": seed, "steps": steps, "share": share, "goes_on": False},
             cost=steps * share * 0.07)
        for seed in (() if quick else STACKED_SEEDS)
    ]  # fmt: skip
    return runs + stacked


def arm(seed: int, steps: int, share: float, goes_on: bool = True) -> dict[str, Any]:
    """Train ``share`` of the tokens at half depth, then stack and go on; 0 is the deep model from scratch."""
    from longcat_sim.model import LongcatFlash
    from longcat_sim.model.training import TrainConfig, Trainer, library_corpus
    from longcat_sim.model.training.growth import grow

    corpus = library_corpus()
    held_out = corpus.held_out_mix(64, 64)
    config = TrainConfig(
        steps=steps, learning_rate=6e-3, seed=seed, tokens=64, sequences=8, watch_every=10**6, warmup_steps=20
    )
    at = round(share * steps)
    trainer = Trainer(LongcatFlash(short_spec(64, SHALLOW if at else 2 * SHALLOW)), config, corpus)
    curve: list[tuple[int, float]] = []
    before = after = None
    checks = sorted({round(steps * k / 20) for k in range(1, 21)} | {min(at + k, steps) for k in (2, 5, 10)})
    if at:
        trainer.run(until=at)
        before = trainer.evaluate(held_out)
        trainer = grow(trainer)
        after = trainer.evaluate(held_out)
    if not goes_on:
        return {"before": before, "after": after}
    for check in checks:
        if check > trainer.step_done:
            trainer.run(until=check)
            curve.append((check, trainer.evaluate(held_out)))
    return {
        "before": before, "after": after, "curve": curve, "final": curve[-1][1], "grown_at": at, "steps": steps,
        "kept": [trainer.step_done, trainer.tokens_seen, len(trainer.history)],
    }  # fmt: skip


def claims(results: Mapping[str, Any]) -> list[Claim]:
    """Return the lines on growth."""
    seeds = sorted(int(key.rsplit("-", 1)[1]) for key in results if key.startswith("growth-scratch-"))
    many = len(seeds) >= 3

    def rows(name: str) -> list[Mapping[str, Any]]:
        return [results[f"growth-{name}-{seed}"] for seed in seeds]

    stacked = [row for key, row in results.items() if key.startswith(("growth-grown-", "growth-stacked-"))]
    jump = over_seeds([row["after"] - row["before"] for row in stacked])
    final = over_seeds([g["final"] - s["final"] for g, s in zip(rows("grown"), rows("scratch"), strict=True)])
    faster = over_seeds([_tokens_to_reach(g, s["final"]) for g, s in zip(rows("grown"), rows("scratch"), strict=True)])
    # cost of a step is taken as proportional to depth
    share = rows("grown")[0]["grown_at"] / rows("grown")[0]["steps"]
    lines = [
        Claim(
            "Growth: the loss first rises",
            "yes, after stacking",
            f"held-out loss just after stacking minus just before: {jump} nats per byte ({len(stacked)} seeds)",
            verdict(many and jump.low > 0, many and jump.high < 0),
        ),
        Claim(
            "Growth: then converges faster and ends below random init at equal tokens",
            "yes (6 B activated)",
            f"final loss of grown minus from scratch: {final} nats per byte; reaches the scratch model's final loss "
            f"after "
            f"{faster} of its tokens ({len(seeds)} seeds; 1 or more: it does not get there earlier)",
            verdict(many and final.high < 0, many and final.low > 0),
            f"grown after {share:.0%} of the tokens, {2 * SHALLOW} layers from {SHALLOW}; compute saved "
            f"{share / 2:.0%}",
        ),
    ]
    if f"growth-late-{seeds[0]}" in results:
        late = over_seeds([a["final"] - b["final"] for a, b in zip(rows("late"), rows("grown"), strict=True)])
        lines.append(
            Claim(
                "Growth: over-training the small model hurts",
                "yes",
                f"final loss when grown at {rows('late')[0]['grown_at'] / rows('late')[0]['steps']:.0%} minus at "
                f"{share:.0%} of the tokens: {late} nats per byte ({len(seeds)} seeds)",
                verdict(many and late.low > 0, many and late.high < 0),
            )
        )
    return lines


def _tokens_to_reach(row: Mapping[str, Any], loss: float) -> float:
    """Return the share of the run's tokens after which the loss is reached; beyond the end, extrapolated as 1."""
    steps = np.array([step for step, _ in row["curve"]], dtype=float)
    losses = np.minimum.accumulate([value for _, value in row["curve"]])
    if losses[-1] > loss:
        return 1.0
    return float(np.interp(-loss, -losses, steps) / row["steps"])
