"""A small generative model of recorded routing, resampled at other numbers of experts.

Each token draws its K choices without replacement from all experts by weight (Plackett-Luce, by Gumbel noise). Log
weights of FFN experts are normal, per text domain, and balanced over the mix of domains as the budget controller
balances them; all zero-computation experts share a shift that has a part per domain, per sequence and per token. So
the mean and the spread of FFN experts per token, their variation by domain and by sequence, and the skew of expert
loads within a domain are each one parameter, fitted by simulation at the recorded size and kept at the target's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import yaml

from longcat_sim.errors import MeasurementError
from longcat_sim.records.routing import RoutingTrace

FloatArray = npt.NDArray[np.float64]
SWEEPS = 12
"""Sweeps of the moment fit; the last changes of all parameters are below the simulation's noise by then."""
REPLICAS = 12
"""Synthetic layers simulated per sweep."""


@dataclass(frozen=True)
class Moments:
    """What is matched, of one layer [domains] each; ``mixed_skew`` [] is of the loads over the whole mix."""

    mean: FloatArray
    """Mean share of a token's choices that are FFN experts."""
    token_std: FloatArray
    """Standard deviation over tokens of that share."""
    sequence_std: FloatArray
    """Standard deviation over sequences of their mean share, beyond what independent tokens would give."""
    ffn_skew: FloatArray
    """Coefficient of variation of the FFN experts' loads in the domain, sampling noise removed."""
    zero_skew: FloatArray
    """The same of the zero-computation experts."""
    mixed_skew: float
    """The same of the FFN experts over the mix."""


def _skew(loads_SE: FloatArray) -> float:
    """Return the coefficient of variation of expert loads, from the covariance of odd and even sequences' loads."""
    if loads_SE.shape[1] < 2 or len(loads_SE) < 2:
        return 0.0
    even, odd = loads_SE[0::2].sum(0), loads_SE[1::2].sum(0)
    even, odd = even / max(even.mean(), 1e-12), odd / max(odd.mean(), 1e-12)
    return float(np.sqrt(max(0.0, np.mean((even - 1) * (odd - 1)))))


def moments(traces: Mapping[str, RoutingTrace], mix: FloatArray, sequence_tokens: int) -> list[Moments]:
    """Return the moments of each layer; traces hold whole sequences one after another."""
    first = next(iter(traces.values()))
    ffn, topk = first.n_routed_experts, first.moe_topk
    choices = ffn + first.zero_expert_num
    out = []
    for layer in range(first.num_layers):
        rows: list[list[float]] = []
        halves = np.zeros((2, ffn))
        for share, trace in zip(mix, traces.values(), strict=True):
            chosen_SLK = trace.experts[layer].reshape(-1, sequence_tokens, topk)
            count_SL = (chosen_SLK < ffn).sum(-1) / topk
            flat = chosen_SLK.reshape(len(chosen_SLK), -1)
            loads_SE = np.stack([np.bincount(row, minlength=choices) for row in flat]).astype(float)
            between = count_SL.mean(1).var(ddof=1) - count_SL.var(1).mean() / sequence_tokens
            rows.append([count_SL.mean(), count_SL.std(), np.sqrt(max(0.0, between)),
                         _skew(loads_SE[:, :ffn]), _skew(loads_SE[:, ffn:])])  # fmt: skip
            for half in range(2):
                part = loads_SE[half::2, :ffn].sum(0)
                halves[half] += share * part / max(part.sum(), 1e-12)
        relative = halves / halves.mean(1, keepdims=True) - 1
        mixed_skew = float(np.sqrt(max(0.0, np.mean(relative[0] * relative[1]))))
        mean, token_std, sequence_std, ffn_skew, zero_skew = np.array(rows).T
        out.append(Moments(mean, token_std, sequence_std, ffn_skew, zero_skew, mixed_skew))
    return out


@dataclass(frozen=True)
class LayerFit:
    """Parameters of one layer, per domain but for the last."""

    ffn_share: tuple[float, ...]
    """Mean share of a token's choices that are FFN experts."""
    token_std: tuple[float, ...]
    """Standard deviation over tokens of what is added to all zero-computation experts' log weights."""
    sequence_std: tuple[float, ...]
    """The same over sequences."""
    ffn_std: tuple[float, ...]
    """Standard deviation of FFN experts' log weights."""
    zero_std: tuple[float, ...]
    """Standard deviation of zero-computation experts' log weights."""
    mixed_std: float
    """Standard deviation of the log loads that the controller leaves over the mix."""


