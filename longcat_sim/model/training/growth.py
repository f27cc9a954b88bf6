"""Model growth: a shallow model's layers, stacked r times, are the start of the deep one.

Layer i of the deep model is layer i mod L of the shallow one (the stack repeated as a whole), embedding, final norm
and output projection are carried over. Sample counter and schedule go on. Source: LongCat-Flash Technical Report,
arXiv 2509.01322v2, section 3.1.2 (r = 2; the report's stacking order is that of Du et al., arXiv 2405.15319, G_stack).
"""

from __future__ import annotations

import re

import torch

from longcat_sim.errors import TrainingError
from longcat_sim.model.longcat import LongcatFlash
from longcat_sim.model.training.loop import Trainer
from longcat_sim.model.training.optimizer import optimizer_tensors, restore_optimizer

_LAYER = re.compile(r"^layers\.(\d+)\.")


def source_name(name: str, shallow_layers: int) -> str:
    """Return the shallow model's name of a deep model's tensor."""
    match = _LAYER.match(name)
    return name if not match else f"layers.{int(match[1]) % shallow_layers}.{name[match.end() :]}"


@torch.no_grad()
def grow(trainer: Trainer, factor: int = 2, *, keep_moments: bool = True) -> Trainer:
    """Return a trainer of the stacked model that goes on at the same step, schedule and text.

    ``keep_moments`` stacks Adam's moments with the weights; otherwise they start at zero.

    Raises:
        TrainingError: a factor below 2.
    """
    if factor < 2:
        raise TrainingError(f"growth: expected a factor of at least 2, such as 2; got {factor}")
    old = trainer.model
    shallow = old.spec.num_layers
    spec = old.spec.replace(num_layers=shallow * factor)
    model = LongcatFlash(spec, device=old.device, dtype=old.dtype, mtp=old.mtp is not None, seed=0)
    state = old.state_dict()
    model.load_state_dict({name: state[source_name(name, shallow)] for name in model.state_dict()})
    grown = Trainer(model, trainer.config, trainer.corpus, init=False)
    grown.step_done = trainer.step_done
    grown.tokens_seen = trainer.tokens_seen
    grown.history = list(trainer.history)
    if keep_moments:
        moments = optimizer_tensors(trainer.optimizer)
        stacked = {}
        for name, _ in model.named_parameters():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                source = f"{source_name(name, shallow)}/{key}"
                if source in moments:
                    stacked[f"{name}/{key}"] = moments[source]
        restore_optimizer(grown.optimizer, stacked)
    return grown
