"""Reads small pieces of a file that nobody vouches for."""

from __future__ import annotations

from pathlib import Path

from optjax.checkpoints.errors import CheckpointError


class BytesReader:
    """A file read in small pieces at given places; never past its end, never more than was asked for."""

    def __init__(self, path: Path):
        self.path = path
        self.size = path.stat().st_size
        self.position = 0
        self._file = open(path, "rb")

    def __enter__(self) -> BytesReader:
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def seek(self, position: int) -> None:
        if not 0 <= position <= self.size:
            raise CheckpointError(f"{self.path} has {self.size} bytes, but refers to byte {position}: truncated?")
        self.position = position

    def take(self, n: int) -> bytes:
        """The next ``n`` bytes."""
        start = self.position
        self.skip(n)
        self._file.seek(start)
        return self._file.read(n)

    def skip(self, n: int) -> None:
        self.seek(self.position + n)

    def uint(self, n: int, order: str = "big") -> int:
        """The next ``n`` bytes as an unsigned number."""
        return int.from_bytes(self.take(n), order)  # type: ignore[arg-type]
