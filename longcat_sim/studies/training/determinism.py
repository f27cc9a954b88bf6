"""Determinism: two runs bit by bit, and what the mode costs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from typing import Any

from longcat_sim.studies.training.claims import Claim, over_seeds, verdict
from longcat_sim.studies.training.sizes import published_ratio_spec
from longcat_sim.studies.training.tasks import Task


def tasks(quick: bool) -> list[Task]:
    """Return two equal runs (of two processes where there are two) and the cost."""
    steps, blocks = (6, 3) if quick else (40, 12)
    runs = [
        Task(f"deterministic-{run}", "determinism:fingerprint", {"steps": steps, "deterministic": True, "run": run}, 4)
        for run in (0, 1)
    ]
    return [*runs, Task("deterministic-cost", "determinism:cost", {"blocks": blocks}, blocks * 1.5)]


def fingerprint(steps: int, deterministic: bool, run: int) -> dict[str, Any]:
    """Return the losses' exact bits and a hash of all weights and moments after a short run."""
    from longcat_sim.model import LongcatFlash
    from longcat_sim.model.training import TrainConfig, Trainer, library_corpus

    config = TrainConfig(steps=steps, warmup_steps=5, tokens=64, mtp_from=0.5, deterministic=deterministic)
    trainer = Trainer(LongcatFlash(published_ratio_spec(), mtp=True), config, library_corpus())
    trainer.run()
    content = hashlib.sha256()
    for name, tensor in sorted(trainer.tensors().items()):
        content.update(name.encode())
        content.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return {"losses": [row["loss"].hex() for row in trainer.history], "state": content.hexdigest(), "run": run}


def cost(blocks: int) -> dict[str, Any]:
    """Time blocks of steps in both modes, in turn; processor time, so that other work on the machine counts less."""
    from longcat_sim.model import LongcatFlash
    from longcat_sim.model.training import TrainConfig, Trainer, library_corpus
    from longcat_sim.model.training.determinism import deterministic_mode

    config = TrainConfig(steps=10**6, tokens=64, watch_every=10**9)
    trainer = Trainer(LongcatFlash(published_ratio_spec()), config, library_corpus())
    trainer.run(until=3)
    ratios = []
    for block in range(blocks):
        took = {}
        for mode in (True, False) if block % 2 else (False, True):
            with deterministic_mode(1, on=mode):
                began = time.process_time()
                trainer.run(until=trainer.step_done + 5)
                took[mode] = time.process_time() - began
        ratios.append(took[True] / took[False])
    return {"ratios": ratios}


def claims(results: Mapping[str, Any]) -> list[Claim]:
    """Return the line on determinism."""
    a, b = results["deterministic-0"], results["deterministic-1"]
    same = a["losses"] == b["losses"] and a["state"] == b["state"]
    ratios = over_seeds(results["deterministic-cost"]["ratios"])
    return [
        Claim(
            "Determinism: bitwise equal losses and weights on a second run",
            "yes, all compute and communication; deterministic attention backward at 0.95x of the other's speed",
            f"{len(a['losses'])} steps twice: losses {'equal' if a['losses'] == b['losses'] else 'differ'}, weights "
            f"and "
            f"moments {'equal' if a['state'] == b['state'] else 'differ'} bit by bit; the mode takes {ratios} of the "
            f"other's "
            "time per step",
            verdict(same, not same),
            "one CPU thread: GPU kernels and communication are not testable here",
        )
    ]
