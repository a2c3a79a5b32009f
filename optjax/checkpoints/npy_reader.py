"""Alpa's and FlexGen's folders: one array a file, in the format of ``numpy.save``, named after its tensor."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from optjax.checkpoints.errors import CheckpointError, reading
from optjax.checkpoints.tensors import MAX_DIMENSIONS, FileTensor, TensorRef

_MAGIC = b"\x93NUMPY"


def read_npy(path: Path) -> dict[str, TensorRef]:
    """The array in one file, not read yet, under the file's name; nothing where the file is no array.

    Raises:
      CheckpointError: the header is broken, or the file too short.
    """
    with reading(path), open(path, "rb") as file:
        if file.read(6) != _MAGIC:
            return {}
        file.seek(0)
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise CheckpointError(f"{path} has the unknown format version {version}")
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
        if dtype == np.dtype("V2"):  # How numpy.save writes bfloat16, a type it does not know.
            dtype = np.dtype(jnp.bfloat16)
        if dtype.hasobject or len(shape) > MAX_DIMENSIONS or any(n < 0 or n >= 1 << 62 for n in shape):
            raise CheckpointError(f"{path} holds no array of numbers")
        strides = None
        if fortran and len(shape) > 1:
            strides = tuple(int(np.prod(shape[:i], dtype=object)) for i in range(len(shape)))
        tensor = FileTensor(path, file.tell(), shape, dtype, strides)
        if tensor.offset + tensor.nbytes > path.stat().st_size:
            raise CheckpointError(f"{path} is truncated: an array of shape {shape} needs {tensor.nbytes} bytes")
    return {path.name.removesuffix(".npy"): tensor}
