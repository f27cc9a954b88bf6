"""Read and change any figure of a scenario by its dotted path."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from longcat_sim.errors import CapacityError
from longcat_sim.specs.base import ParsedFloat
from longcat_sim.specs.scenario import Scenario


def read_path(scenario: Scenario, path: str) -> Any:
    """Return the figure at a dotted path, such as ``hardware.scale_out.bandwidth``, in base units.

    Raises:
        CapacityError: there is no such figure; says what there is.
    """
    node: Any = scenario
    done: list[str] = []
    for part in path.split("."):
        name, index = (part.split("[")[0], int(part.split("[")[1][:-1])) if part.endswith("]") else (part, None)
        known = _names(node)
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
            raise CapacityError(f"{path}: expected a figure of the scenario; got {name!r}; {hint}")
        node = node[name] if isinstance(node, Mapping) else getattr(node, name)
        done.append(part)
        if node is None:
            raise CapacityError(f"{path}: expected a figure; {'.'.join(done)} is not set here; set it first")
        if index is not None:
            if not isinstance(node, Sequence) or not -len(node) <= index < len(node):
                raise CapacityError(f"{path}: expected an index below {len(node)}; got {index}; choose a smaller one")
            node = node[index]
    return node


def _names(node: Any) -> list[str]:
    if isinstance(node, Scenario):
        return ["model", "hardware", "deployment", "routing", "speculative", "step", "serve", "price", "seed", "draws"]
    if isinstance(node, Mapping):
        return list(node)
    return list(type(node).model_fields) if hasattr(type(node), "model_fields") else []


def with_figure(scenario: Scenario, path: str, value: float) -> Scenario:
    """Return the scenario with a number in base units at ``path``; a count is rounded, a ratio list is spread.

    Raises:
        SpecError: the value does not fit there.
        CapacityError: no such path, or no number there.
    """
    return scenario.what_if({path: encoded(scenario, path, value)})


def encoded(scenario: Scenario, path: str, value: float) -> Any:
    """Return ``value`` as what the field at ``path`` takes.

    Raises:
        CapacityError: there is no number at ``path``.
    """
    now = read_path(scenario, path)
    if isinstance(now, bool) or not isinstance(now, int | float | tuple):
        raise CapacityError(f"{path}: expected a number; it is {now!r}; choose a numeric figure")
    if isinstance(now, tuple):
        return [float(value)] * len(now)
    return round(value) if isinstance(now, int) else ParsedFloat(value)


def number_at(scenario: Scenario, path: str) -> float:
    """Return the number at ``path``; of a list of equal kinds, its mean.

    Raises:
        CapacityError: no such path, or no number there.
    """
    now = read_path(scenario, path)
    if isinstance(now, tuple) and now and all(isinstance(v, int | float) for v in now):
        return float(sum(now) / len(now))
    if isinstance(now, bool) or not isinstance(now, int | float):
        raise CapacityError(f"{path}: expected a number; it is {now!r}; choose a numeric figure")
    return float(now)
