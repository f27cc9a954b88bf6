"""Topology: whether the links that there are can carry a deployment's groups."""

from __future__ import annotations

from longcat_sim.errors import SpecError
from longcat_sim.specs.deployment import Deployment
from longcat_sim.specs.hardware import HardwareSpec


def check_topology(hardware: HardwareSpec, deployment: Deployment) -> None:
    """Raise SpecError, with every fault, unless the device's links can carry the deployment's groups.

    Tensor parallelism must stay inside the scale-up domain; expert parallelism beyond it needs a scale-out link.
    """
    faults = []
    domain = hardware.domain_size
    for name, size in (("tp_size", deployment.tp_size), ("dense_tp_size", deployment.dense_tp)):
        if size > domain:
            faults.append(
                f"deployment.{name}: expected at most {domain}, the scale-up domain of {hardware.name}, so that its "
                f"collectives stay on that link; got {size}; use a smaller degree"
            )
    if deployment.ep_size > domain and hardware.scale_out is None:
        faults.append(
            f"deployment.ep_size: expected at most {domain} on {hardware.name}, which has no scale_out link; "
            f"got {deployment.ep_size}; add scale_out: {{bandwidth: 50 GB/s}} to the profile or use fewer ranks"
        )
    if faults:
        raise SpecError(faults)
