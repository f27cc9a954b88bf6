"""The top-k study: pieces of work, spread over processes, and what they say together.

Every piece has its own seed and text, so the result does not depend on how many processes share the work.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from longcat_sim.records.files import atomic, check_outputs
from longcat_sim.studies.topk import summary
from longcat_sim.studies.topk.claims import QUICK_VERDICT, judge

SCHEMA = "longcat_sim.topk_study/1"
PRICED = ("deepseek-v3.2-h800-decode", "longcat-flash-h800-decode")
"""Packaged scenarios whose step is priced with and without an indexer."""
PRICED_SEQUENCES = 16
FIRST_TOKEN = 1000
"""Where the first window of text starts; the others follow at equal distance."""


@dataclass(frozen=True)
class Plan:
    """How much is done."""

    windows: int
    context_tokens: int
    long_context_tokens: int
    """Context of one further, longer window; 0: none."""
    ratios: tuple[float, ...]
    precisions: tuple[float, ...]
    indexer_training: int
    indexer_testing: int
    indexer_dense_steps: int
    indexer_sparse_steps: int
    needles: int
    needle_parts: int
    haystack_tokens: int
    seeds: int
    dense_steps: int
    more_steps: int
    test_batches: int
    price_contexts: tuple[int, ...]
    price_draws: int


FULL = Plan(4, 2048, 4096, (0.01, 0.02, 0.05, 0.1, 0.2), (0.8, 0.6, 0.4, 0.2), 3, 3, 120, 40, 24, 2, 500,
            8, 250, 80, 4, (2048, 4096, 8192, 16384, 32768, 65536, 131072), 8)  # fmt: skip
QUICK = Plan(1, 256, 0, (0.1,), (0.8, 0.4), 1, 1, 4, 2, 2, 1, 100, 2, 20, 5, 1, (8192, 65536), 2)


@lru_cache(maxsize=1)
def _model_and_text() -> tuple[Any, Any]:
    """Return the language model and its tokens of Python's own language reference, once per process."""
    from pydoc_data.topics import topics

    from longcat_sim.studies.topk.smollm2 import SmolLM2

    model = SmolLM2()
    return model, model.encode("\n\n".join(topics.values()))


def _window(plan: Plan, number: int, context_tokens: int) -> dict[str, Any]:
    from longcat_sim.studies.topk import windows

    model, text = _model_and_text()
    start = window_start(plan, number, len(text))
    tokens = text[start : start + context_tokens + 1]
    if context_tokens == plan.long_context_tokens:
        settings = [s for s in windows.exact_settings((0.01, 0.05, 0.2)) if s.values["sharing"] != "group"]
        return {**windows.score_window(model, tokens, context_tokens, settings), "first_token": start}
    settings = [
        *windows.exact_settings(plan.ratios),
        *windows.precision_settings(plan.precisions),
        *windows.block_settings(),
    ]
    return {**windows.score_window(model, tokens, context_tokens, settings, heads=True), "first_token": start}


def window_start(plan: Plan, number: int, text_tokens: int) -> int:
    """Return the first token of a window; even numbers test, odd ones train indexers."""
    room = text_tokens - FIRST_TOKEN - max(plan.context_tokens, plan.long_context_tokens) - 1
    return FIRST_TOKEN + room * number // (2 * max(plan.windows, plan.indexer_training, plan.indexer_testing))


def _indexers(plan: Plan) -> dict[str, Any]:
    from longcat_sim.studies.topk.indexers import indexer_study

    model, text = _model_and_text()

    def cut(number: int) -> Any:
        start = window_start(plan, number, len(text))
        return text[start : start + plan.context_tokens + 1]

    return indexer_study(
        model,
        [cut(2 * i + 1) for i in range(plan.indexer_training)],
        [cut(2 * i) for i in range(plan.indexer_testing)],
        context_tokens=plan.context_tokens,
        dense_steps=plan.indexer_dense_steps,
        sparse_steps=plan.indexer_sparse_steps,
    )


def _needles(plan: Plan, part: int) -> list[dict[str, Any]]:
    from longcat_sim.studies.topk.needles import needle_study

    model, text = _model_and_text()
    size = plan.needles // plan.needle_parts
    return needle_study(model, text, range(part * size, (part + 1) * size), plan.haystack_tokens)


def _recall(plan: Plan, seed: int) -> dict[str, Any]:
    from longcat_sim.studies.topk.recall import recall_run

    return recall_run(seed, dense_steps=plan.dense_steps, more_steps=plan.more_steps, batches=plan.test_batches)


