"""longcat_sim: an executable LongCat-Flash, its measured operator times, and a simulator of overlap, serving and cost.

    import longcat_sim as ls
    scenario = ls.scenario("longcat-flash-h800-decode")
    result = ls.simulate(scenario)

Everything here is loaded on first use: importing the package loads neither torch nor plotly.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

_LAZY: dict[str, str] = {
    "scenario": "longcat_sim.specs.scenario",
    "scenario_names": "longcat_sim.specs.scenario",
    "Scenario": "longcat_sim.specs.scenario",
    "ModelSpec": "longcat_sim.specs.model",
    "model_spec": "longcat_sim.specs.model",
    "load_hardware": "longcat_sim.specs.hardware",
    "hardware_names": "longcat_sim.specs.hardware",
    "OpTimes": "longcat_sim.calibration.op_times",
    "simulate": "longcat_sim.studies.simulate",
    "compare": "longcat_sim.studies.compare",
}

__all__ = ["__version__"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        value = getattr(import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'longcat_sim' has no attribute {name!r}; it has {', '.join(sorted(_LAZY))}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
