"""The stability suite: router gradient ratio, hidden z-loss, Adam's epsilon, variance compensation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from longcat_sim.studies.training.claims import Claim, over_seeds, verdict
from longcat_sim.studies.training.sizes import published_ratio_spec, short_spec, small_spec
from longcat_sim.studies.training.tasks import Task

Z_LOSS = 1e-3
"""lambda of the comparison: large enough to act within a short run; ours."""
SCALES = (1.0, 1e-8)
"""Factors on the loss, hence on every gradient: Adam without epsilon does not notice them."""
EPSILONS = (1e-16, 1e-8)


def tasks(quick: bool) -> list[Task]:
    """Return the runs of this part."""
    seeds, steps = ((0,), 25) if quick else ((0, 1, 2), 80)
    runs = [
        Task(f"z-{weight:g}-{seed}", "stability:hidden_z", {"weight": weight, "seed": seed, "steps": steps},
             steps * 0.03)
        for weight in (0.0, Z_LOSS) for seed in seeds
    ]  # fmt: skip
    runs += [
        Task(f"epsilon-{epsilon:g}-{scale:g}-{seed}", "stability:adam",
             {"epsilon": epsilon, "scale": scale, "seed": seed, "steps": steps}, steps * 0.03)
        for epsilon in EPSILONS for scale in SCALES for seed in seeds
    ]  # fmt: skip
    runs += [Task(f"ratio-{alpha:g}", "stability:ratio", {"alpha": alpha, "steps": steps}, steps * 0.12)
             for alpha in (() if quick else (5e-3, 5e-2))]  # fmt: skip
    runs.append(Task("variance", "stability:variances", {"seeds": list(seeds)}, 4))
    return runs


def hidden_z(weight: float, seed: int, steps: int) -> dict[str, Any]:
    """Train with or without the hidden z-loss and return the largest activations."""
    from longcat_sim.model import LongcatFlash
    from longcat_sim.model.training import TrainConfig, Trainer, library_corpus

    corpus = library_corpus()
    config = TrainConfig(
        steps=steps, learning_rate=1e-2, seed=seed, tokens=64, z_loss=weight, watch_every=10**6, warmup_steps=10
    )
    trainer = Trainer(LongcatFlash(short_spec(64, 1)), config, corpus)
    trainer.run()
    tail = trainer.history[-10:]
    return {
        "max_abs_hidden": float(np.mean([row["max_abs_hidden"] for row in tail])),
        "first": trainer.history[0]["max_abs_hidden"],
        "held_out_loss": trainer.evaluate(corpus.held_out_mix(64, 64)),
    }


def adam(epsilon: float, scale: float, seed: int, steps: int) -> dict[str, Any]:
    """Train with a scaled loss; return the loss and the RMS of the gradients that Adam saw, per tensor."""
    from longcat_sim.model import LongcatFlash
    from longcat_sim.model.training import TrainConfig, Trainer, library_corpus

    corpus = library_corpus()
    config = TrainConfig(
        steps=steps, learning_rate=6e-3, seed=seed, tokens=64, epsilon=epsilon, loss_scale=scale, watch_every=10**6,
        warmup_steps=10,
    )  # fmt: skip
    trainer = Trainer(LongcatFlash(short_spec(64, 1)), config, corpus)
    trainer.run()
    rms = [
        float(state["exp_avg_sq"].mean().sqrt()) for state in trainer.optimizer.state.values() if "exp_avg_sq" in state
    ]
    return {
        "held_out_loss": trainer.evaluate(corpus.held_out_mix(64, 64)),
        "rms": [min(rms), float(np.median(rms)), max(rms)],
    }


def ratio(alpha: float, steps: int) -> dict[str, Any]:
    """Train with a larger balance coefficient and return R_g."""
    from longcat_sim.model import LongcatFlash
    from longcat_sim.model.training import TrainConfig, Trainer, library_corpus

    config = TrainConfig(steps=steps, learning_rate=1e-2, balance=alpha, tokens=64, watch_every=10)
    trainer = Trainer(LongcatFlash(published_ratio_spec()), config, library_corpus())
    trainer.run()
    rows = np.array([row["gradient_ratio"] for row in trainer.history if "gradient_ratio" in row])
    return {"alpha": alpha, "max": float(rows.max()), "mean": float(rows.mean())}


def variances(seeds: list[int]) -> dict[str, Any]:
    """Return output variances at initialisation, with and without compensation: experts (by m) and MLA (by layer)."""
    experts: dict[str, list[float]] = {}
    for seed in seeds:
        coarse = expert_variance(fine=1, scale=1.0, seed=seed)
        for fine in (2, 4, 8):
            experts.setdefault(f"without-{fine}", []).append(expert_variance(fine, 1.0, seed) / coarse)
            experts.setdefault(f"with-{fine}", []).append(expert_variance(fine, float(fine), seed) / coarse)
    mla = {name: [mla_variances(name == "with", seed) for seed in seeds] for name in ("with", "without")}
    return {"experts": experts, "mla": mla}


def expert_variance(fine: int, scale: float, seed: int, hidden: int = 128, experts: int = 8, topk: int = 2) -> float:
    """Return the variance of a MoE block's output at init with each expert cut into ``fine``; FFN experts only."""
    import torch

    from longcat_sim.model import LongcatFlash
    from longcat_sim.model.moe import sort_rows
    from longcat_sim.model.training.watch import layers_of

    spec = small_spec(
        hidden, 1, experts=experts * fine, zero=0, topk=topk * fine, expert_width=2 * hidden // fine, scale=scale
    )
    model = LongcatFlash(spec, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".experts." in name:  # fan-in init of both products would hide the narrower width: one std for all m
            with torch.no_grad():
                parameter.normal_(0.0, hidden**-0.5, generator=generator)
    layer = layers_of(model)[0]
    with torch.no_grad():
        x_TH = torch.randn(2048, hidden, generator=generator)
        routing = layer.router(x_TH)
        out_TH = layer.experts(x_TH, sort_rows(routing, spec.n_routed_experts), torch.zeros_like(x_TH))
    return float(out_TH.var())


def mla_variances(compensated: bool, seed: int, hidden: int = 256, layers: int = 4) -> list[dict[str, float]]:
    """Return, by layer, variances at init of q and k (content and rope parts), v and the attention's output.

    All matrices have one standard deviation, 1 / sqrt(hidden). Without compensation the gains alpha_q and alpha_kv
    are divided out of the inner norms' weights.
    """
    import torch

    from longcat_sim.model import LongcatFlash
    from longcat_sim.model.attention import MLA
    from longcat_sim.model.training.watch import layers_of

    spec = small_spec(hidden, layers, experts=16, zero=8, topk=6, expert_width=64)
    spec = spec.replace(q_lora_rank=hidden // 4, kv_lora_rank=hidden // 12 // 2 * 2)  # the published ratios
    model = LongcatFlash(spec, seed=seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name and not name.startswith(("embedding", "head")):
                parameter.mul_(hidden**-0.5 / spec.initializer_range)
            elif name.startswith("embedding"):
                parameter.div_(spec.initializer_range)
    kept_by_layer: list[dict[str, Any]] = []
    blocks = [[cast(MLA, block) for block in layer.attention] for layer in layers_of(model)]
    for first, second in blocks:
        if not compensated:
            with torch.no_grad():
                for block in (first, second):
                    block.q_norm.weight.div_(spec.mla_scale_q_lora)
                    block.kv_norm.weight.div_(spec.mla_scale_kv_lora)
        kept: dict[str, Any] = {}
        for name, module in (("out", first.out), ("down", first.down), ("q", first.q_up)):
            module.register_forward_hook(lambda _m, _i, o, kept=kept, name=name: kept.__setitem__(name, o))
        kept_by_layer.append(kept)
    tokens = torch.randint(0, 256, (8, 64), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model(tokens)
    out = []
    nope = spec.qk_nope_head_dim
    for (mla, _), kept in zip(blocks, kept_by_layer, strict=True):
        # the softmax scale rides on q's norm; taken out again
        q_TnD = kept["q"].view(-1, spec.num_attention_heads, spec.qk_head_dim) * spec.qk_head_dim**0.5
        c_TC, rope_TR = kept["down"][:, spec.q_lora_rank :].split([spec.kv_lora_rank, spec.qk_rope_head_dim], dim=-1)
        with torch.no_grad():
            kv = mla.kv_up(mla.kv_norm(c_TC, spec.mla_scale_kv_lora))
        kv_TnX = kv.view(-1, spec.num_attention_heads, nope + spec.v_head_dim)
        out.append({
            "q": float(q_TnD.var()), "k_content": float(kv_TnX[..., :nope].var()), "k_rope": float(rope_TR.var()),
            "v": float(kv_TnX[..., nope:].var()), "out": float(kept["out"].var()),
        })  # fmt: skip
    return out


def claims(results: Mapping[str, Any], quick: bool) -> list[Claim]:
    """Return the lines on stability."""
    return [_ratio(results), _similarity(results), _z(results), _epsilon(results), _experts(results), _mla(results)]


def _ratio(results: Mapping[str, Any]) -> Claim:
    rows = np.array(results["budget-32"]["gradient_ratio"])[:, 1:]
    more = "; ".join(f"alpha {r['alpha']:g}: {r['max']:.2f}" for k, r in results.items() if k.startswith("ratio-"))
    return Claim(
        "Router gradient ratio R_g kept under 0.1",
        "R_g < 0.1",
        f"largest {rows.max():.3f}, mean {rows.mean():.3f} over {len(rows)} looks and {rows.shape[1]} layers (alpha "
        f"5e-4, ours)",
        verdict(bool(rows.max() < 0.1), bool(rows.max() >= 0.1)),
        f"largest with other coefficients: {more}" if more else "",
    )


def _similarity(results: Mapping[str, Any]) -> Claim:
    rows = np.array(results["budget-32"]["router_similarity"])[:, 1:]
    return Claim(
        "Router-weight similarity stays low",
        "watched; no figure given",
        f"mean pairwise cosine {rows[0].max():.3f} at the start, {rows[-1].max():.3f} at the end, at most "
        f"{rows.max():.3f}",
        verdict(bool(rows.max() < 0.3), False),
    )


def _seeds(results: Mapping[str, Any], prefix: str) -> list[Mapping[str, Any]]:
    return [results[key] for key in sorted(results) if key.startswith(prefix)]


def _z(results: Mapping[str, Any]) -> Claim:
    off, on = _seeds(results, "z-0-"), _seeds(results, f"z-{Z_LOSS:g}-")
    lower = over_seeds([a["max_abs_hidden"] / b["max_abs_hidden"] for a, b in zip(on, off, strict=True)])
    loss = over_seeds([a["held_out_loss"] - b["held_out_loss"] for a, b in zip(on, off, strict=True)])
    return Claim(
        "Hidden z-loss lowers the largest activation",
        "suppresses massive activations with a very small coefficient",
        f"max |z| with over without: {lower} ({len(on)} seeds; lambda {Z_LOSS:g}, ours); loss changes by {loss} nats "
        f"per byte",
        verdict(len(on) >= 3 and lower.high < 1, len(on) >= 3 and lower.low > 1),
    )


def _epsilon(results: Mapping[str, Any]) -> Claim:
    parts, gaps = [], []
    for scale in SCALES:
        rows = {e: _seeds(results, f"epsilon-{e:g}-{scale:g}-") for e in EPSILONS}
        gap = over_seeds([
            b["held_out_loss"] - a["held_out_loss"] for a, b in zip(rows[1e-16], rows[1e-8], strict=True)
        ])  # fmt: skip
        rms = math.exp(np.mean([math.log(r["rms"][1]) for r in rows[1e-16]]))
        parts.append(f"median RMS {rms:.1e}: {gap}")
        gaps.append(gap)
    count = len(rows[1e-16])
    return Claim(
        "Adam epsilon 1e-16 instead of 1e-8 where the gradient's RMS is tiny",
        "epsilon must stay orders of magnitude below the gradient's RMS",
        "loss with 1e-8 minus loss with 1e-16, by the RMS of the gradients: " + "; ".join(parts) + f" ({count} seeds)",
        verdict(count >= 3 and gaps[-1].low > 0, count >= 3 and gaps[-1].high < 0),
        "the RMS is made tiny by scaling the loss, which is what a large model's size does to it",
    )


def _experts(results: Mapping[str, Any]) -> Claim:
    rows = results["variance"]["experts"]
    parts = [
        f"m = {m}: {over_seeds(rows[f'without-{m}'])} without, {over_seeds(rows[f'with-{m}'])} with" for m in (2, 4, 8)
    ]
    held = all(0.5 < over_seeds(rows[f"with-{m}"]).mean < 2.0 for m in (2, 4, 8))
    lost = all(over_seeds(rows[f"without-{m}"]).mean < 2.0 / m**2 for m in (2, 4, 8))
    return Claim(
        "Variance compensation of fine-grained experts (gamma = m)",
        "cutting experts into m divides the output's variance by m^2; gamma = m restores it",
        "output variance over that of uncut experts, at init: " + "; ".join(parts),
        verdict(held and lost, not (held and lost)),
    )


def _mla(results: Mapping[str, Any]) -> Claim:
    rows = results["variance"]["mla"]
    layers = len(rows["with"][0])

    def text(name: str) -> str:
        return ", ".join(
            f"{np.mean([seed[i]['k_content'] / seed[i]['k_rope'] for seed in rows[name]]):.2f}" for i in range(layers)
        )

    def out(name: str) -> str:
        return ", ".join(f"{np.mean([seed[i]['out'] for seed in rows[name]]):.3g}" for i in range(layers))

    ratios = {n: [np.mean([s[i]["k_content"] / s[i]["k_rope"] for s in rows[n]]) for i in range(layers)] for n in rows}
    queries = {n: np.mean([[s[i]["q"] for i in range(layers)] for s in rows[n]]) for n in rows}
    held = all(0.5 < r < 2 for r in ratios["with"])
    return Claim(
        "Variance compensation of MLA (alpha_q, alpha_kv)",
        "without it the low-rank parts of q and k have another variance than the rope part",
        f"variance of k's content part over its rope part, by layer: {text('with')} with; {text('without')} without; "
        f"of q "
        f"{queries['with']:.2f} with, {queries['without']:.2f} without; of the attention's output {out('with')} with, "
        f"{out('without')} without",
        verdict(held and all(r < 0.5 for r in ratios["without"]), not held),
    )
