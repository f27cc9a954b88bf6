"""The paper's four claims, each judged by a rule stated beforehand on figures of the study, whichever way it falls.

Source of the claims: arXiv 2512.03494, abstract.
"""

from __future__ import annotations

import itertools
from typing import Any

REPRODUCED = "reproduced at this scale"
NOT_REPRODUCED = "not reproduced"
UNDECIDED = "undecided at this scale"
QUICK_VERDICT = "not judged: a quick run"
COMPARABLE_KL_NATS = 0.05
"""assumed: a KL below this counts as comparable; the model's loss on this text is about 2 nats."""


def _range(x: dict[str, Any], digits: int = 3) -> str:
    low, high = x.get("low"), x.get("high")
    span = "" if low is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
    return f"{x['mean']:.{digits}f}{span}"


def _find(rows: list[dict], **wanted: Any) -> dict | None:
    return next((row for row in rows if all(row.get(k) == v for k, v in wanted.items())), None)


def exact_decoding(study: dict[str, Any]) -> dict[str, str]:
    """Judge: exact top-k decoding is comparable to full attention."""
    row = _find(study["fidelity"], family="exact", ratio=0.1, sharing="head")
    dense, sparse = study["needles"]["settings"]["dense 1"], study["needles"]["settings"]["head 0.1"]
    change = study["needles"]["difference_from_dense"]["head 0.1"]
    if row is None or row["kl_nats"]["low"] is None:
        verdict = UNDECIDED
    else:
        is_close = row["kl_nats"]["high"] <= COMPARABLE_KL_NATS
        verdict = REPRODUCED if is_close and change["high"] >= 0 else NOT_REPRODUCED
    figures = f"KL {_range(row['kl_nats'])} nats, same first choice {_range(row['top1_same'])}" if row else "no figure"
    return {
        "claim": "Exact top-k decoding is comparable to, sometimes better than, full attention.",
        "rule": f"at a ratio of 10% per head the KL's interval ends below {COMPARABLE_KL_NATS} nats, and the needles "
        "found less those of dense attention have an interval that reaches 0",
        "verdict": verdict,
        "evidence": f"SmolLM2-135M at 10% of the context: {figures}; needles {sparse['right']} of {sparse['trials']} "
        f"against {dense['right']} of {dense['trials']} dense. HELMET, LongBench v2 and 8B or 32B models: not "
        "testable here.",
    }


def native_training(study: dict[str, Any]) -> dict[str, str]:
    """Judge: the same top-k operation in training and inference helps top-k decoding."""
    recall = study["recall"]
    gain = recall["sft_minus_control"]["16"][str(recall["kept_in_training"])]
    if gain["low"] is None or gain["low"] <= 0 <= gain["high"]:
        verdict = UNDECIDED
    else:
        verdict = REPRODUCED if gain["low"] > 0 else NOT_REPRODUCED
    dense = recall["sft_minus_control"]["48"]["dense"]
    return {
        "claim": "Training with the same top-k attention as in decoding makes top-k decoding better.",
        "rule": "accuracy after top-k training less the dense control's of equal steps, paired by seed, under the "
        "trained top-k, has an interval above 0",
        "verdict": verdict,
        "evidence": f"associative recall, {gain['repeats']} seeds, {recall['kept_in_training']} keys kept: "
        f"{_range(gain)}; decoded densely on longer contexts the same model changes by {_range(dense)} (the mismatch "
        "works both ways). Top-k SFT of an 8B model: not testable here.",
    }


def precision_matters(study: dict[str, Any]) -> dict[str, str]:
    """Judge: quality rises with the precision of the selection."""
    parts, verdict = [], REPRODUCED
    for miss in ("random", "lowest"):
        rows = [r for r in study["fidelity"] if r.get("miss") == miss and not r.get("always_keep")]
        rows.sort(key=lambda r: r["set_precision"])
        kls = [r["kl_nats"]["mean"] for r in rows]
        if any(a <= b for a, b in itertools.pairwise(kls)):
            verdict = NOT_REPRODUCED
        if len(rows) < 2:
            verdict = UNDECIDED
        parts.append(
            f"{miss} misses: "
            + ", ".join(f"{r['set_precision']:g} gives {_range(r['kl_nats'])}" for r in (rows[0], rows[-1]))
        )
    indexer = study["indexer"]["means"]
    return {
        "claim": "Quality rises with retrieval precision; a lightning indexer reaches about 60%.",
        "rule": "mean KL falls strictly as the set precision rises, under both miss rules",
        "verdict": verdict,
        "evidence": f"KL in nats by precision: {'; '.join(parts)}: which keys are missed matters far more than how "
        f"many. Our small indexer: precision {_range(indexer['precision_against_head'])} against per-head sets, "
        f"{_range(indexer['precision_against_all'])} against the shared one, mass {_range(indexer['mass'])} of "
        f"{_range(indexer['mass_of_exact_shared'])}; the exact shared set itself scores "
        f"{_range(indexer['precision_of_exact_shared'])} against per-head sets. DeepSeek-V3.2's own 60%: not testable "
        "here.",
    }


def entropy_falls(study: dict[str, Any]) -> dict[str, str]:
    """Judge: attention entropy is lower after top-k training."""
    change = study["recall"]["entropy_sft_minus_control"]["16"]
    if change["low"] is None or change["low"] <= 0 <= change["high"]:
        verdict = UNDECIDED
    else:
        verdict = REPRODUCED if change["high"] < 0 else NOT_REPRODUCED
    heads = study["heads"]
    return {
        "claim": "Low-entropy attention suits top-k, and top-k training lowers attention entropy.",
        "rule": "entropy of dense attention at the queries after top-k training less the dense control's, paired by "
        "seed, has an interval below 0",
        "verdict": verdict,
        "evidence": f"associative recall: {_range(change)} nats. That low entropy suits top-k holds: dropped mass <= "
        f"H/ln(K+1) in {heads['rows_checked'] - heads['bound_violations']} of {heads['rows_checked']} rows of "
        f"SmolLM2-135M, correlation of dropped mass and entropy over heads {heads['correlation']:.2f}. Entropy of "
        "SFT models on HELMET: not testable here.",
    }


def judge(study: dict[str, Any]) -> list[dict[str, str]]:
    """Return claim, rule, verdict and evidence of each of the four."""
    return [f(study) for f in (exact_decoding, native_training, precision_matters, entropy_falls)]