def _balanced_weights(layer: LayerFit, mix: FloatArray, experts: int, rng: np.random.Generator) -> FloatArray:
    """Return log weights of FFN experts [domains, experts] whose loads over the mix are even, but for ``mixed_std``."""
    domains = len(mix)
    log_DE = np.array(layer.ffn_std)[:, None] * rng.standard_normal((domains, experts))
    target = np.exp(layer.mixed_std * rng.standard_normal(experts))
    target /= target.sum()
    for _ in range(20 if domains > 1 else 0):
        share = np.exp(log_DE - log_DE.max(1, keepdims=True))
        share /= share.sum(1, keepdims=True)
        log_DE += np.log(target / (mix @ share))
    return log_DE


def _shift(ffn_E: FloatArray, zero_E: FloatArray, std: float, topk: int, share: float) -> float:
    """Return what to add to the zero-computation experts' log weights for a mean FFN ``share`` of the choices.

    Choices without replacement by weight are the first K arrivals of exponential clocks with those rates. With the
    K-th arrival at its mean-field time u, sum_i (1 - exp(-w_i u)) = K, expert i is chosen with 1 - exp(-w_i u). The
    normal part of the shift is integrated by nine Gauss-Hermite nodes.
    """
    if topk >= len(ffn_E) + len(zero_E):
        return 0.0
    nodes, weights = np.polynomial.hermite_e.hermegauss(9)
    weights = weights / weights.sum()
    weight_JE = np.empty((len(nodes), len(ffn_E) + len(zero_E)))
    weight_JE[:, : len(ffn_E)] = np.exp(ffn_E - ffn_E.max())
    target, shift = float(_logit(np.array(share))), 0.0
    for _ in range(10):  # in log odds the share falls with the shift at a slope near -1
        weight_JE[:, len(ffn_E) :] = np.exp(zero_E[None] - ffn_E.max() + shift + std * nodes[:, None])
        time_J = topk / weight_JE.sum(1)
        for _ in range(8):  # Newton on a concave function from the left: never beyond the root
            left_JE = np.exp(-weight_JE * time_J[:, None])
            missing = topk - (1 - left_JE).sum(1)
            time_J = time_J + missing / np.maximum((weight_JE * left_JE).sum(1), 1e-300)
        got = weights @ (1 - np.exp(-weight_JE[:, : len(ffn_E)] * time_J[:, None])).sum(1) / topk
        shift += float(_logit(got)) - target
    return shift


def _choose(log_TE: npt.NDArray[np.floating], topk: int, rng: np.random.Generator) -> npt.NDArray[np.int32]:
    """Return K choices per row without replacement, by weight [T, K]."""
    uniform = rng.random(log_TE.shape, dtype=np.float32)
    noisy = log_TE - np.log(-np.log(np.clip(uniform, 1e-12, 1 - 1e-7)))
    return np.argpartition(-noisy, topk - 1, axis=1)[:, :topk].astype(np.int32)


