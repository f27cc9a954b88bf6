"""Generation, plain and speculative: draft with the MTP head, verify with the model, accept what it would have said.

Plain generation is the same loop with no drafts. Shape letters: see ``layers.py``; G drafts, W vocabulary.

Source of the acceptance rule: Leviathan et al., arXiv 2211.17192, Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from longcat_sim.errors import ModelError
from longcat_sim.model.attention import AttentionVariant
from longcat_sim.model.cache import LatentCache
from longcat_sim.model.longcat import ABSORBED, LongcatFlash


@dataclass
class Generation:
    """New tokens of each prompt, and how the drafts fared."""

    tokens: list[list[int]]
    steps: int = 0
    """Passes of the whole model after the prefill."""
    drafted: list[int] = field(default_factory=list)
    """By position: drafts that were put to the test, those before them all accepted."""
    accepted: list[int] = field(default_factory=list)
    """By position: drafts accepted."""

    @property
    def acceptance(self) -> list[float]:
        """Acceptance by position, conditional on the positions before; NaN where none was tested."""
        return [a / d if d else float("nan") for a, d in zip(self.accepted, self.drafted, strict=True)]


@torch.inference_mode()
def generate(
    model: LongcatFlash,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    draft_tokens: int = 0,
    variant: AttentionVariant = ABSORBED,
    stop_token: int | None = None,
    seed: int = 0,
    cache: LatentCache | None = None,
) -> Generation:
    """Return ``max_new_tokens`` tokens after each prompt (fewer where ``stop_token`` comes first).

    Temperature 0 takes the likeliest token. ``draft_tokens`` > 0 needs a model with ``mtp=True``; the output is the
    same as without (greedy) or has the same distribution (sampled).

    Raises:
        ModelError: no prompt, an empty one, wrong tokens, no MTP head for drafts, or a cache that is full.
    """
    if not prompts or any(len(prompt) == 0 for prompt in prompts):
        raise ModelError(
            "prompts: expected one or more, none empty, such as [[256, 72, 105]]; got none or an empty one"
        )
    if max_new_tokens < 1:
        raise ModelError(f"max_new_tokens: expected at least 1; got {max_new_tokens}")
    if not temperature >= 0 or draft_tokens < 0:
        raise ModelError(f"expected temperature >= 0 and draft_tokens >= 0; got {temperature} and {draft_tokens}")
    if draft_tokens and model.mtp is None:
        raise ModelError("draft_tokens: expected a model with an MTP head; got none; build it with mtp=True")
    if cache is None:
        longest = max(map(len, prompts)) + max_new_tokens + draft_tokens + 1
        cache = LatentCache(
            model.spec, num_sequences=len(prompts), max_tokens=longest, mtp=model.mtp is not None,
            device=model.device, dtype=model.dtype,
        )  # fmt: skip
    run = _Run(model, cache, temperature, draft_tokens, variant, torch.Generator(model.device).manual_seed(seed))
    made = Generation([[] for _ in prompts], 0, [0] * draft_tokens, [0] * draft_tokens)
    run.begin(prompts)
    for slot, token in enumerate(run.last.tolist()):
        made.tokens[slot].append(token)
    slots = list(range(len(prompts)))
    while True:
        done = [
            len(made.tokens[slot]) >= max_new_tokens or (stop_token is not None and stop_token in made.tokens[slot])
            for slot in slots
        ]
        slots = run.keep(slots, [not over for over in done])
        if not slots:
            break
        tokens_BG, accepted_B = run.round(slots)
        made.steps += 1
        for slot, row, accepted in zip(slots, tokens_BG.tolist(), accepted_B.tolist(), strict=True):
            made.tokens[slot] += row[: accepted + 1]
            for i in range(min(accepted + 1, draft_tokens)):
                made.drafted[i] += 1
                made.accepted[i] += i < accepted
    made.tokens = [_cut(tokens, max_new_tokens, stop_token) for tokens in made.tokens]
    return made


def _cut(tokens: list[int], count: int, stop_token: int | None) -> list[int]:
    tokens = tokens[:count]
    return tokens[: tokens.index(stop_token) + 1] if stop_token in tokens else tokens


@dataclass
class _Run:
    """The state of a generation: per active sequence, its last token (not yet in the cache) and the MTP's output."""

    model: LongcatFlash
    cache: LatentCache
    temperature: float
    drafts: int
    variant: AttentionVariant
    generator: torch.Generator
    last: Tensor = field(init=False)
    mtp_BH: Tensor = field(init=False)

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """Prefill every prompt and choose its first token."""
        by_length: dict[int, list[int]] = {}
        for slot, prompt in enumerate(prompts):
            by_length.setdefault(len(prompt), []).append(slot)
        device, hidden = self.model.device, self.model.spec.hidden_size
        self.last = torch.empty(len(prompts), dtype=torch.long, device=device)
        self.mtp_BH = torch.empty(len(prompts) if self.drafts else 0, hidden, device=device, dtype=self.model.dtype)
        for slots in by_length.values():
            tokens = torch.tensor([list(prompts[slot]) for slot in slots], device=device)
            hidden_BSH = self.model.prefill_hidden(tokens, self.cache, slots)
            first = self.choose(self.model.head(hidden_BSH[:, -1]))
            self.last[slots] = first
            if self.drafts:
                following = torch.cat([tokens[:, 1:], first[:, None]], dim=1)
                self.mtp_BH[slots] = self.run_mtp(following, hidden_BSH, slots, None)[:, -1]

    def keep(self, slots: list[int], wanted: list[bool]) -> list[int]:
        """Drop sequences that are done."""
        if not all(wanted):
            mask = torch.tensor(wanted, device=self.last.device)
            self.last = self.last[mask]
            if self.drafts:
                self.mtp_BH = self.mtp_BH[mask]
        return [slot for slot, want in zip(slots, wanted, strict=True) if want]

    def round(self, slots: list[int]) -> tuple[Tensor, Tensor]:
        """Draft, verify and accept; return tokens [B, G+1], of which the first accepted + 1 count, and accepted [B]."""
        starts = [self.cache.lengths[slot] for slot in slots]
        draft_BG, proposal_BGW = self.draft(slots, starts)
        tested = torch.cat([self.last[:, None], draft_BG], dim=1)
        hidden_BQH = self.model.decode_hidden(tested, self.cache, slots, variant=self.variant)
        logits_BQW = self.model.head(hidden_BQH)
        if self.temperature == 0:
            tokens = logits_BQW.argmax(-1)
            accepted = (tokens[:, :-1] == draft_BG).long().cumprod(1).sum(1)
        else:
            tokens, accepted = self.accept(draft_BG, proposal_BGW, self.distribution(logits_BQW))
        rows = torch.arange(len(slots), device=tokens.device)
        self.last = tokens[rows, accepted]
        if self.drafts:
            self.mtp_BH = self.run_mtp(tokens, hidden_BQH, slots, self.variant)[rows, accepted]
        for slot, start, count in zip(slots, starts, accepted.tolist(), strict=True):
            self.cache.truncate(slot, start + count + 1)
        return tokens, accepted

    def draft(self, slots: list[int], starts: list[int]) -> tuple[Tensor, Tensor]:
        """Return drafts [B, G] and, when sampling, the distributions that they were drawn from [B, G, W]."""
        tokens: list[Tensor] = []
        proposals: list[Tensor] = []
        hidden_BH = self.mtp_BH if self.drafts else None
        for i in range(self.drafts):
            assert hidden_BH is not None
            if i:  # the head feeds on its own output; its cache entries are overwritten after the verification
                self.cache.extend(slots, 1)
                hidden_BH = self.run_mtp(tokens[-1][:, None], hidden_BH[:, None], slots, self.variant)[:, 0]
            logits_BW = self.model.head(hidden_BH)
            proposals.append(self.distribution(logits_BW) if self.temperature else logits_BW)
            tokens.append(self.choose(logits_BW))
        for slot, start in zip(slots, starts, strict=True):
            self.cache.truncate(slot, start)
        if not tokens:
            return self.last.new_empty(len(slots), 0), self.last.new_empty(len(slots), 0, 0)
        return torch.stack(tokens, 1), torch.stack(proposals, 1)

    def accept(self, draft_BG: Tensor, q_BGW: Tensor, p_BQW: Tensor) -> tuple[Tensor, Tensor]:
        """Accept draft i with probability min(1, p/q); at the first refusal draw from max(p - q, 0), else from p."""
        B, G = draft_BG.shape
        chance = torch.rand(B, G, generator=self.generator, device=draft_BG.device, dtype=p_BQW.dtype)
        p_BG = p_BQW[:, :G].gather(2, draft_BG[..., None])[..., 0]
        q_BG = q_BGW.gather(2, draft_BG[..., None])[..., 0] if G else p_BG
        accepted = (chance * q_BG < p_BG).long().cumprod(1).sum(1)
        rows = torch.arange(B, device=draft_BG.device)
        left_BW = p_BQW[rows, accepted]
        if G:
            refused = (accepted < G)[:, None]
            left_BW = torch.where(refused, (left_BW - q_BGW[rows, accepted.clamp(max=G - 1)]).clamp(min=0), left_BW)
        final = torch.multinomial(left_BW, 1, generator=self.generator)
        tokens = torch.cat([draft_BG, final], dim=1)
        tokens[rows, accepted] = final[:, 0]
        return tokens, accepted

    def run_mtp(
        self, next_BS: Tensor, hidden_BSH: Tensor, slots: list[int], variant: AttentionVariant | None
    ) -> Tensor:
        """Run the MTP head on the last S positions of the cache; ``next_BS`` holds the token after each."""
        assert self.model.mtp is not None
        B, S = next_BS.shape
        step = self.model.step(B, S, self.cache, slots, variant, grow=False)
        embedded = self.model.embedding(next_BS).view(B * S, -1)
        return self.model.mtp(embedded, hidden_BSH.reshape(B * S, -1), step).view(B, S, -1)

    def distribution(self, logits: Tensor) -> Tensor:
        """Return probabilities at the run's temperature."""
        return (logits / self.temperature).softmax(-1)

    def choose(self, logits_BW: Tensor) -> Tensor:
        """Return one token per row [B]."""
        if self.temperature == 0:
            return logits_BW.argmax(-1)
        return torch.multinomial(self.distribution(logits_BW), 1, generator=self.generator)[:, 0]
