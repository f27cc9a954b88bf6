"""Checkpoints: one safetensors file each, written whole or not at all, checked by a hash when read.

A file holds weights, router biases, Adam's moments, and in its header the step and what the run is. The format is
that of safetensors (8 bytes length, a JSON header, the data); nothing is pickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longcat_sim.errors import TrainingError
from longcat_sim.records.files import atomic

_NAMES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


@dataclass(frozen=True)
class Checkpoint:
    """What one file holds."""

    path: Path
    tensors: dict[str, Tensor]
    about: dict[str, Any]


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write tensors and a JSON description, whole or not at all.

    Raises:
        TrainingError: the disk is full or cannot be written; earlier files are as they were.
    """
    content = hashlib.sha256()
    header: dict[str, Any] = {}
    at, raw = 0, []
    for name, tensor in tensors.items():
        flat = tensor.detach().cpu().contiguous().view(-1)
        data = flat.view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [at, at + len(data)],
        }
        at += len(data)
        content.update(data)
        raw.append(data)
    header["__metadata__"] = {"about": json.dumps(about), "sha256": content.hexdigest()}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    try:
        with atomic(path, binary=True) as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for data in raw:
                file.write(data)
    except OSError as error:
        need = f"{(at + len(text)) / 1e6:.1f} MB"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = f"expected {need} of free space; the disk is full; free some, then run again to go on"
        else:
            what = f"expected to write {need}; {error.strerror}"
        raise TrainingError(f"{path}: {what}; checkpoints written before are untouched") from None


def read_checkpoint(path: Path) -> Checkpoint:
    """Return a checkpoint.

    Raises:
        TrainingError: a file that cannot be read, is cut short, or whose content does not match its hash.
    """
    try:
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        if len(data) < 8 or length > len(data) - 8:
            raise ValueError("the file is cut short")
        header = json.loads(data[8 : 8 + length])
        meta = header.pop("__metadata__")
        body = memoryview(data)[8 + length :]
        if hashlib.sha256(body).hexdigest() != meta["sha256"]:
            raise ValueError("the content does not match its hash (cut short or altered)")
        tensors = {}
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            flat = torch.frombuffer(bytearray(body[start:stop]), dtype=_DTYPES[entry["dtype"]])
            tensors[name] = flat.view(entry["shape"])
        return Checkpoint(path, tensors, json.loads(meta["about"]))
    except OSError as error:
        raise TrainingError(f"{path}: expected a checkpoint; {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RuntimeError) as error:
        raise TrainingError(f"{path}: expected a checkpoint written by train; {error}; delete the file") from None


def checkpoint_path(folder: Path, step: int) -> Path:
    """Return the file of a step."""
    return folder / f"step-{step:07d}.safetensors"


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint files of a folder, newest first."""
    return sorted(folder.glob("step-*.safetensors"), reverse=True)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest ``keep`` checkpoints."""
    for path in checkpoints(folder)[keep:]:
        path.unlink(missing_ok=True)


def differing(mine: Any, theirs: Any, at: str = "") -> list[str]:
    """Return the keys in which two JSON documents differ, as lines ``key: mine, theirs``."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        lines = []
        for key in sorted(set(mine) | set(theirs)):
            lines += differing(mine.get(key), theirs.get(key), f"{at}.{key}" if at else str(key))
        return lines
    return [] if mine == theirs else [f"{at}: this run {mine!r}, the checkpoint {theirs!r}"]


def newest_usable(folder: Path, identity: Mapping[str, Any]) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest checkpoint that can be read, and a line for each newer one that cannot.

    Raises:
        TrainingError: the newest readable one is of another model, settings or text; or none of several is readable.
    """
    remarks: list[str] = []
    files = checkpoints(folder)
    for path in files:
        try:
            found = read_checkpoint(path)
        except TrainingError as error:
            remarks.append(str(error))
            continue
        faults = differing(json.loads(json.dumps(identity)), found.about.get("identity"))
        if faults:
            raise TrainingError(
                f"{path}: expected a checkpoint of this run; it is of another: {'; '.join(faults[:6])}"
                + (f"; and {len(faults) - 6} more" if len(faults) > 6 else "")
                + "; choose another --out, or the settings of that run"
            )
        return found, remarks
    if files:
        raise TrainingError(
            [*remarks, f"{folder}: expected at least one readable checkpoint; delete these to start anew"]
        )
    return None, remarks
