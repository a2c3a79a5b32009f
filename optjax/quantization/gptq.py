"""GPTQ: one matrix rounded column by column, what each rounding costs made good by the columns that are still to come.

Frantar et al. 2022 (GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers), section 3 and
algorithm 1; columns go by how much their inputs are used, with scales that are settled before ("act order, static
groups" of the authors' program). The error that counts is that of the outputs, for inputs x of a text: the sum of
``|W x - Q x|²``, of which ``Σ x xᵀ`` is all that has to be known.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

from optjax.quantization.codes import inverse, levels, nearest

# Of the mean of the diagonal, added to it; section 3.3, step 3.
DAMP = 0.01
# Columns whose changes reach all others at once, as one product; step 2.
BLOCK = 128


@partial(jax.jit, static_argnames=("kind", "group_size"))
def compensate(weight: jax.Array, gram: jax.Array, scales: jax.Array, *, kind: str, group_size: int) -> jax.Array:
    """The matrix ``[out, in]`` in float32, changed so that its nearest codes under ``scales`` are GPTQ's.

    Args:
      weight: ``[out, in]``.
      gram: ``[in, in]``, ``Σ x xᵀ`` of its inputs, or any multiple of it.
      scales: of `scales_of`: ``[out]`` for int8, ``[G, out]`` in the 4-bit kinds.
      group_size: inputs that share a scale; not used for int8.
    """
    with jax.default_matmul_precision("highest"):
        weight, gram = weight.T.astype(jnp.float32), gram.astype(jnp.float32)
        n = weight.shape[0]
        order = jnp.argsort(-jnp.diagonal(gram))
        groups = jnp.zeros(n, jnp.int32) if kind == "int8" else jnp.arange(n) // group_size
        scales, groups = jnp.atleast_2d(scales).astype(jnp.float32), groups[order]
        # The last block is filled up with columns that are 0 and change nothing.
        more = -n % BLOCK
        factor = _factor(gram, order, more)
        rounded = jnp.pad(weight[order], ((0, more), (0, 0)))
        groups = jnp.pad(groups, (0, more))

        def block(i: jax.Array, rounded: jax.Array) -> jax.Array:
            start = i * BLOCK
            rows = jax.lax.dynamic_slice_in_dim(factor, n + more - BLOCK - start, BLOCK)[::-1, ::-1]
            own = jax.lax.dynamic_slice_in_dim(rows, start, BLOCK, axis=1)
            steps = scales[jax.lax.dynamic_slice_in_dim(groups, start, BLOCK)]

            def column(j: jax.Array, both: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                part, errors = both
                at = part[j]
                error = (at - levels(nearest(at * inverse(steps[j]), kind), kind) * steps[j]) / own[j, j]
                # The factor is upper triangular: columns that are done stay, and this one becomes its level.
                return part - own[j][:, None] * error, errors.at[j].set(error)

            part = jax.lax.dynamic_slice_in_dim(rounded, start, BLOCK)
            part, errors = jax.lax.fori_loop(0, BLOCK, column, (part, jnp.zeros_like(part)))
            return jax.lax.dynamic_update_slice_in_dim(rounded - rows.T @ errors, part, start, 0)

        rounded = jax.lax.fori_loop(0, (n + more) // BLOCK, block, rounded)[:n]
        return jnp.zeros_like(rounded).at[order].set(rounded).T


def _factor(gram: jax.Array, order: jax.Array, more: int) -> jax.Array:
    """The upper triangular U with ``UᵀU`` the inverse of the Gram matrix, damped as far as it takes to have one.

    Of columns in their order, then as many ``more`` that are nothing; turned round, the last row and column first.
    Beside the Gram matrix little more than two of its size are there at once.
    """
    mean = jnp.diagonal(gram).mean()
    mean = jnp.where(mean > 0, mean, 1.0)
    at = jnp.concatenate([jnp.zeros(more, order.dtype), order[::-1]])
    real = jnp.arange(at.size) >= more

    def lower(damp: jax.Array) -> jax.Array:
        # Of the matrix turned round: its lower factor L, turned back, is the upper one R of gram = R Rᵀ, and U = R⁻¹.
        turned = jnp.where(real[:, None] & real, gram[at[:, None], at], 0.0)
        turned += jnp.where(real, damp * mean, 1.0) * jnp.eye(at.size, dtype=gram.dtype)
        return jax.lax.linalg.cholesky(turned, symmetrize_input=False)

    def fails(damp: jax.Array) -> jax.Array:
        return ~jnp.isfinite(lower(damp)).all() & (damp < 1e3)

    # Made once more when it is known to be one: as a part of the loop's state there would be several.
    damp = jax.lax.while_loop(fails, lambda damp: damp * 10, jnp.float32(DAMP))
    return solve_triangular(lower(damp), jnp.eye(at.size, dtype=gram.dtype), lower=True)
