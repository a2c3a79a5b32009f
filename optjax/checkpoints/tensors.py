"""Tensors that still lie in files: a shape, a dtype, and a way to read all or a block of them.

Every checkpoint format ends in these, so that whoever places weights on devices reads one at a time, or only the block
that a device holds. Files are read, never memory-mapped: mapped pages would count as this process's memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from optjax.checkpoints.errors import CheckpointError

Index = tuple[slice, ...]
MAX_DIMENSIONS = 8
PAGE = 4096  # bytes; what a disk gives at least
BAND = 1 << 24  # bytes of whole rows that are read at once to be cut


class TensorRef:
    """A tensor in a checkpoint.

    Attributes:
      shape: its dimensions.
      dtype: of the numpy array that `read` returns, native byte order.
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self, index: Index = ()) -> np.ndarray:
        """A fresh, C-contiguous array of the block ``self[index]``: slices of step 1, as many as you like.

        Raises:
          CheckpointError: the file ends too early.
        """
        raise NotImplementedError

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class FileTensor(TensorRef):
    """A tensor whose bytes lie uncompressed in a file.

    ``strides`` count elements, and None means C order. ``stored`` is the dtype in the file where its byte order is
    not this machine's.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]
    stored: np.dtype
    strides: tuple[int, ...] | None = None

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        return self.stored.newbyteorder("=")

    @property
    def span(self) -> int:
        """The number of elements from the first to the last one in the file."""
        if 0 in self.shape:
            return 0
        if self.strides is None:
            return math.prod(self.shape)
        return 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))

    def read(self, index: Index = ()) -> np.ndarray:
        bounds = block(index, self.shape)
        if self.strides is not None:
            flat = read_array(self.path, self.offset, (self.span,), self.stored)
            steps = tuple(s * self.stored.itemsize for s in self.strides)
            whole = np.lib.stride_tricks.as_strided(flat, self.shape, steps, writeable=False)
            out = np.array(whole[tuple(slice(*b) for b in bounds)], order="C")
        elif not self.shape:
            out = read_array(self.path, self.offset, (), self.stored)
        else:
            (start, stop), *rest = bounds
            row = math.prod(self.shape[1:]) * self.stored.itemsize
            at = self.offset + start * row
            if all(b == (0, n) for b, n in zip(rest, self.shape[1:], strict=True)):
                out = read_array(self.path, at, (stop - start, *self.shape[1:]), self.stored)
            else:
                out = self._read_cut(at, stop - start, rest)
        return out.astype(self.dtype, copy=False)

    def _read_cut(self, at: int, rows: int, rest: Sequence[tuple[int, int]]) -> np.ndarray:
        """A part of each of ``rows`` rows that begin at byte ``at``.

        Only the parts are read where they are pages apart; else a few whole rows at a time, then cut.
        """
        cut = tuple(slice(*b) for b in rest)
        row_shape, part_shape = self.shape[1:], tuple(b - a for a, b in rest)
        row, part = (math.prod(s) * self.stored.itemsize for s in (row_shape, part_shape))
        out = aligned_empty((rows, *part_shape), self.stored)
        if len(rest) == 1 and row - part >= PAGE:
            skip = rest[0][0] * self.stored.itemsize
            with open(self.path, "rb", buffering=0) as file:
                for i in range(rows):
                    file.seek(at + i * row + skip)
                    _fill(out[i], file, self.path)
            return out
        step = max(1, BAND // max(row, 1))
        for i in range(0, rows, step):
            n = min(step, rows - i)
            out[i : i + n] = read_array(self.path, at + i * row, (n, *row_shape), self.stored)[(slice(None), *cut)]
        return out


@dataclass(frozen=True)
class Transposed(TensorRef):
    """A matrix stored the other way round."""

    ref: TensorRef

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return self.ref.shape[::-1]

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        return self.ref.dtype

    def read(self, index: Index = ()) -> np.ndarray:
        bounds = block(index, self.shape)
        return np.ascontiguousarray(self.ref.read(tuple(slice(*b) for b in reversed(bounds))).T)


@dataclass(frozen=True)
class Rows(TensorRef):
    """Rows ``start`` to ``stop`` of a tensor."""

    ref: TensorRef
    start: int
    stop: int

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.stop - self.start, *self.ref.shape[1:])

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        return self.ref.dtype

    def read(self, index: Index = ()) -> np.ndarray:
        (start, stop), *rest = block(index, self.shape)
        return self.ref.read((slice(self.start + start, self.start + stop), *(slice(*b) for b in rest)))


@dataclass(frozen=True)
class Joined(TensorRef):
    """Tensors laid end to end along one axis."""

    refs: tuple[TensorRef, ...]
    axis: int = 0

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        first = self.refs[0].shape
        return (*first[: self.axis], sum(r.shape[self.axis] for r in self.refs), *first[self.axis + 1 :])

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        return self.refs[0].dtype

    def read(self, index: Index = ()) -> np.ndarray:
        bounds = block(index, self.shape)
        start, stop = bounds[self.axis]
        out = np.empty([b - a for a, b in bounds], self.dtype)
        at = 0
        for ref in self.refs:
            size = ref.shape[self.axis]
            first, last = max(start, at), min(stop, at + size)
            if first < last:
                wanted = list(bounds)
                wanted[self.axis] = (first - at, last - at)
                target = [slice(None)] * len(bounds)
                target[self.axis] = slice(first - start, last - start)
                out[tuple(target)] = ref.read(tuple(slice(*b) for b in wanted))
            at += size
        return out


@dataclass(frozen=True)
class Reshaped(TensorRef):
    """A stretch of a one-dimensional tensor, seen as a shape of as many elements."""

    ref: TensorRef
    start: int
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:  # type: ignore[override]
        return self.ref.dtype

    def read(self, index: Index = ()) -> np.ndarray:
        bounds = block(index, self.shape)
        if not self.shape:
            return self.ref.read((slice(self.start, self.start + 1),)).reshape(())
        (start, stop), *rest = bounds
        row = math.prod(self.shape[1:])
        flat = self.ref.read((slice(self.start + start * row, self.start + stop * row),))
        return np.ascontiguousarray(
            flat.reshape(stop - start, *self.shape[1:])[(slice(None), *(slice(*b) for b in rest))]
        )


def block(index: Index, shape: Sequence[int]) -> list[tuple[int, int]]:
    """``(start, stop)`` of every dimension."""
    index = (*index, *(slice(None),) * (len(shape) - len(index)))
    bounds = []
    for one, n in zip(index, shape, strict=True):
        start, stop, step = one.indices(n)
        if step != 1:
            raise ValueError(f"blocks are read with slices of step 1, not {one}")
        bounds.append((start, max(start, stop)))
    return bounds


def read_array(path: Path, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array from its bytes at ``offset``."""
    out = aligned_empty(shape, dtype)
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        _fill(out, file, path)
    return out


def _fill(out: np.ndarray, file: Any, path: Path) -> None:
    """Fills a C-contiguous array with the bytes that come next."""
    left = out.reshape(-1).view(np.uint8).data
    while len(left):
        got = file.readinto(left)
        if not got:
            raise CheckpointError(f"{path} ended while a tensor was read: {len(left)} bytes are missing")
        left = left[got:]


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """``np.empty`` at a multiple of 64 bytes: such an array becomes a jax array on the CPU as it is, without a copy."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + nbytes].view(dtype).reshape(shape)
