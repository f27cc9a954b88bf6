"""The command that simulates one candidate of a search."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

import yaml

from longcat_sim.specs.base import ParsedFloat
from longcat_sim.specs.scenario import Scenario, scenario_names


def replay_command(scenario: Scenario, changes: Mapping[str, Any], source: str = "") -> str | None:
    """Return the one-line ``simulate`` of a scenario with ``changes``; ``source`` is its name or path, where known.

    None where a command line cannot say it: a scenario without a file, or a figure that was set without its unit.
    """
    known = source or (scenario.name if scenario.name in scenario_names() else scenario.where)
    made = scenario.what_if(changes).changes
    settings = {path: value for path, value in made.items() if path.split(".")[0] != "search"}
    if known == "scenario" or any(isinstance(value, ParsedFloat) for value in settings.values()):
        return None
    words = [known, *(word for path, value in settings.items() for word in ("--set", f"{path}={_flow(value)}"))]
    return f"python -m longcat_sim simulate {shlex.join(words)}"


def _flow(value: Any) -> str:
    """Return a value as YAML in one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
    return text.removesuffix("...\n").strip()
