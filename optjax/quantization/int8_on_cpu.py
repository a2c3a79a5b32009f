"""The product with int8 codes on a CPU: in integers where XLA has a kernel for that, else in float32 a block at a time.

XLA writes a float32 copy of codes before it multiplies them by float32. A product of int8 by int8 reads them as they
are, in YNNPACK's kernels. So a row of x becomes digits, ``x ≈ s (high + low / 254)`` with s a 127th of its largest
magnitude: exact to 15 bits of that. One digit is usual (Dettmers et al. 2022, LLM.int8(), section 2). The second is
another row of the same product, which costs nothing where there are few and up to three fifths more where there are
hundreds; and so the weight's own rounding is the only one that shows.
"""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp

# Up to this many rows a product with a weight takes as long as reading the weight.
FEW_ROWS = 32
# Numbers in a block: a megabyte in float32, or four where a block serves many rows.
BLOCK = 1 << 18


def int8_product(x: jax.Array, values: jax.Array) -> jax.Array:
    """``x valuesᵀ`` ``[rows, out]`` of x ``[rows, in]`` in float32 and values ``[out, in]`` in int8.

    A row that is not finite has no finite product. The gradient is that of the product, as if no digits were. Wider
    inputs are multiplied as they are.
    """
    return _in_integers(x, values) if x.dtype == jnp.float32 and _multiplies_integers() else in_blocks(x, values)


@cache
def _multiplies_integers() -> bool:
    """Whether this XLA has kernels for int8 by int8. Without one it would be slower than float32 by far."""
    x, values = (jax.ShapeDtypeStruct((rows, 256), jnp.int8) for rows in (2, 256))
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return "ynn_fusion" in (jax.jit(_multiply).lower(x, values).compile().as_text() or "")


def _multiply(digits: jax.Array, values: jax.Array) -> jax.Array:
    if digits.shape[0] > FEW_ROWS:
        return jnp.einsum("ri,oi->ro", digits, values, preferred_element_type=jnp.int32)
    # Few rows stand on the right: a right operand is packed before it is multiplied, which would be the codes.
    # The barrier keeps XLA from turning product and transpose into that again.
    return jax.lax.optimization_barrier(jnp.einsum("oi,ri->or", values, digits, preferred_element_type=jnp.int32)).T


@jax.custom_jvp
def _in_integers(x: jax.Array, values: jax.Array) -> jax.Array:
    # A step below the smallest normal number would be flushed to 0, and so it would be for a row of zeros.
    step = jnp.maximum(jnp.abs(x).max(-1, keepdims=True) / 127, jnp.finfo(x.dtype).tiny)
    steps = x / step
    high = jnp.round(steps)
    digits = jnp.concatenate([high, jnp.round((steps - high) * 254)]).astype(jnp.int8)
    high, low = jnp.split(_multiply(digits, values).astype(x.dtype), 2)
    return (high + low / 254) * step


@_in_integers.defjvp
def _tangent(primals: tuple[jax.Array, jax.Array], tangents: tuple[jax.Array, jax.Array]):
    return _in_integers(*primals), in_blocks(tangents[0], primals[1])


def in_blocks(x: jax.Array, values: jax.Array) -> jax.Array:
    """The same in float32: codes are widened a block at a time, which stays in the processor's cache."""
    rows, (n_out, n_in) = x.shape[0], values.shape
    if rows == 1:
        return multiply_and_sum(x, values)
    size = min(n_out, max(8, BLOCK * (1 if rows <= FEW_ROWS else 4) // n_in))

    @jax.checkpoint
    def block(x: jax.Array, values: jax.Array, start: jax.Array) -> jax.Array:
        part = jax.lax.dynamic_slice_in_dim(values, start, size).astype(x.dtype)
        return jnp.einsum("oi,ri->or", part, x)

    def step(i, y):
        start = jnp.minimum(i * size, n_out - size)  # the last block may overlap the one before
        return jax.lax.dynamic_update_slice_in_dim(y, block(x, values, start), start, 0)

    # Like a block: inside `jax.shard_map` a loop has to begin with what varies over devices as its steps do.
    none = jnp.zeros_like(jax.eval_shape(block, x, values, 0), shape=(n_out, rows))
    return jax.lax.fori_loop(0, -(-n_out // size), step, none).T


@jax.checkpoint
def multiply_and_sum(x: jax.Array, values: jax.Array) -> jax.Array:
    """The same of one row, as the codes are read; a matrix product would be a call, with its operands in memory."""
    return (values.astype(x.dtype) * x).sum(-1)[None]
