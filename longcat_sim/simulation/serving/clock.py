"""What happens at one instant, in order, and the event that a call-back is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import simpy

STEP_END, FAULT, TRANSFER, ARRIVAL, SCALE, COMPOSE = (n << 40 for n in range(6))


class Call(simpy.Event):
    """A triggered event with one callback."""

    def __init__(self, callback: Callable[[Any], None]) -> None:
        self.callbacks = [callback]
        self._ok = True
