"""A batch: a dict of arrays that all have a leading axis B. Which ones there are, the head of the params says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optjax.heads import problem_type_of
from optjax.params import Params
from optjax.validate import check_params

Batch = Mapping[str, Any]

HEADS = ("causal_lm", "sequence_classification", "question_answering")
SPANS = ("start_positions", "end_positions")
# What says which tokens of a row see each other.
SEEN = ("attention_mask", "segment_ids")


def check_arrays(params: Params, batch: Batch) -> tuple[int, int]:
    """B and T of a batch, after a look at its names, shapes and dtypes.

    Every batch has ``input_ids [B, T]``, and may have ``attention_mask [B, T]`` or ``segment_ids [B, T]``: 1, 2, … of
    documents side by side in a row, which do not see each other and whose positions each begin at 0; 0 of padding.
    Further, by ``params.head``:

    - ``causal_lm``: ``labels [B, T]``, the token that follows each of input_ids (they are not shifted again); -100 is
      left out;
    - ``sequence_classification``: ``labels [B]`` or ``[B, num_labels]``, as of `optjax.sequence_classification`;
    - ``question_answering``: ``start_positions [B]`` and ``end_positions [B]``.

    Raises:
      ValueError: something is missing, unknown, or of another shape or dtype; the params have no head.
    """
    check_params(params, HEADS)
    spans = params.head == "question_answering"
    needed = ("input_ids", *(SPANS if spans else ("labels",)))
    if not isinstance(batch, Mapping):
        raise ValueError(f"a batch should be a dict of {', '.join(needed)}, not {type(batch).__name__}")
    missing, unknown = set(needed) - batch.keys(), batch.keys() - {*needed, *SEEN}
    if missing or unknown:
        found = ", ".join(batch) or "nothing"
        raise ValueError(
            f"a batch for head {params.head!r} should hold {', '.join(needed)}, and may hold {' or '.join(SEEN)}; "
            f"this one holds {found}"
        )
    if all(name in batch for name in SEEN):
        raise ValueError("give attention_mask or segment_ids, not both: padding is 0 in segment_ids")
    shape = tuple(batch["input_ids"].shape)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"input_ids should have shape [B, T], got {shape}")
    wanted = {"input_ids": shape, **dict.fromkeys(SEEN, shape), **dict.fromkeys(SPANS, shape[:1])}
    if params.head == "causal_lm":
        wanted["labels"] = shape
    elif params.head == "sequence_classification":
        problem_type_of(params.config, batch["labels"], shape[0])
    for name, array in batch.items():
        if name not in wanted:
            continue
        if tuple(array.shape) != wanted[name]:
            raise ValueError(f"{name} should have shape {wanted[name]}, got {tuple(array.shape)}")
        if not jnp.issubdtype(array.dtype, jnp.integer) and (name, array.dtype) != ("attention_mask", bool):
            raise ValueError(f"{name} should be integers, got {array.dtype}")
    return shape


def seen(batch: Batch) -> dict[str, jax.Array]:
    """What of a batch says which tokens see each other; nothing where all of a row do."""
    return {name: batch[name] for name in SEEN if name in batch}


def positions(batch: Batch) -> jax.Array:
    """Positions ``[B, T]`` of the tokens, -1 of padding; ``[1, T]`` where all rows have the same."""
    t = batch["input_ids"].shape[1]
    columns = jnp.arange(t, dtype=jnp.int32)[None]
    if "attention_mask" in batch:
        real = batch["attention_mask"] != 0
        return jnp.where(real, jnp.cumsum(real, axis=1, dtype=jnp.int32), 0) - 1
    if "segment_ids" in batch:
        segments = batch["segment_ids"]
        begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        start = jax.lax.cummax(jnp.where(begins, columns, 0), axis=1)
        return jnp.where(segments != 0, columns - start, -1)
    return columns
