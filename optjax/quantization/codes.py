"""The arithmetic of the kinds: numbers to codes and scales, and back.

``int8``: a scale for each row of ``[out, in]``, its largest magnitude at 127 (absmax; Dettmers et al. 2022, section 2).
A table has a scale for each column besides. Some columns of an embedding are several times as large as others, in all
rows, and would else have the scales of rows to themselves; half of that, as a power, goes to the columns (Xiao et al.
2023, SmoothQuant, equation 4 with α = 0.5, where it is for activations).
``int4``: a scale for each group along a row; the group's largest magnitude is at -8, so that all 16 codes are used.
``nf4``: the same with the 16 quantiles of a normal distribution, the largest magnitude at ±1 (Dettmers et al. 2023,
QLoRA, section 3 and appendix E).

Eight bits keep the shape ``[out, in]``. Four bits stand the other way round, ``[in, out]``: scales of groups then vary
along the rows of the array, where every backend spreads them cheaply. On a TPU int4 is stored as jax's own 4-bit
integers, from which its matrix unit is fed without a detour. All else, as XLA would unpack those into a copy first, is
stored two in a byte: of a group of g inputs, byte k holds the code of k in its low bits and of k + g / 2 in its high.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("int8", "int4", "nf4")
# QLoRA, appendix E.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def scales_of(weight: jax.Array, kind: str, group_size: int) -> jax.Array:
    """The scales with which all of a matrix ``[…, out, in]`` is in range: ``[…, out]``, or ``[…, G, out]`` of groups.

    Those of groups are in bfloat16: rounded first, so that codes are the best there are for them.
    """
    weight = weight.astype(jnp.float32)
    if kind == "int8":
        return jnp.abs(weight).max(-1) / 127
    weight = _in_groups(weight, group_size)
    low, high = weight.min(-2), weight.max(-2)
    # The sign of a scale of int4 is such that the largest magnitude comes out at -8.
    scales = jnp.where(high > -low, -high, -low) / 8 if kind == "int4" else jnp.maximum(high, -low)
    return scales.astype(jnp.bfloat16)


def nearest(steps: jax.Array, kind: str) -> jax.Array:
    """The codes nearest to numbers that are divided by their scales already, in int8; beyond the range its ends."""
    if kind == "nf4":
        codes = jnp.zeros(steps.shape, jnp.int8)
        for a, b in zip(NF4, NF4[1:], strict=False):
            codes += (steps > (a + b) / 2).astype(jnp.int8)
        return codes
    low, high = (-127, 127) if kind == "int8" else (-8, 7)
    return jnp.clip(jnp.round(steps), low, high).astype(jnp.int8)


def levels(codes: jax.Array, kind: str) -> jax.Array:
    """What codes stand for, before scaling, in float32."""
    return _nf4(codes.astype(jnp.int32)) if kind == "nf4" else codes.astype(jnp.float32)


def encode_int8(weight: jax.Array, scales: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """``[…, out, in]`` as int8 of the same shape, and scales ``[…, out]`` in float32: those given, or its own."""
    weight = weight.astype(jnp.float32)
    scales = scales_of(weight, "int8", 0) if scales is None else scales
    return nearest(weight * inverse(scales)[..., None], "int8"), scales


def encode_table(weight: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``[V, E]`` as int8 of the same shape, with scales of rows ``[V]`` and of columns ``[E]``, all that multiplied."""
    weight = weight.astype(jnp.float32)
    columns = jnp.sqrt(jnp.sqrt(jnp.square(weight).mean(0)))
    columns = jnp.where(columns == 0, 1.0, columns)
    return *encode_int8(weight / columns), columns


def encode_4bit(
    weight: jax.Array, kind: str, group_size: int, native: bool, scales: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """``[…, out, in]`` as 4-bit codes ``[…, in / 2, out]``, or ``[…, in, out]`` for ``native`` int4, and scales.

    Scales are ``[…, in / group_size, out]`` in bfloat16, those given or its own. A last group that is not full is
    filled up with zeros.
    """
    scales = scales_of(weight, kind, group_size) if scales is None else scales
    weight = _in_groups(weight.astype(jnp.float32), group_size)
    codes = nearest(weight * inverse(scales.astype(jnp.float32))[..., None, :], kind)
    if native and kind == "int4":
        codes = codes.astype(jnp.int4)
    else:
        first, second = codes[..., : group_size // 2, :], codes[..., group_size // 2 :, :]
        codes = (first & 15) | (second << 4)
    *lead, _, _, out = codes.shape
    return codes.reshape(*lead, -1, out), scales


def _in_groups(weight: jax.Array, group_size: int) -> jax.Array:
    """``[…, out, in]`` as ``[…, G, g, out]``, the last group filled up with zeros."""
    *lead, out, n_in = weight.shape
    groups = -(-n_in // group_size)
    padded = [(0, 0)] * (len(lead) + 1) + [(0, groups * group_size - n_in)]
    return jnp.moveaxis(jnp.pad(weight, padded).reshape(*lead, out, groups, group_size), -3, -1)


def decode_4bit(values: jax.Array, kind: str) -> list[jax.Array]:
    """What the codes stand for, before scaling, in float32: the two halves of each group, ``[…, in / 2, out]``.

    In 32 bits, as processors without smaller numbers in their vectors (TPU v5e, CPUs) would go to and fro.
    """
    wide = values.astype(jnp.int32)
    if kind == "int4":
        return [((wide << 28) >> 28).astype(jnp.float32), (wide >> 4).astype(jnp.float32)]
    return [_nf4(wide & 15), _nf4((wide >> 4) & 15)]


def _nf4(codes: jax.Array) -> jax.Array:
    """The levels of codes 0 to 15, by halving: a table's gather is slow on every backend."""
    levels = [jnp.float32(level) for level in NF4]
    for bit in range(4):
        odd = (codes & (1 << bit)) != 0
        levels = [jnp.where(odd, b, a) for a, b in zip(levels[::2], levels[1::2], strict=True)]
    return levels[0]


def inverse(scales: jax.Array) -> jax.Array:
    """1 / scales; 0 where all is 0."""
    return jnp.where(scales == 0, 0.0, 1 / jnp.where(scales == 0, 1.0, scales))


def unpack_on_host(packed: np.ndarray, group_size: int) -> np.ndarray:
    """int4 codes of two in a byte ``[in / 2, out]``, as jax's 4-bit integers ``[in, out]``."""
    halves = packed.reshape(-1, group_size // 2, packed.shape[-1])
    codes = np.concatenate([(halves << 4) >> 4, halves >> 4], axis=1).reshape(-1, packed.shape[-1])
    return codes.astype(jnp.int4)


def pack_on_host(codes: np.ndarray, group_size: int) -> np.ndarray:
    """The other way round."""
    codes = codes.astype(np.int8).reshape(-1, 2, group_size // 2, codes.shape[-1])
    return ((codes[:, 0] & 15) | (codes[:, 1] << 4)).reshape(-1, codes.shape[-1])
