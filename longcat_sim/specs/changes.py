"""Changes of a description by dotted path, such as ``deployment.overlap=tbo``: read from text, and applied."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import yaml

from longcat_sim.errors import SpecError


def _number(value: Any) -> Any:
    """Return ``1e6`` as the number that people mean; YAML reads only ``1.0e+6`` as one."""
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        return int(float(value)) if float(value).is_integer() else float(value)
    if isinstance(value, list):
        return [_number(each) for each in value]
    if isinstance(value, dict):
        return {key: _number(each) for key, each in value.items()}
    return value


def parse_changes(settings: Sequence[str]) -> dict[str, Any]:
    """Return ``{"a.b": value}`` of ``a.b=value`` strings; values are read as YAML.

    Raises:
        SpecError: a setting without ``=`` or without a path.
    """
    changes: dict[str, Any] = {}
    faults = []
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals or not path.strip():
            faults.append(f"--set: expected path=value, such as deployment.overlap=sbo; got {setting!r}")
            continue
        try:
            changes[path.strip()] = _number(yaml.safe_load(text))
        except yaml.YAMLError:
            faults.append(f"--set {path}: expected a YAML value; got {text!r}")
    if faults:
        raise SpecError(faults)
    return changes


def apply_changes(document: Mapping[str, Any], changes: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return a copy of ``document`` with values set by dotted path, and the faults; missing mappings are made.

    An entry of a list is named by its place, ``acceptance.0`` or ``acceptance[0]``; a list of one mapping needs none.
    A path into a list that names none of its places is a fault, and so is a place in what is no list.
    """
    result: dict[str, Any] = json.loads(json.dumps(document, default=str))
    faults: list[str] = []
    for path, value in changes.items():
        parts = path.replace("[", ".[").split(".")
        if not all(re.fullmatch(r"[^][]+|\[\w+\]", part) for part in parts):
            faults.append(
                f"expected names joined by single dots, such as deployment.overlap or serve.slo[0].ttft; got {path!r}"
            )
            continue
        try:
            _put(result, parts, deepcopy(value), "")  # a later path may set something inside the value
        except SpecError as error:
            faults += error.faults
    return result, faults


def _put(node: Any, parts: Sequence[str], value: Any, where: str) -> None:
    """Set ``value`` at ``parts`` below ``node``, which lies at ``where``."""
    part, rest = parts[0], parts[1:]
    key: Any = part
    if isinstance(node, list):
        if len(node) == 1 and isinstance(node[0], dict) and part.isidentifier():
            return _put(node[0], parts, value, f"{where}.0")
        if not node:
            raise SpecError(
                f"{where}: expected a list with a place {part.strip('[]')}; it is empty; give the whole list"
            )
        if part.strip("[]") not in map(str, range(len(node))):
            raise SpecError(
                f"{where}: expected a place from 0 to {len(node) - 1}, such as {'.'.join([where, '0', *rest])}; "
                f"got {part.strip('[]')!r}; or give the whole list"
            )
        key = int(part.strip("[]"))
    elif part.startswith("["):
        raise SpecError(f"{where}: expected a list; got {node or 'none'}; leave {part} out or give the whole list")
    if not rest:
        node[key] = value
        return None
    below = f"{where}.{key}".lstrip(".")
    inside = node[key] if isinstance(node, list) else node.get(key)
    if not isinstance(inside, (dict, list)):
        if rest[0].startswith("["):
            return _put(inside, rest, value, below)  # no list: says so
        inside = node[key] = {}
    return _put(inside, rest, value, below)
