"""What is studied: models, hardware, deployments, workloads and scenarios as frozen, checked data."""

from longcat_sim.specs.model import ModelSpec, model_names, model_spec

__all__ = ["ModelSpec", "model_names", "model_spec"]
