"""Hyperparameter transfer: the best learning rate at two widths, with and without the width rules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from longcat_sim.studies.training.claims import Claim, over_seeds, verdict
from longcat_sim.studies.training.sizes import short_spec
from longcat_sim.studies.training.tasks import Task

PROXY, TARGET = 32, 128
RATES = tuple(0.001 * 2**k for k in range(8))
"""Grid of peak learning rates: steps of two, 0.001 to 0.128."""
QUICK_RATES = RATES[2:6:2]


def tasks(quick: bool) -> list[Task]:
    """Return one sweep per width, rule and seed."""
    rates, seeds, steps = (QUICK_RATES, (0,), 20) if quick else (RATES, (0, 1, 2), 100)
    runs = []
    for width, rule in ((PROXY, "none"), (TARGET, "full_align"), (TARGET, "none")):
        for seed in seeds:
            arguments = {"width": width, "rule": rule, "seed": seed, "rates": rates, "steps": steps}
            cost = len(rates) * steps * (0.02 if width == PROXY else 0.06)
            runs.append(Task(f"transfer-{width}-{rule}-{seed}", "transfer:sweep", arguments, cost))
    return runs


def sweep(
    width: int, rule: Literal["full_align", "none"], seed: int, rates: Sequence[float], steps: int
) -> dict[str, Any]:
    """Train once per learning rate; a run whose loss is not finite counts as infinite."""
    from longcat_sim.errors import TrainingError
    from longcat_sim.model import LongcatFlash
    from longcat_sim.model.training import TrainConfig, Trainer, library_corpus

    corpus = library_corpus()
    held_out = corpus.held_out_mix(96, 64)
    spec = short_spec(width)
    losses = []
    for rate in rates:
        config = TrainConfig(
            steps=steps, learning_rate=rate, seed=seed, tokens=64, sequences=8, proxy_width=PROXY, transfer=rule,
            warmup_steps=min(20, steps // 4), watch_every=10**6, weight_decay=0.0,
        )  # fmt: skip
        trainer = Trainer(LongcatFlash(spec), config, corpus)
        try:
            trainer.run()
            losses.append(trainer.evaluate(held_out))
        except TrainingError:
            losses.append(math.inf)
    return {"rates": list(rates), "losses": losses}


def best(rates: Sequence[float], losses: Sequence[float | None]) -> tuple[float, float]:
    """Return (log2 of the best rate on the grid, log2 of the vertex of the parabola through it and its neighbours)."""
    finite = [math.inf if loss is None else loss for loss in losses]
    at = min(range(len(finite)), key=finite.__getitem__)
    log = [math.log2(rate) for rate in rates]
    if at in (0, len(finite) - 1) or math.isinf(finite[at + 1]) or math.isinf(finite[at - 1]):
        return log[at], log[at]
    left, middle, right = finite[at - 1 : at + 2]
    step = 0.5 * (left - right) / (left - 2 * middle + right)
    return log[at], log[at] + step * (log[at + 1] - log[at])


def claims(results: Mapping[str, Any]) -> list[Claim]:
    """Return the lines on transfer."""
    seeds = sorted({int(key.rsplit("-", 1)[1]) for key in results if key.startswith(f"transfer-{PROXY}-")})

    def optima(width: int, rule: str) -> list[tuple[float, float]]:
        rows = [results[f"transfer-{width}-{rule}-{seed}"] for seed in seeds]
        return [best(row["rates"], row["losses"]) for row in rows]

    def penalty(rule: str) -> list[float]:
        """Loss at the target of using the proxy's best rate, above the target's own best under either rule."""
        out = []
        for seed, (log, _) in zip(seeds, optima(PROXY, "none"), strict=True):
            rows = {r: results[f"transfer-{TARGET}-{r}-{seed}"] for r in ("full_align", "none")}
            at = min(range(len(RATES)), key=lambda i: abs(math.log2(RATES[i]) - log))
            used = dict(zip(rows[rule]["rates"], rows[rule]["losses"], strict=True)).get(RATES[at])
            lowest = min(loss for row in rows.values() for loss in row["losses"] if loss is not None)
            out.append(math.inf if used is None else used - lowest)
        return out

    proxy, ruled, plain = optima(PROXY, "none"), optima(TARGET, "full_align"), optima(TARGET, "none")
    grid_ruled = [abs(a[0] - b[0]) for a, b in zip(ruled, proxy, strict=True)]
    grid_plain = [abs(a[0] - b[0]) for a, b in zip(plain, proxy, strict=True)]
    shift_ruled = over_seeds([a[1] - b[1] for a, b in zip(ruled, proxy, strict=True)])
    shift_plain = over_seeds([a[1] - b[1] for a, b in zip(plain, proxy, strict=True)])
    within, beyond = all(g <= 1 for g in grid_ruled), all(g > 1 for g in grid_plain)
    rates = [f"{2 ** p[0]:g}" for p in proxy]
    shown = within and beyond and len(seeds) >= 3
    return [
        Claim(
            f"Best learning rate carries over from width {PROXY} to {TARGET} with the rule, and not without",
            "yes, 768 to 6144 (s = 8)",
            f"shift of the optimum in grid steps (x2), mean over {len(seeds)} seeds: with the rule {shift_ruled}, "
            f"without "
            f"{shift_plain}; on the grid with the rule {_steps(ruled, proxy)}, without {_steps(plain, proxy)}; "
            f"proxy's best "
            f"{', '.join(rates)}",
            verdict(shown, len(seeds) >= 3 and (not within or all(g <= 1 for g in grid_plain))),
            f"loss lost at width {TARGET} by using the proxy's best rate: with the rule "
            f"{over_seeds(penalty('full_align'))}, "
            f"without {over_seeds(penalty('none'))} nats per byte",
        )
    ]


def _steps(a: Sequence[tuple[float, float]], b: Sequence[tuple[float, float]]) -> str:
    return "/".join(f"{x[0] - y[0]:+.0f}" for x, y in zip(a, b, strict=True))