def _draw_layer(
    layer: LayerFit, mix: FloatArray, sequences: npt.NDArray[np.int64], sequence_tokens: int, ffn: int, zero: int,
    topk: int, rng: np.random.Generator,
) -> list[npt.NDArray[np.int32]]:  # fmt: skip
    """Return the choices in one layer, per domain [sequences x tokens, K]."""
    ffn_DE = _balanced_weights(layer, mix, ffn, rng)
    out = []
    for d, count in enumerate(sequences):
        zero_E = layer.zero_std[d] * rng.standard_normal(zero)
        if zero and count:
            std = float(np.hypot(layer.token_std[d], layer.sequence_std[d]))
            zero_E += _shift(ffn_DE[d], zero_E, std, topk, layer.ffn_share[d])
        by_sequence = layer.sequence_std[d] * rng.standard_normal(int(count))
        by_token = layer.token_std[d] * rng.standard_normal(int(count) * sequence_tokens)
        moved_T = np.repeat(by_sequence, sequence_tokens) + by_token
        parts = []
        for block in np.array_split(moved_T, max(1, len(moved_T) // 2048)):
            log = np.empty((len(block), ffn + zero), np.float32)
            log[:, :ffn] = ffn_DE[d]
            log[:, ffn:] = zero_E[None] + block[:, None]
            parts.append(_choose(log, topk, rng))
        out.append(np.concatenate(parts))
    return out


@dataclass(frozen=True)
class RoutingFit:
    """Routing of a trained model as parameters. Build with ``fit_routing``; ``resample`` gives traces of any size."""

    domains: tuple[str, ...]
    mix: tuple[float, ...]
    layers: tuple[LayerFit, ...]
    n_routed_experts: int
    """Size that was recorded."""
    zero_expert_num: int
    moe_topk: int
    expected_ffn_experts: float

    def resample(
        self, *, n_routed_experts: int, zero_expert_num: int, moe_topk: int, expected_ffn_experts: float,
        num_layers: int, sequences: int = 32, sequence_tokens: int = 128, domain: str | None = None, seed: int = 0,
    ) -> RoutingTrace:  # fmt: skip
        """Return a trace at another size: of the mix of domains, or of one; layer i behaves as the recorded layer at
        its relative depth.

        The mean over the mix is moved to ``expected_ffn_experts`` (there the controller holds it); what a domain
        differs by is kept.

        Raises:
            MeasurementError: an unknown domain, or sizes that do not go together.
        """
        if domain is not None and domain not in self.domains:
            raise MeasurementError(f"domain: expected one of {', '.join(self.domains)}; got {domain!r}")
        if not 1 <= moe_topk <= n_routed_experts + zero_expert_num or not 0 <= expected_ffn_experts <= moe_topk:
            raise MeasurementError(
                "resample: expected expected_ffn_experts <= moe_topk <= n_routed_experts + zero_expert_num, such as 8, "
                f"12 and 768; got {expected_ffn_experts:g}, {moe_topk} and {n_routed_experts + zero_expert_num}"
            )
        mix = np.array(self.mix)
        sizes = (n_routed_experts, zero_expert_num, moe_topk)
        if domain is None:
            counts = np.maximum(1, np.round(sequences * mix)).astype(np.int64)
        else:
            counts = np.array([sequences if name == domain else 0 for name in self.domains])
        out = []
        for layer in range(num_layers):
            source = layer * len(self.layers) // num_layers
            moved = _recentred(self.layers[source], mix, expected_ffn_experts / moe_topk)
            drawn = _draw_layer(moved, mix, counts, sequence_tokens, *sizes, np.random.default_rng((seed, layer)))
            out.append(np.concatenate([part for part in drawn if len(part)]))
        note = (
            f"resampled from a fit at {self.n_routed_experts} + {self.zero_expert_num} experts, K {self.moe_topk}"
            + (f", domain {domain}" if domain else "")
        )
        return RoutingTrace(np.stack(out), n_routed_experts, zero_expert_num, note)

    def to_json(self) -> dict[str, Any]:
        """Return the fit as a JSON document."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> RoutingFit:
        """Return the fit of a document that ``to_json`` made.

        Raises:
            MeasurementError: another document.
        """
        try:
            fields: list[dict[str, Any]] = [
                {k: tuple(v) if isinstance(v, list) else v for k, v in layer.items()} for layer in document["layers"]
            ]
            layers = tuple(LayerFit(**layer) for layer in fields)
            rest = {k: document[k] for k in ("n_routed_experts", "zero_expert_num", "moe_topk", "expected_ffn_experts")}
            return cls(tuple(document["domains"]), tuple(document["mix"]), layers, **rest)
        except (KeyError, TypeError) as error:
            raise MeasurementError(f"routing fit: expected a document of RoutingFit.to_json; {error!r}") from None

    @classmethod
    def load(cls, source: str | Path = "bytes-32e") -> RoutingFit:
        """Return a packaged fit by name, or that of a file (YAML or JSON).

        Raises:
            MeasurementError: no such name or file, or another document.
        """
        folder = resources.files("longcat_sim.presets") / "routing"
        names = sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))
        try:
            if str(source) in names:
                text = (folder / f"{source}.yaml").read_text(encoding="utf-8")
            else:
                text = Path(source).read_text(encoding="utf-8")
            document = yaml.safe_load(text)
        except (OSError, yaml.YAMLError) as error:
            raise MeasurementError(
                f"routing fit: expected one of {', '.join(names)} or a file of RoutingFit.to_json; got {str(source)!r} "
                f"({getattr(error, 'strerror', None) or 'not YAML'})"
            ) from None
        return cls.from_json(document if isinstance(document, dict) else {})

    def __str__(self) -> str:
        return json.dumps(self.to_json())


def _logit(p: FloatArray) -> FloatArray:
    p = np.clip(p, 1e-4, 1 - 1e-4)
    return np.log(p / (1 - p))


def _recentred(layer: LayerFit, mix: FloatArray, share: float) -> LayerFit:
    """Return the layer with the domains' FFN shares moved alike (in log odds), so that their mean is ``share``."""
    if not 0 < share < 1:
        return replace(layer, ffn_share=(share,) * len(mix))
    odds = _logit(np.array(layer.ffn_share))
    low, high = -15.0, 15.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if mix @ (1 / (1 + np.exp(-odds - middle))) < share else (low, middle)
    return replace(layer, ffn_share=tuple(map(float, 1 / (1 + np.exp(-odds - (low + high) / 2)))))


def fit_routing(
    traces: Mapping[str, RoutingTrace], mix: Mapping[str, float], *, sequence_tokens: int, seed: int = 0
) -> RoutingFit:
    """Return the fit of one model's traces by text domain; each holds whole sequences of ``sequence_tokens``.

    Raises:
        MeasurementError: traces of different models, or not of whole sequences, or fewer than 4 of them.
    """
    sizes = {(t.n_routed_experts, t.zero_expert_num, t.moe_topk, t.num_layers) for t in traces.values()}
    faults = [
        f"routing fit: {name}: expected at least 4 whole sequences of {sequence_tokens} tokens; got {t.num_tokens} "
        f"tokens"
        for name, t in traces.items()
        if t.num_tokens % sequence_tokens or t.num_tokens < 4 * sequence_tokens
    ]
    if len(sizes) != 1:
        faults.append(f"routing fit: expected traces of one model; got {len(sizes)} different sizes")
    if faults:
        raise MeasurementError(faults)
    ffn, zero, topk, num_layers = sizes.pop()
    shares = np.array([mix[name] for name in traces])
    shares = shares / shares.sum()
    seen = moments(traces, shares, sequence_tokens)
    layers = tuple(_fit_layer(seen[i], shares, ffn, zero, topk, sequence_tokens, seed + i) for i in range(num_layers))
    expected = float(np.mean([(m.mean * shares).sum() for m in seen]) * topk)
    return RoutingFit(tuple(traces), tuple(map(float, shares)), layers, ffn, zero, topk, expected)


def _fit_layer(
    seen: Moments, mix: FloatArray, ffn: int, zero: int, topk: int, sequence_tokens: int, seed: int
) -> LayerFit:
    """Return the parameters whose simulated moments are the recorded ones, by damped steps in each."""
    domains = len(mix)
    share = seen.mean.copy()
    token, sequence = np.full(domains, 0.5), np.full(domains, 0.1)
    skew_ffn, skew_zero, mixed = seen.ffn_skew.copy(), seen.zero_skew.copy(), seen.mixed_skew
    counts = np.full(domains, 16, dtype=np.int64)
    for sweep in range(SWEEPS):
        layer = LayerFit(tuple(share), tuple(token), tuple(sequence), tuple(skew_ffn), tuple(skew_zero), float(mixed))
        rng = np.random.default_rng((seed, 7))
        drawn = [_draw_layer(layer, mix, counts, sequence_tokens, ffn, zero, topk, rng) for _ in range(REPLICAS)]
        simulated = []
        for replica in drawn:
            trace = {str(d): RoutingTrace(part[None], ffn, zero) for d, part in enumerate(replica)}
            simulated.append(moments(trace, mix, sequence_tokens)[0])

        def mean(name: str, of: list[Moments] = simulated) -> FloatArray:
            values = np.stack([getattr(m, name) for m in of])
            return np.sqrt((values**2).mean(0)) if name != "mean" else values.mean(0)

        damping = 1.0 if sweep < SWEEPS // 2 else 0.6

        def ratio(name: str, d: float = damping) -> FloatArray:
            target, got = np.asarray(getattr(seen, name)), mean(name)
            return np.clip(np.maximum(target, 1e-4) / np.maximum(got, 1e-4), 0.5, 2.0) ** d

        if zero:
            odds = _logit(share) + damping * (_logit(seen.mean) - _logit(mean("mean")))
            share = 1 / (1 + np.exp(-odds))
            # the part of the spread that sampling gives is not the shift's: move by the difference of variances
            excess = seen.token_std**2 - mean("token_std") ** 2
            token = np.sqrt(np.clip(token**2 + damping * 20 * excess, 1e-6, 25.0))
            sequence = np.clip(sequence * ratio("sequence_std"), 1e-4, 5.0)
            skew_zero = np.clip(skew_zero * ratio("zero_skew"), 0.0, 5.0)
        skew_ffn = np.clip(skew_ffn * ratio("ffn_skew"), 0.0, 5.0)
        mixed = float(np.clip(mixed * ratio("mixed_skew"), 0.0, 5.0))
    return LayerFit(
        tuple(map(float, share)), tuple(map(float, token)), tuple(map(float, sequence)),
        tuple(map(float, skew_ffn)), tuple(map(float, skew_zero)), mixed,
    )  # fmt: skip
