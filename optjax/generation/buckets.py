"""The few static sizes that lengths are rounded up to, so that another length compiles nothing."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from optjax.validate import is_concrete


def bucket(n: int) -> int:
    """The static size that ``n`` is rounded up to: 16 at least, then steps of a quarter of the power of two below."""
    step = max(16, 1 << max(n.bit_length() - 3, 0))
    return -(-n // step) * step


def pad_to_bucket(ids: Any, mask: Any) -> tuple[Any, Any]:
    """Padded on the left to a bucketed length; as they are inside somebody's jit, where shapes are settled already."""
    if not is_concrete(ids, mask):
        return jnp.asarray(ids), jnp.asarray(mask)
    extra = ((0, 0), (bucket(ids.shape[1]) - ids.shape[1], 0))
    return np.pad(ids, extra), np.pad(mask, extra)
