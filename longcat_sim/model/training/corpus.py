"""Text to train on, as bytes: what every Python carries with it, or the user's own files.

Domains of the standard library: its documentation (the ``pydoc`` topics and the modules' docstrings), its source
code, and a table of character names. Batches are drawn by counter (seed, step), so a run can go on anywhere.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from longcat_sim.errors import TrainingError

# Every ``HELD_OUT``-th block of this many bytes is never trained on.
BLOCK_BYTES = 4096
HELD_OUT = 16
# At most so many bytes per domain of the library: more than a small run reads, and quick to load.
DOMAIN_BYTES = 1_000_000
MIX = {"documentation": 0.5, "code": 0.25, "names": 0.25}
"""Share of a batch's sequences; ours."""


class Corpus(Protocol):
    """What the loop needs of a text."""

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the parts."""
        ...

    @property
    def digest(self) -> str:
        """Hash of the content."""
        ...

    def batch(self, seed: int, step: int, sequences: int, tokens: int) -> Tensor:
        """Return the training bytes of a step [B, S + 1]."""
        ...

    def held_out(self, domain: str, sequences: int, tokens: int) -> Tensor:
        """Return bytes that no batch holds [B, S + 1]."""
        ...


@dataclass(frozen=True)
class TextCorpus:
    """Bytes by domain, and the share of each in a batch."""

    texts: Mapping[str, bytes]
    mix: Mapping[str, float]

    def __post_init__(self) -> None:
        faults = [
            f"corpus: {name}: expected at least {BLOCK_BYTES * HELD_OUT} bytes of text (so that some can be held out); "
            f"got {len(text)}; add text"
            for name, text in self.texts.items()
            if len(text) < BLOCK_BYTES * HELD_OUT
        ]
        if not self.texts:
            faults.append("corpus: expected text; got none")
        if faults:
            raise TrainingError(faults)

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the parts."""
        return tuple(self.texts)

    @cached_property
    def digest(self) -> str:
        """Hash of the content and the mix."""
        content = hashlib.sha256()
        for name, text in self.texts.items():
            content.update(f"{name}:{len(text)}:{self.mix[name]}:".encode())
            content.update(text)
        return content.hexdigest()[:16]

    @cached_property
    def _blocks(self) -> dict[str, np.ndarray]:
        """Whole blocks of each domain [blocks, BLOCK_BYTES]."""
        arrays = {}
        for name, text in self.texts.items():
            whole = len(text) // BLOCK_BYTES
            arrays[name] = np.frombuffer(text, np.uint8, whole * BLOCK_BYTES).reshape(whole, BLOCK_BYTES)
        return arrays

    def _cut(self, domain: str, held_out: bool, rng: np.random.Generator, count: int, length: int) -> np.ndarray:
        blocks = self._blocks[domain]
        if length > BLOCK_BYTES:
            raise TrainingError(f"tokens: expected at most {BLOCK_BYTES - 1} of a sequence; got {length - 1}")
        is_held = np.arange(len(blocks)) % HELD_OUT == HELD_OUT - 1
        usable = np.flatnonzero(is_held == held_out)
        rows = rng.choice(usable, count)
        starts = rng.integers(0, BLOCK_BYTES - length + 1, count)
        return blocks[rows[:, None], starts[:, None] + np.arange(length)]

    def batch(self, seed: int, step: int, sequences: int, tokens: int) -> Tensor:
        """Return the bytes of training step ``step`` [B, S + 1]; the same for the same arguments, always."""
        rng = np.random.Generator(np.random.Philox(key=[seed, step]))
        # Systematic sampling: each domain gets its share, to within one sequence, in every batch.
        shares = np.cumsum([self.mix[name] for name in self.domains])
        at = (np.arange(sequences) + rng.random()) / sequences * shares[-1]
        which = np.searchsorted(shares, at, side="right")
        parts = [
            self._cut(name, False, rng, int((which == i).sum()), tokens + 1) for i, name in enumerate(self.domains)
        ]
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    def held_out(self, domain: str, sequences: int, tokens: int) -> Tensor:
        """Return bytes of one domain that no batch holds [B, S + 1], always the same."""
        if domain not in self.texts:
            raise TrainingError(f"domain: expected one of {', '.join(self.domains)}; got {domain!r}")
        rng = np.random.Generator(np.random.Philox(key=[2**63, self.domains.index(domain)]))
        return torch.from_numpy(self._cut(domain, True, rng, sequences, tokens + 1).astype(np.int64))

    def held_out_mix(self, sequences: int, tokens: int) -> Tensor:
        """Return held-out bytes of all domains in the mix's shares [B, S + 1]."""
        total = sum(self.mix[name] for name in self.domains)
        counts = [max(1, round(sequences * self.mix[name] / total)) for name in self.domains]
        return torch.cat([self.held_out(n, c, tokens) for n, c in zip(self.domains, counts, strict=True)])


