"""``train``: a small LongCat-Flash by the published recipe, or the study of the recipe's claims."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def run(
    out: Annotated[Path, typer.Option(help="Folder of the run; run again after a stop, it goes on.")],
    preset: Annotated[str, typer.Option(help="A packaged model that fits this machine.")] = "longcat-tiny",
    steps: Annotated[int | None, typer.Option(help="Optimiser steps.")] = None,
    corpus: Annotated[list[Path] | None, typer.Option(help="Text file or folder; Python's own text without.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget earlier checkpoints.")] = False,
    study: Annotated[bool, typer.Option("--study", help="Run the study of the published claims instead.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="With --study: a minute, one seed.")] = False,
) -> None:
    """Train a small LongCat-Flash by the published recipe."""
    if study:
        from longcat_sim.studies.training.study import run_study

        print(run_study(out, quick=quick))
        return
    from longcat_sim.model.training.config import TrainConfig
    from longcat_sim.studies.training.run import train

    config = None if steps is None else TrainConfig(steps=steps, mtp_from=0.5)
    done = train(preset, out, config=config, corpus=corpus or (), device=device, fresh=fresh)
    print(f"{done.steps} steps, {done.tokens} tokens, loss {done.loss:.3f}, held out {done.held_out_loss:.3f}")
    chosen = ", ".join(
        f"{mean:.2f} ± {std:.2f}" for mean, std in zip(done.ffn_experts, done.ffn_experts_std, strict=True)
    )
    print(f"FFN experts per token by layer: {chosen}")
    if done.acceptance is not None:
        print(f"acceptance of the drafted token: {done.acceptance:.1%}")
    for remark in done.remarks:
        print(f"note: {remark}")
