"""Published results that predictions are reported against; never fitted."""

from __future__ import annotations

from importlib import resources
from typing import Any

import yaml


def targets(name: str) -> dict[str, Any]:
    """Return one file of published results."""
    text = (resources.files("longcat_sim.presets") / "targets" / f"{name}.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)
