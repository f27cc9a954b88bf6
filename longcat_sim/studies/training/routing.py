"""Routing of the trained models: recorded, fitted, and the fit's error on a second recorded size."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from longcat_sim.records.files import write_text
from longcat_sim.records.routing import RoutingTrace
from longcat_sim.records.routing_fit import RoutingFit, fit_routing
from longcat_sim.studies.training.claims import Claim, verdict
from longcat_sim.studies.training.tasks import Task

if TYPE_CHECKING:
    from torch import Tensor

    from longcat_sim.model.longcat import LongcatFlash

BATCH_TOKENS = 1024
EP_SIZE = 8
"""Ranks over which imbalance is compared: few enough for the small sizes."""
CLASSES = {"letters": (65, 91, 97, 123), "digits": (48, 58), "punctuation": (33, 48, 58, 65, 91, 97, 123, 127),
           "whitespace": (9, 14, 32, 33)}  # fmt: skip


def record(model: LongcatFlash, text: Mapping[str, Tensor], folder: Path) -> dict[str, Any]:
    """Record the routing of each domain's text [B, S] into ``folder`` and return FFN counts by domain and class."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    by_domain: dict[str, list[list[float]]] = {}
    by_class = {name: [np.zeros(2) for _ in range(model.spec.num_layers)] for name in CLASSES}
    for name, tokens_BS in text.items():
        with torch.no_grad(), model.record_routing() as trace_of:
            for part in tokens_BS.split(8):
                model(part)
            trace = trace_of()
        trace = RoutingTrace(
            trace.experts, trace.n_routed_experts, trace.zero_expert_num,
            f"{model.spec.name}, trained at small scale, held-out {name}, sequences of {tokens_BS.shape[1]}",
        )  # fmt: skip
        trace.save(folder / f"{name}.npz")
        count_LT = trace.ffn_experts()
        by_domain[name] = count_LT.reshape(trace.num_layers, *tokens_BS.shape).mean(-1).tolist()
        flat = tokens_BS.flatten().numpy()
        for kind, edges in CLASSES.items():
            inside = np.zeros(len(flat), dtype=bool)
            for low, high in zip(edges[::2], edges[1::2], strict=True):
                inside |= (flat >= low) & (flat < high)
            for layer in range(trace.num_layers):
                by_class[kind][layer] += [count_LT[layer, inside].sum(), inside.sum()]
    return {
        "ffn_by_domain": by_domain,
        "ffn_by_class": {k: [float(s / max(n, 1)) for s, n in layers] for k, layers in by_class.items()},
        "domains": list(text),
    }


def tasks(quick: bool, out: Path) -> list[Task]:
    """Return nothing: this part reads what the budget part recorded."""
    return []


def load(folder: Path, domains: list[str]) -> dict[str, RoutingTrace]:
    """Return recorded traces by domain."""
    return {name: RoutingTrace.load(folder / f"{name}.npz") for name in domains}


