"""Where a text ends that is to end before one of some stop strings."""

from __future__ import annotations

from collections.abc import Sequence


class StopBefore:
    """Text as it comes, less all from the first stop string on; ``stopped`` is True once there was one.

    A stop string may begin in the prompt, as it may for ``generate``: then there is no text. What may yet become one is
    held back.
    """

    def __init__(self, strings: Sequence[str], prompt: str):
        self._strings = strings
        self._text = prompt
        self._shown = len(prompt)
        self.stopped = False

    def push(self, new: str) -> str:
        """What may be shown of the text so far and was not."""
        if self.stopped:
            return ""
        known, self._text = len(self._text), self._text + new
        # The one that is complete first, and of those the longest.
        found = [
            (at + len(string), at)
            for string in self._strings
            if (at := self._text.find(string, max(0, known - len(string) + 1))) >= 0
        ]
        self.stopped = bool(found)
        return self._show(min(found)[1] if found else len(self._text) - self._held())

    def finish(self) -> str:
        """What was held back, and no stop string came of it."""
        return "" if self.stopped else self._show(len(self._text))

    def _show(self, end: int) -> str:
        text, self._shown = self._text[self._shown : end], max(self._shown, end)
        return text

    def _held(self) -> int:
        """The characters at the end of the text that begin a stop string."""
        sizes = (n for string in self._strings for n in range(1, len(string)) if self._text.endswith(string[:n]))
        return max(sizes, default=0)
