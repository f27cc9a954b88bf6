"""Write files whole or not at all: into a temporary file beside the target, then renamed over it.

Where a command is going to write is checked before its work.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from longcat_sim.errors import UserError


@contextmanager
def atomic(path: Path, *, binary: bool = False) -> Iterator[IO[Any]]:
    """Yield a file, text unless ``binary``, that becomes ``path`` when the block ends well.

    After an error or Ctrl-C nothing is left. Binary files reach the disk before they are renamed: a checkpoint must
    not be an empty file after a power cut.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") if binary else os.fdopen(handle, "w", encoding="utf-8") as file:
            yield file
            if binary:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all."""
    with atomic(path) as file:
        file.write(text)


def check_outputs(
    *, files: Mapping[str, Path | None] | None = None, folders: Mapping[str, Path | None] | None = None
) -> None:
    """Check that files can be written where options say; each is a file, or a folder for several. None is no output.

    Raises:
        UserError: every option whose path cannot be used, and why.
    """
    faults = []
    for given, what, example in ((files, "file", "out/result.json"), (folders, "folder", "out")):
        for option, path in (given or {}).items():
            reason = "" if path is None else _unwritable(Path(path), is_folder=what == "folder")
            if reason:
                faults.append(
                    f"{option}: expected a {what} that can be written, such as {example}; got {path}: "
                    f"{reason}; give another path"
                )
    if faults:
        raise UserError(faults)


def _unwritable(path: Path, *, is_folder: bool) -> str:
    """Return why nothing can be written at ``path``, or "". Tried, not asked: root may write into /proc, it is said."""
    at = path
    try:
        at = next(place for place in (path, *path.absolute().parents) if place.exists())
        if at == path and not (path.is_dir() if is_folder else path.is_file()):
            return f"it is {'a folder' if path.is_dir() else 'a file' if path.is_file() else 'a device'}"
        if at == path and not os.access(path, os.W_OK):
            return "it is read-only"
        if at == path and not is_folder:
            at = path.absolute().parent
        with tempfile.TemporaryFile(dir=at):
            return ""
    except OSError as error:
        return f"{at}: {error.strerror}"
