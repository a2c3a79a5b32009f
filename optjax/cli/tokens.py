"""Single tokens as they are shown to people."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from optjax.tokenizer import Tokenizer


def quoted(text: str) -> str:
    """In quotes and on one line."""
    return f"‘{text if text.isprintable() else text.encode('unicode_escape').decode()}’"


class TokenNames:
    """The texts of a tokenizer's tokens; bytes that are no whole character alone as ``\\xe6``."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def __getitem__(self, i: int) -> str:
        try:
            text = self._tokenizer.decode([i], skip_special_tokens=False)
        except ValueError:  # a row of the embedding that the tokenizer lacks
            return f"<id {i}>"
        if "\ufffd" in text and i in self._bytes:
            return self._bytes[i].decode(errors="backslashreplace")
        return text

    def shown(self, i: int) -> str:
        """In quotes, so that spaces can be seen; special tokens as they are."""
        return self[i] if i in self._special else quoted(self[i])

    @cached_property
    def _bytes(self) -> dict[int, bytes]:
        from optjax.generation.stop_strings import token_bytes

        try:
            return token_bytes(self._tokenizer)
        except ValueError:  # not byte-level
            return {}

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self._tokenizer.backend.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special)
