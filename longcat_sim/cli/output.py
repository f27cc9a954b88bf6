"""What every verb prints: one JSON document on stdout, everything else on stderr."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longcat_sim.specs.scenario import Scenario


def say(text: str) -> None:
    """Print progress or a remark to stderr."""
    print(text, file=sys.stderr)


@contextmanager
def bar(title: str) -> Iterator[Callable[[str, float, float], None]]:
    """Yield a callback (what runs, share done, seconds left) that draws a progress bar on stderr."""
    from tqdm import tqdm

    with tqdm(
        total=100, desc=title, file=sys.stderr, disable=None,
        bar_format="{desc:<34} {percentage:3.0f}% |{bar:30}| {elapsed} {postfix}",
    ) as line:  # fmt: skip

        def tell(what: str, share: float, left_s: float) -> None:
            line.set_description_str(f"{title}: {what}"[:34], refresh=False)
            line.set_postfix_str(f"about {max(left_s, 0):.0f} s left", refresh=False)
            line.update(max(0.0, share * 100 - line.n))

        yield tell


def print_json(document: Any) -> None:
    """Print exactly one JSON document on stdout.

    Raises:
        AssertionError: a NaN or an infinity reached a result, which is our bug.
    """
    text = json.dumps(_finite(document, "$"), indent=2, allow_nan=False)
    sys.stdout.write(text + "\n")


def _finite(value: Any, at: str) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(inner, f"{at}.{key}") for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner, f"{at}[{index}]") for index, inner in enumerate(value)]
    if hasattr(value, "item") and not isinstance(value, (str, bytes)):
        value = value.item()
    if isinstance(value, float):
        assert math.isfinite(value), f"{at} is {value}"
    return value


def load(name: str, settings: Sequence[str]) -> Scenario:
    """Return a scenario with the ``--set`` options applied; a fault that one of them made cites it.

    Raises:
        SpecError: every fault of the file and of the options.
    """
    from longcat_sim.errors import SpecError
    from longcat_sim.specs.changes import parse_changes
    from longcat_sim.specs.scenario import scenario

    changes = parse_changes(settings)
    given = {setting.partition("=")[0].strip(): setting for setting in settings}
    try:
        return scenario(name, changes)
    except SpecError as error:
        raise SpecError([_cited(fault, given) for fault in error.faults]) from None


_FAULT = re.compile(r"(?:[^\s:]+(?::\d+)?: )?(?P<path>[A-Za-z_][\w.\[\]-]*): (?P<rest>.*)", re.DOTALL)


def _by_dots(path: str) -> str:
    """Return a path with the places of lists between dots, ``slo.0.ttft`` for ``slo[0].ttft``."""
    return re.sub(r"\[(\w+)\]", r".\1", path)


def _cited(fault: str, given: Mapping[str, str]) -> str:
    """Return a fault with the option in place of the file and line, if an option set what it is about."""
    found = _FAULT.fullmatch(fault)
    if found is None:
        return fault
    path = _by_dots(re.sub(r"^step\.(decode|prefill)\.", "step.", found["path"]))
    for written, setting in reversed(list(given.items())):  # the last of two that set it
        key = _by_dots(written)
        at = path if f"{path}.".startswith(f"{key}.") else path.replace(".0.", ".")  # a list of one needs no place
        if f"{at}.".startswith(f"{key}."):
            inner = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", at[len(key) :]).lstrip(".")
            return f"--set {setting}: {inner + ': ' if inner else ''}{found['rest']}"
        if key.startswith(f"{path}.") and re.search(rf"\b{re.escape(key.rpartition('.')[2])}\b", found["rest"]):
            return f"--set {setting}: {found['rest']}"  # a fault of several keys, one of them given
    return fault
