"""Read YAML descriptions so that every fault of a file is reported at once, each with file, line, key and a remedy."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from longcat_sim.errors import SpecError

M = TypeVar("M", bound=BaseModel)
Lines = dict[tuple, int]
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # a profile with a fit: 0.1 s by libyaml, 0.7 s without


def read_yaml(path: Path) -> tuple[Any, Lines, list[str]]:
    """Return the document of a YAML file, the line of each key path, and the faults found while reading.

    Raises:
        SpecError: the file is missing, not text, empty, or not YAML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(f"{path}: expected a YAML file; there is none; check the path") from None
    except (UnicodeDecodeError, OSError) as error:
        raise SpecError(f"{path}: expected a readable YAML text file; got {error}") from None
    try:
        root = yaml.compose(text, Loader=LOADER)
        document = yaml.load(text, Loader=LOADER)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        problem = getattr(error, "problem", None) or str(error)
        raise SpecError(f"{path.name}:{line}: expected YAML; got {problem}; mend the line") from None
    if root is None:
        raise SpecError(f"{path.name}:1: expected a description; got an empty file")
    lines: Lines = {(): 1}
    faults: list[str] = []

    def walk(node: yaml.Node, at: tuple) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                here = (*at, key.value)
                line = key.start_mark.line + 1
                if here in lines:
                    faults.append(
                        f"{path.name}:{line}: {dotted(here)}: expected each key once; it is also on line "
                        f"{lines[here]}; remove one"
                    )
                lines[here] = line
                walk(value, here)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                lines[(*at, index)] = value.start_mark.line + 1
                walk(value, (*at, index))

    walk(root, ())
    return document, lines, faults


def validate(
    kind: type[M], document: Any, *, where: str, lines: Lines | None = None, at: tuple = (),
    context: Mapping[str, Any] | None = None,
) -> M:  # fmt: skip
    """Return ``document`` as a checked ``kind``.

    ``where`` names the file (or argument); ``lines`` maps key paths to lines; ``at`` is the path of ``document`` in it;
    ``context`` is what validators are told beside it.

    Raises:
        SpecError: every fault of the document, one a line.
    """
    try:
        return kind.model_validate(document, context=context)
    except ValidationError as error:
        raise SpecError(explain(error, kind, where=where, lines=lines, at=at)) from None


def explain(
    error: ValidationError, kind: type[BaseModel], *, where: str, lines: Lines | None = None, at: tuple = ()
) -> list[str]:
    """Return pydantic's faults as sentences: where, expected, got, what to do."""
    faults = []
    for fault in map(_at_its_tag, error.errors()):
        path = (*at, *(part for part in fault["loc"] if not _is_type_label(part)))
        if len(path) > 2 and path[0] == "step" and path[1] in ("decode", "prefill"):
            path = ("step", *path[2:])  # which of the two it is stands in ``phase``, not in the path
        line = _line(lines, path)
        faults.append(f"{where}{line}: {dotted(path) or kind.__name__}: {sentence(fault, kind)}")
    return faults


def _at_its_tag(fault: Any) -> Mapping[str, Any]:
    """Return a fault of the key that tells the models of a union apart as one of that key, not of the mapping."""
    if not fault["type"].startswith("union_tag"):
        return fault
    loc = (*fault["loc"], fault["ctx"]["discriminator"].strip("'"))
    if fault["type"] == "union_tag_not_found":
        return {**fault, "type": "missing", "loc": loc}
    return {
        **fault,
        "msg": f"expected one of {fault['ctx']['expected_tags']}",
        "loc": loc,
        "input": fault["ctx"]["tag"],
    }


def sentence(fault: Mapping[str, Any], kind: type) -> str:
    """Return one of pydantic's faults, at its place in ``kind``, as expected, got, what to do."""
    got = fault.get("input")
    match fault["type"]:
        case "extra_forbidden":
            known = _known_keys(kind, fault["loc"][:-1])
            near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
            return f"expected a known key; got {fault['loc'][-1]!r}; {remedy}"
        case "missing":
            example = _example(kind, fault["loc"])
            such = f", such as {fault['loc'][-1]}: {example}" if example else ""
            return f"expected this key; it is missing; add it{such}"
        case "value_error":
            return str(fault["msg"]).removeprefix("Value error, ")
        case _:
            shown = repr(got) if not isinstance(got, Mapping) else "a mapping"
            expected = fault["msg"].replace("Input should be", "expected").replace("a valid tuple", "a list")
            example = _example(kind, fault["loc"])
            return f"{expected}{f', such as {example}' if example else ''}; got {shown}"


def _example(kind: type, path: tuple) -> str | None:
    """Return what the field at ``path`` under ``kind`` gives as an example of itself, if anything."""
    model = _model_at(kind, path[:-1])
    field = model.model_fields.get(path[-1]) if path and _is_model(model) else None
    return str(field.examples[0]) if field is not None and field.examples else None


def _known_keys(kind: type, path: tuple) -> list[str]:
    """Return the keys that the model at ``path`` under ``kind`` knows."""
    model = _model_at(kind, path)
    return list(model.model_fields) if _is_model(model) else []


def _model_at(kind: type, path: tuple) -> Any:
    """Return the model at ``path`` under ``kind``; of a union, the one with that tag."""
    current: Any = kind
    union: list[type[BaseModel]] = []
    for part in path:
        field = current.model_fields.get(part) if _is_model(current) else None
        if field is not None:
            union = _models_in(field.annotation)
            current = next(iter(union), current)
        else:
            current = next((model for model in union if part in _tags(model)), current)
    return current


def _tags(model: type[BaseModel]) -> set[Any]:
    """Return what a model's fields of one of a few words may hold, such as ``prefill``."""
    return {word for field in model.model_fields.values() for word in getattr(field.annotation, "__args__", ())}


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if _is_model(annotation):
        return [annotation]
    return [model for argument in getattr(annotation, "__args__", ()) for model in _models_in(argument)]


def _is_type_label(part: Any) -> bool:
    """Whether pydantic put a union member's name into the location (``list[str]``, ``function-before[...]``)."""
    return isinstance(part, str) and ("[" in part or part in ("str", "int", "float", "bool", "none"))


def _line(lines: Lines | None, path: tuple) -> str:
    if not lines:
        return ""
    return f":{next((lines[path[:i]] for i in range(len(path), -1, -1) if path[:i] in lines), 1)}"


def dotted(path: tuple) -> str:
    """Return ``serve.slo[0].ttft`` for ``("serve", "slo", 0, "ttft")``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def unknown_name(what: str, name: str, known: list[str], *, where: str = "") -> SpecError:
    """Return the error for a name that is neither packaged nor a file; lists the valid ones."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else "choose one or give a path"
    return SpecError(f"{where or what}: expected a path or one of {', '.join(known)}; got {name!r}; {hint}")