def _documentation(library: Path, limit: int) -> bytes:
    """Return the topics of ``help()`` and the docstrings of the library's modules."""
    from pydoc_data.topics import topics

    parts = [topics[name] for name in sorted(topics)]
    size = sum(map(len, parts))
    for path in _modules(library):
        if size >= limit:
            break
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) > 80:
                    parts.append(text)
                    size += len(text)
    return "\n\n".join(parts).encode()[:limit]


def _modules(library: Path) -> list[Path]:
    """Return the library's modules, packages' own files included, tests and installed packages not."""
    skip = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3", "turtledemo", "pydoc_data",
            "encodings", "__pycache__", "ensurepip"}  # fmt: skip
    found = [p for p in library.glob("*.py")] + [p for p in library.glob("*/*.py")]
    return sorted(p for p in found if not skip & set(p.relative_to(library).parts))


def _code(library: Path, limit: int) -> bytes:
    parts, size = [], 0
    for path in _modules(library):
        if size >= limit:
            break
        try:
            parts.append(path.read_bytes())
        except OSError:
            continue
        size += len(parts[-1])
    return b"\n".join(parts)[:limit]


def _character_names(limit: int) -> bytes:
    import unicodedata

    lines, size = [], 0
    for code in range(0x20, 0x30000):
        name = unicodedata.name(chr(code), "")
        if name and "IDEOGRAPH" not in name and "HANGUL SYLLABLE" not in name:
            lines.append(f"{code:05X} {unicodedata.category(chr(code))} {name}")
            size += len(lines[-1]) + 1
        if size >= limit:
            break
    return "\n".join(lines).encode()[:limit]


@lru_cache(maxsize=2)
def library_corpus(limit_bytes: int = DOMAIN_BYTES) -> TextCorpus:
    """Return the text that every Python installation carries, in three domains of at most ``limit_bytes``."""
    library = Path(sysconfig.get_paths()["stdlib"])
    return TextCorpus(
        {
            "documentation": _documentation(library, limit_bytes),
            "code": _code(library, limit_bytes),
            "names": _character_names(limit_bytes),
        },
        MIX,
    )


def read_corpus(paths: Sequence[Path]) -> TextCorpus:
    """Return the user's files as a corpus: each path is a domain (a folder is all its files), in equal shares.

    Raises:
        TrainingError: no such path, or too little text in one.
    """
    texts: dict[str, bytes] = {}
    faults = []
    for path in map(Path, paths):
        try:
            files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
            text = b"\n".join(p.read_bytes() for p in files)
        except OSError as error:
            faults.append(f"corpus: {path}: expected a text file or a folder of them; {error.strerror}")
            continue
        name = path.stem if path.stem not in texts else str(path)
        if len(text) < BLOCK_BYTES * HELD_OUT:
            faults.append(
                f"corpus: {path}: expected at least {BLOCK_BYTES * HELD_OUT} bytes of text (so that some can be held "
                f"out); got {len(text)}; add text, or leave the corpus out to train on the standard library's"
            )
        texts[name] = text
    if not paths:
        faults.append("corpus: expected at least one path; got none")
    if faults:
        raise TrainingError(faults)
    return TextCorpus(texts, dict.fromkeys(texts, 1.0 / len(texts)))
