"""``ByteTokenizer``: text as its UTF-8 bytes, with a begin and an end mark."""

from __future__ import annotations

from collections.abc import Iterable

from longcat_sim.errors import ModelError


class ByteTokenizer:
    """Ids 0..255 are bytes; 256 begins and 257 ends a text."""

    BEGIN, END = 256, 257
    VOCAB_SIZE = 258

    def __init__(self, vocab_size: int = VOCAB_SIZE) -> None:
        """Check that a model of ``vocab_size`` can take every id."""
        if vocab_size < self.VOCAB_SIZE:
            raise ModelError(
                f"vocab_size: expected at least {self.VOCAB_SIZE} for bytes and two marks; got {vocab_size}; "
                "choose a model with a larger vocabulary, such as longcat-tiny (512)"
            )

    def encode(self, text: str, *, begin: bool = True) -> list[int]:
        """Return the ids of ``text``."""
        return [*([self.BEGIN] if begin else []), *text.encode("utf-8")]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ``ids``; marks, and ids beyond bytes, are left out, broken bytes shown as U+FFFD."""
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")
