"""The package's own errors: whatever a user can cause is a ``UserError`` (exit code 2), the rest is our bug.

A message says, in this order: where, what was expected with an example, what was got, what to do.
"""

from __future__ import annotations

from collections.abc import Sequence


class UserError(ValueError):
    """A fault, or several at once, that the user can mend.

    ``faults`` holds one line per fault; ``str(error)`` joins them with newlines.
    """

    def __init__(self, faults: str | Sequence[str]) -> None:
        self.faults: tuple[str, ...] = (faults,) if isinstance(faults, str) else tuple(faults)
        super().__init__("\n".join(self.faults))


class SpecError(UserError):
    """A model, hardware, deployment, workload or scenario description that cannot be used."""


class MemoryFitError(SpecError):
    """A deployment that does not fit in device memory; says by how much and what would fit."""


class MeasurementError(UserError):
    """A measurement file or set that cannot be used for a fit."""


class UnmeasuredOpError(UserError):
    """A profile that lacks an op kind which the deployment needs."""


class WorkloadError(UserError):
    """A trace or synthetic workload that cannot be served."""


class ModelError(UserError):
    """Weights, tokens or a cache that the executable model cannot use."""


class TrainingError(UserError):
    """A training run's settings, text or checkpoint that cannot be used."""


class ScheduleError(UserError):
    """A schedule with a cycle, a forgotten op, or an overlap that the model does not allow."""


class CapacityError(UserError):
    """A capacity question without a feasible answer; says what is closest and which constraint fails."""