def _price(plan: Plan, name: str) -> dict[str, Any]:
    from longcat_sim.specs.scenario import scenario
    from longcat_sim.studies.topk.context_price import price_against_context

    step = {"phase": "decode", "sequences_per_gpu": PRICED_SEQUENCES, "context_tokens": plan.price_contexts[0]}
    return price_against_context(scenario(name, {"step": step, "draws": plan.price_draws}), plan.price_contexts)


_PIECES: dict[str, Callable[..., Any]] = {
    "indexer": _indexers, "window": _window, "needles": _needles, "recall": _recall, "price": _price,
}  # fmt: skip


def do_piece(piece: str, arguments: tuple) -> tuple[Any, float, float]:
    """Do one piece of work on one thread; return its result, seconds, and seconds of processor time."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        began, worked = time.perf_counter(), time.process_time()
        result = _PIECES[piece](*arguments)
        return result, time.perf_counter() - began, time.process_time() - worked
    finally:
        torch.set_num_threads(threads)


def pieces(plan: Plan) -> list[tuple[str, tuple]]:
    """Return the work, longest first."""
    work: list[tuple[str, tuple]] = [("indexer", (plan,))]
    work += [("window", (plan, 2 * i, plan.context_tokens)) for i in range(plan.windows)]
    if plan.long_context_tokens:
        work.append(("window", (plan, 0, plan.long_context_tokens)))
    work += [("needles", (plan, part)) for part in range(plan.needle_parts)]
    work += [("recall", (plan, seed)) for seed in range(plan.seeds)]
    return work + [("price", (plan, name)) for name in PRICED]


def gather(work: list[tuple[str, tuple]], results: list[Any], quick: bool) -> dict[str, Any]:
    """Return what the pieces say together, claims judged."""
    by_piece: dict[str, list[Any]] = {name: [] for name in _PIECES}
    for (piece, _), result in zip(work, results, strict=True):
        by_piece[piece].append(result)
    study: dict[str, Any] = {
        "schema": SCHEMA,
        "quick": quick,
        "model": "SmolLM2-135M-Instruct, 4-bit weights used in float32",
        "text": "pydoc_data.topics of the running Python",
        "interval": "95%; t over windows or seeds, exact binomial over needles",
        "fidelity": summary.fidelity(by_piece["window"], by_piece["indexer"]),
        "heads": summary.heads(by_piece["window"]),
        "indexer": summary.indexer(by_piece["indexer"][0]),
        "needles": summary.needles([x for part in by_piece["needles"] for x in part]),
        "recall": summary.recall(by_piece["recall"]),
        "price": by_piece["price"],
        "windows": [{k: w[k] for k in ("first_token", "context_tokens", "dense_nll_nats")} for w in by_piece["window"]],
    }
    study["claims"] = judge(study)
    if quick:  # two seeds and one window decide nothing
        study["claims"] = [{**claim, "verdict": QUICK_VERDICT} for claim in study["claims"]]
    return study


def run_study(
    out: Path,
    quick: bool = False,
    progress: Callable[[str], None] | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Run the study, write ``topk_study.json`` and ``topk_study.html`` into ``out``, and return the JSON's content.

    ``workers`` processes of one thread each share the work, by default two where there are two cores; ``progress``
    is told of each piece that is done. ``quick`` shrinks every part until it says little: for tests.

    Raises:
        ModelError: the optional packages are missing; the message gives the install command.
        UserError: ``out`` cannot be written.
    """
    from longcat_sim.figures.topk import study_page
    from longcat_sim.studies.topk.smollm2 import check_installed

    check_outputs(folders={"--out": out})
    check_installed()
    tell = progress or (lambda message: None)
    plan = QUICK if quick else FULL
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    work = pieces(plan)
    results: list[Any] = [None] * len(work)
    seconds: dict[str, float] = {}
    processor: list[float] = []
    workers = workers or min(2, os.cpu_count() or 1)

    def done(i: int, outcome: tuple[Any, float, float], count: int) -> None:
        results[i], took, worked = outcome
        processor.append(worked)
        seconds[f"{work[i][0]} {i}"] = round(took, 1)
        tell(f"{count} of {len(work)}: {work[i][0]}, {took:.0f} s")

    if workers == 1:
        for i, (piece, arguments) in enumerate(work):
            done(i, do_piece(piece, arguments), i + 1)
    else:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = {pool.submit(do_piece, piece, arguments): i for i, (piece, arguments) in enumerate(work)}
            for count, future in enumerate(as_completed(futures), start=1):
                done(futures[future], future.result(), count)
    study = gather(work, results, quick)
    study["seconds_by_piece"], study["took_s"] = seconds, round(time.perf_counter() - began, 1)
    study["processor_s"] = round(sum(processor), 1)
    with atomic(out / "topk_study.json") as file:
        json.dump(study, file, indent=1, allow_nan=False)
    with atomic(out / "topk_study.html") as file:
        file.write(study_page(study))
    return study
