"""The multi-token-prediction head: from the hidden state of a position and the next token, the token after it.

    h = eh_proj(concat(norm_e(embed(next token)), norm_h(hidden))) -> one dense layer -> norm -> the model's own head

Source: LongCat-Flash Technical Report, arXiv 2509.01322v2, section 2.4 (one dense layer); data flow as in SGLang
``longcat_flash_nextn.py``. Shape letters: see ``layers.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longcat_sim.model.attention import MLA
from longcat_sim.model.layer import Step, attend
from longcat_sim.model.layers import DenseFFN, RMSNorm
from longcat_sim.specs.model import ModelSpec


class MTPHead(nn.Module):
    """One MTP head; embedding and output projection are the model's."""

    def __init__(self, spec: ModelSpec, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        hidden, eps = spec.hidden_size, spec.rms_norm_eps
        self.sublayer = spec.num_attention_sublayers
        kw: dict = {"device": device, "dtype": dtype}
        self.embed_norm = RMSNorm(hidden, eps, **kw)
        self.hidden_norm = RMSNorm(hidden, eps, **kw)
        self.join = nn.Linear(2 * hidden, hidden, bias=False, **kw)
        self.input_norm = RMSNorm(hidden, eps, **kw)
        self.attention = MLA(spec, **kw)
        self.post_norm = RMSNorm(hidden, eps, **kw)
        self.ffn = DenseFFN(hidden, spec.ffn_hidden_size, **kw)
        self.norm = RMSNorm(hidden, eps, **kw)

    def forward(self, embedded_TH: Tensor, hidden_TH: Tensor, step: Step) -> Tensor:
        """Return the normed hidden state that predicts the token after the next [T, H]."""
        joined = torch.cat([self.embed_norm(embedded_TH), self.hidden_norm(hidden_TH)], dim=-1)
        x_TH = self.join(joined)
        q_TnD, latent_TD = self.attention.project(self.input_norm(x_TH), step.cos_TR, step.sin_TR)
        h_TH = x_TH + self.attention.out(attend(self.attention, self.sublayer, q_TnD, latent_TD, step))
        return self.norm(h_TH + self.ffn(self.post_norm(h_TH)))
