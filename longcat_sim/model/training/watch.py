"""``Watch``: what the recipe looks at inside a model, collected by hooks; the model itself knows nothing of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import Tensor

from longcat_sim.model.layer import Layer
from longcat_sim.model.longcat import LongcatFlash
from longcat_sim.model.moe import Routing


def layers_of(model: LongcatFlash) -> list[Layer]:
    """Return the model's layers, typed."""
    return cast("list[Layer]", list(model.layers))


class Watch:
    """Routing of each layer and the last layer's output before the final norm, of the latest pass."""

    def __init__(self) -> None:
        self.routings: list[Routing] = []
        self.last_hidden_TH: Tensor | None = None

    @contextmanager
    def on(self, model: LongcatFlash) -> Iterator[Watch]:
        """Collect inside the block."""
        self.routings, self.last_hidden_TH = [], None
        hooks = [layer.router.register_forward_hook(self._router) for layer in layers_of(model)]
        hooks.append(model.norm.register_forward_pre_hook(self._hidden))
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def _router(self, module: object, inputs: object, output: Routing) -> None:
        self.routings.append(output)

    def _hidden(self, module: object, inputs: tuple[Tensor, ...]) -> None:
        self.last_hidden_TH = inputs[0]