def statistics(
    traces: Mapping[str, RoutingTrace], mix: Mapping[str, float], sequence: int, seed: int = 0
) -> dict[str, float]:
    """Return what the simulator takes from routing, as means over layers.

    ``imbalance_mixed`` is of batches of ``BATCH_TOKENS`` tokens drawn over all domains by the mix, token by token as
    decode batches are; ``imbalance_domain`` of whole sequences of one domain, as prefill batches are.
    """
    first = next(iter(traces.values()))
    rng = np.random.default_rng(seed)
    counts = {name: t.ffn_experts() for name, t in traces.items()}
    pooled = {name: float(mix[name]) for name in traces}
    total = sum(pooled.values())
    mean_L = sum(pooled[n] / total * counts[n].mean(1) for n in traces)
    square_L = sum(pooled[n] / total * (counts[n].astype(float) ** 2).mean(1) for n in traces)
    domain_means = np.stack([counts[n].mean(1) for n in traces])
    weights = np.array([pooled[n] / total for n in traces])[:, None]
    domain_std = np.sqrt((weights * (domain_means - (weights * domain_means).sum(0)) ** 2).sum(0))
    mixed, single = [], []
    for _ in range(24):
        parts = [
            t.experts[:, rng.choice(t.num_tokens, max(1, round(BATCH_TOKENS * pooled[n] / total)), replace=False)]
            for n, t in traces.items()
        ]
        batch = RoutingTrace(np.concatenate(parts, axis=1), first.n_routed_experts, first.zero_expert_num)
        mixed.append(batch.imbalance(EP_SIZE).mean())
    for t in traces.values():
        sequences = t.num_tokens // sequence
        per = max(1, min(sequences, BATCH_TOKENS // sequence))
        for _ in range(8):
            rows = rng.choice(sequences, per, replace=False)
            token = (rows[:, None] * sequence + np.arange(sequence)).ravel()
            part = RoutingTrace(t.experts[:, token], t.n_routed_experts, t.zero_expert_num)
            single.append(part.imbalance(EP_SIZE).mean())
    shares = [t.expert_popularity()[:, : t.n_routed_experts] for t in traces.values()]
    skew = [(share.std(1) / share.mean(1)).mean() for share in shares]
    return {
        "ffn_mean": float(np.mean(mean_L)),
        "ffn_std": float(np.mean(np.sqrt(square_L - np.asarray(mean_L) ** 2))),
        "ffn_std_between_domains": float(np.mean(domain_std)),
        "load_variation_in_domain": float(np.mean(skew)),
        "imbalance_mixed": float(np.mean(mixed)),
        "imbalance_domain": float(np.mean(single)),
    }


def resampled(fit: RoutingFit, like: RoutingTrace, sequence: int, seed: int = 1) -> dict[str, RoutingTrace]:
    """Return one trace per domain at the size of ``like``, as the fit has it."""
    # One seed for all domains: they share the experts' weights, which are balanced over the mix.
    return {
        name: fit.resample(
            n_routed_experts=like.n_routed_experts, zero_expert_num=like.zero_expert_num, moe_topk=like.moe_topk,
            expected_ffn_experts=fit.expected_ffn_experts, num_layers=like.num_layers,
            sequences=like.num_tokens // sequence, sequence_tokens=sequence, domain=name, seed=seed,
        )
        for name in fit.domains
    }  # fmt: skip


def analyse(recorded_at: Mapping[int, Path], domains: list[str], out: Path, *, sequence: int = 128) -> dict[str, Any]:
    """Fit the first recorded size, write ``fit.json`` to ``out``, and compare its resampling with every size."""
    from longcat_sim.model.training.corpus import MIX

    fit = fit_routing(load(next(iter(recorded_at.values())), domains), MIX, sequence_tokens=sequence)
    write_text(out / "fit.json", json.dumps(fit.to_json(), indent=1))
    result: dict[str, Any] = {}
    for size, folder in recorded_at.items():
        recorded = load(folder, domains)
        like = next(iter(recorded.values()))
        predicted = [statistics(resampled(fit, like, sequence, seed), MIX, sequence) for seed in range(1, 6)]
        seen = statistics(recorded, MIX, sequence)
        mean = {k: float(np.mean([p[k] for p in predicted])) for k in seen}
        result[str(size)] = {"recorded": seen, "resampled": mean, "error": {k: mean[k] / seen[k] - 1 for k in seen}}
    target = fit.resample(
        n_routed_experts=512, zero_expert_num=256, moe_topk=12, expected_ffn_experts=8.0, num_layers=len(fit.layers),
        sequences=24, sequence_tokens=sequence,
    )  # fmt: skip
    target.save(out / "resampled-512.npz")
    counts = target.ffn_experts()
    result["512"] = {
        "ffn_mean": float(counts.mean()), "ffn_std": float(counts.std(1).mean()),
        "imbalance_ep32": float(target.imbalance(32).mean()), "imbalance_ep128": float(target.imbalance(128).mean()),
        "tokens": target.num_tokens,
    }  # fmt: skip
    return result


def claims(analysis: Mapping[str, Any]) -> list[Claim]:
    """Return the lines on carried-over routing statistics: shown where spread and imbalance are within 10 %."""
    lines = []
    for size in [key for key in analysis if key != "512"]:
        row = analysis[size]
        text = "; ".join(
            f"{k} {row['recorded'][k]:.3f} recorded, {row['resampled'][k]:.3f} resampled ({row['error'][k]:+.1%})"
            for k in row["recorded"]
        )
        first = size == next(iter(analysis))
        worst = max(abs(row["error"][k]) for k in ("ffn_std", "imbalance_mixed", "imbalance_domain"))
        lines.append(
            Claim(
                f"Routing statistics {'fitted at' if first else 'predicted for the second size,'} {size} FFN experts",
                "not published",
                text,
                verdict(worst < 0.1, worst > 0.25),
                "in-sample check" if first else "the fit saw the first size only: this is its error when carried over",
            )
        )
    target = analysis["512"]
    lines.append(
        Claim(
            "Routing at 512 + 256 experts, K = 12",
            "mean 8, standard deviation about 3; skew not published",
            f"resampled: mean {target['ffn_mean']:.2f}, standard deviation {target['ffn_std']:.2f}; busiest rank over "
            f"mean {target['imbalance_ep32']:.2f} at EP 32, {target['imbalance_ep128']:.2f} at EP 128 "
            f"({target['tokens']} tokens)",
            "not testable here",
            "an extrapolation from 32 experts: the error at the second size is all that is known of it",
        )
    )
    return lines
