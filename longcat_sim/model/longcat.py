"""``LongcatFlash``: the executable model. Shape letters: see ``layers.py``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longcat_sim.errors import ModelError
from longcat_sim.model.attention import AttentionVariant
from longcat_sim.model.cache import LatentCache
from longcat_sim.model.layer import Layer, Step
from longcat_sim.model.layers import RMSNorm, Rotary
from longcat_sim.model.mtp import MTPHead
from longcat_sim.records.routing import RoutingTrace
from longcat_sim.specs.model import ModelSpec, model_spec

ABSORBED = AttentionVariant()


class LongcatFlash(nn.Module):
    """LongCat-Flash by its spec, with random weights until some are loaded.

    ``experts`` is the range of FFN experts held here (expert parallelism), all by default; ``mtp`` adds the
    multi-token-prediction head. With ``seed`` the weights are those of the seed, whatever the range.
    """

    def __init__(
        self,
        spec: ModelSpec | str,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        mtp: bool = False,
        experts: range | None = None,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        spec = model_spec(spec) if isinstance(spec, str) else spec
        faults = []
        if spec.layer_kind != "longcat":
            faults.append(f"model: expected a longcat_flash spec, such as longcat-tiny; got {spec.model_type}")
        if spec.rope_type != "default":
            faults.append(f"rope_type: expected default; got {spec.rope_type!r}; the executable model has no other")
        if spec.attention_bias:
            faults.append("attention_bias: expected false (as in the published model); got true")
        if mtp and not spec.num_nextn_predict_layers:
            faults.append("mtp: expected a spec with num_nextn_predict_layers >= 1; got 0")
        if faults:
            raise ModelError(faults)
        device = torch.device(device)
        held = range(spec.n_routed_experts) if experts is None else experts
        self.spec, self.held_experts = spec, held
        kw: dict = {"device": device, "dtype": dtype}
        self.embedding = nn.Embedding(spec.vocab_size, spec.hidden_size, **kw)
        self.layers = nn.ModuleList([Layer(spec, i, held, **kw) for i in range(spec.num_layers)])
        self.norm = RMSNorm(spec.hidden_size, spec.rms_norm_eps, **kw)
        self.head = nn.Linear(spec.hidden_size, spec.vocab_size, bias=False, **kw)
        if spec.tie_word_embeddings:
            self.head.weight = self.embedding.weight
        self.mtp = MTPHead(spec, **kw) if mtp else None
        self.rotary = Rotary(spec.qk_rope_head_dim, spec.rope_theta)
        self._routing: list[list[Tensor]] | None = None
        self.layer_runner: Callable[[Layer, Tensor, Step], Tensor] | None = None
        """Runs a layer in place of its own order; an expert-parallel run puts itself here."""
        if device.type != "meta":
            self.init_weights(seed)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """What the weights are, the router's apart (fp32)."""
        return self.embedding.weight.dtype

    @torch.no_grad()
    def init_weights(self, seed: int | None = None) -> None:
        """Draw all weights from N(0, initializer_range); norms are one and the router's bias zero."""
        generator = torch.Generator(self.device)
        if seed is None:
            generator.seed()
        else:
            generator.manual_seed(seed)
        std = self.spec.initializer_range
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight") or "_norm." in name or name == "norm.weight":
                parameter.fill_(1.0)
            elif ".experts." in name and len(self.held_experts) != self.spec.n_routed_experts:
                # every expert's draw is made, so that a rank holds the very weights of the whole model
                for expert in range(self.spec.n_routed_experts):
                    draw = torch.empty_like(parameter[0]).normal_(0.0, std, generator=generator)
                    if expert in self.held_experts:
                        parameter[expert - self.held_experts.start] = draw
            elif ".experts." in name:
                for expert in parameter:
                    expert.normal_(0.0, std, generator=generator)
            else:
                parameter.normal_(0.0, std, generator=generator)

    # --- passes ------------------------------------------------------------------------------------------------

    def forward(self, tokens_BS: Tensor, *, last_token_only: bool = False) -> Tensor:
        """Return logits [B, S, vocab] of all positions, or [B, vocab] of the last, without a cache.

        Raises:
            ModelError: tokens of a wrong shape or outside the vocabulary.
        """
        B, S = self.check_tokens(tokens_BS)
        hidden_TH = self.run_layers(tokens_BS, self.step(B, S))
        if last_token_only:
            hidden_TH = hidden_TH.view(B, S, -1)[:, -1]
        logits = self.head(hidden_TH)
        return logits if last_token_only else logits.view(B, S, -1)

    def prefill(self, tokens_BS: Tensor, cache: LatentCache, slots: Sequence[int] | None = None) -> Tensor:
        """Append a chunk of S tokens to each sequence of the cache and return the last token's logits [B, vocab].

        Raises:
            ModelError: wrong tokens, or the cache is full.
        """
        return self.head(self.prefill_hidden(tokens_BS, cache, slots)[:, -1])

    def prefill_hidden(self, tokens_BS: Tensor, cache: LatentCache, slots: Sequence[int] | None = None) -> Tensor:
        """Do as ``prefill`` and return the normed hidden state of every new token [B, S, H]."""
        B, S = self.check_tokens(tokens_BS)
        return self.run_layers(tokens_BS, self.step(B, S, cache, slots, None)).view(B, S, -1)

    def decode(
        self,
        tokens_BQ: Tensor,
        cache: LatentCache,
        slots: Sequence[int] | None = None,
        *,
        variant: AttentionVariant = ABSORBED,
    ) -> Tensor:
        """Append Q tokens to each sequence and return the logits of each [B, Q, vocab]; sequences differ in length.

        Raises:
            ModelError: wrong tokens, or the cache is full.
        """
        return self.head(self.decode_hidden(tokens_BQ, cache, slots, variant=variant))

    def decode_hidden(
        self,
        tokens_BQ: Tensor,
        cache: LatentCache,
        slots: Sequence[int] | None = None,
        *,
        variant: AttentionVariant = ABSORBED,
    ) -> Tensor:
        """Do as ``decode`` and return the normed hidden states [B, Q, H]."""
        B, Q = self.check_tokens(tokens_BQ)
        return self.run_layers(tokens_BQ, self.step(B, Q, cache, slots, variant)).view(B, Q, -1)

    def run_layers(self, tokens_BS: Tensor, step: Step) -> Tensor:
        """Return the normed output of the last layer [T, H]."""
        x_TH = self.embedding(tokens_BS).view(-1, self.spec.hidden_size)
        layer: Any
        for layer in self.layers:
            x_TH = layer(x_TH, step) if self.layer_runner is None else self.layer_runner(layer, x_TH, step)
        if self._routing is not None and step.routing is not None:
            self._routing.append(step.routing)
        return self.norm(x_TH)

    def step(
        self,
        batch: int,
        queries: int,
        cache: LatentCache | None = None,
        slots: Sequence[int] | None = None,
        variant: AttentionVariant | None = None,
        *,
        grow: bool = True,
    ) -> Step:
        """Return what one pass over ``batch`` x ``queries`` new tokens needs; grows the cache unless told not to."""
        plan, visible = None, None
        if cache is None:
            starts = [0] * batch
        else:
            slots = range(batch) if slots is None else slots
            if len(slots) != batch:
                raise ModelError(f"slots: expected one per row of tokens ({batch}); got {len(slots)}")
            plan = cache.extend(slots, queries) if grow else cache.at_end(slots, queries)
            starts = [length - queries for length in plan.lengths]
        start = torch.tensor(starts, device=self.device)
        positions_BQ = start[:, None] + torch.arange(queries, device=self.device)
        if plan is not None and (len(set(starts)) > 1 or (queries > 1 and variant is not None)):
            visible = torch.arange(plan.readable, device=self.device) <= positions_BQ[..., None]
        cos_TR, sin_TR = self.rotary.at(positions_BQ.view(-1), max(starts) + queries - 1)
        routing: list[Tensor] | None = [] if self._routing is not None else None
        return Step(batch, queries, cos_TR, sin_TR, cache, plan, variant, visible, routing)

    def check_tokens(self, tokens_BS: Tensor) -> tuple[int, int]:
        """Return B and S of a token array.

        Raises:
            ModelError: not two-dimensional, empty, not integers, or (on a CPU) outside the vocabulary.
        """
        if tokens_BS.dim() != 2 or 0 in tokens_BS.shape:
            raise ModelError(f"tokens: expected a shape [sequences, tokens], none 0; got {list(tokens_BS.shape)}")
        if tokens_BS.dtype not in (torch.int32, torch.int64):
            raise ModelError(f"tokens: expected int32 or int64 ids; got {tokens_BS.dtype}")
        if tokens_BS.device.type == "cpu":  # on a GPU the look would make the host wait
            low, high = int(tokens_BS.min()), int(tokens_BS.max())
            if low < 0 or high >= self.spec.vocab_size:
                got = low if low < 0 else high
                raise ModelError(f"tokens: expected ids 0..{self.spec.vocab_size - 1} (vocab_size); got {got}")
        B, S = tokens_BS.shape
        return B, S

    # --- records -----------------------------------------------------------------------------------------------

    @contextmanager
    def record_routing(self):
        """Collect the routing of every pass inside the ``with`` block; yields a function that returns the trace."""
        kept: list[list[Tensor]] = []
        self._routing = kept
        try:
            yield lambda: self._trace(kept)
        finally:
            self._routing = None

    def _trace(self, kept: list[list[Tensor]]) -> RoutingTrace:
        if not kept:
            raise ModelError("routing: expected at least one pass inside record_routing(); got none")
        layers = [torch.cat([step[i] for step in kept]).cpu().numpy() for i in range(self.spec.num_layers)]
        return RoutingTrace.from_layers(layers, self.spec.n_routed_experts, self.spec.zero_expert_num)

    # --- weights -----------------------------------------------------------------------------------------------

    def load_hf_state_dict(self, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
        """Load weights by the names of transformers 5 or of the published shards.

        Raises:
            ModelError: missing, unknown or wrongly shaped tensors, all of them named.
        """
        from longcat_sim.model.loading import load_hf_state_dict

        load_hf_state_dict(self, state, strict=strict)

    @classmethod
    def from_pretrained(cls, folder: str | Path, **kwargs: Any) -> LongcatFlash:
        """Return the model of a folder with ``config.json`` and ``*.safetensors``.

        Raises:
            SpecError, ModelError: config or weights that cannot be used; pickled weights are refused.
        """
        from longcat_sim.model.loading import from_pretrained

        return from_pretrained(cls, Path(folder), **kwargs)
