"""Which attention a pass of the model takes: by flash kernels, or the plain one of `optjax.attention`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from optjax.attention import FEW_QUERIES
from optjax.cache import Cache, default_layout
from optjax.config import OPTConfig
from optjax.params import Params
from optjax.placed import AMPERE, compute_capability, parts, platform

if TYPE_CHECKING:
    from optjax.sharding import Placement

IMPLEMENTATIONS = ("auto", "eager", "flash")

# Scores of fewer queries are smaller than the queries, keys and values they are made of.
MANY_QUERIES = 256

# Over a cache of fewer columns the kernels for few tokens save less than they take to start. On TPU it comes in blocks
# that are multiples of so many.
MANY_COLUMNS = 512
LANES = 128
# On a GPU where no kernel reads it, XLA would copy a cache in 16 bits at every step, to give cuBLAS a multiple of so
# many columns.
TENSOR_CORES = 8

# What the kernels take; the plain path takes anything.
_DTYPES = {"tpu": ("float32", "bfloat16"), "gpu": ("float32", "bfloat16", "float16")}
_HEAD_DIM = {"tpu": 256, "gpu": 128}

# "tpu" or "gpu": see `interpreted`.
_interpreted: str | None = None


def check_implementation(name: Any) -> str:
    """ValueError unless it is one of `IMPLEMENTATIONS`."""
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"attn_implementation should be one of {', '.join(IMPLEMENTATIONS)}, not {name!r}")
    return name


def attention_kind(
    params: Params,
    batch_size: int,
    queries: int,
    *,
    cache: Cache | bool | None = None,
    cache_dtype: Any = None,
    attn_implementation: str = "auto",
) -> str:
    """What attention of a pass will be: ``"flash"`` or ``"eager"``; nothing is compiled or run.

    ``"auto"``, the default but for training, is ``"flash"`` on TPU and GPU for 256 queries of a row and more, where the
    kernels can do what is asked for (on GPU in float32 it is not: Triton's products may round to TF32; nor is it on
    GPUs before Ampere, such as T4). It is so for up to 8 queries of a row, too, over a cache of 512 columns and more,
    as in a step of decoding, by kernels that read the columns that a row has, no more; on TPU the columns are a
    multiple of 128 for that (`generate` makes its cache so). It is never so on CPU. For forward-mode derivatives ask
    for ``"eager"``: kernels have none.

    Args:
      queries: T, the tokens of a row in this pass: those of a prompt, or of a record to train on; 1 of a step.
      cache: one that has a past, or True in its place: a prompt is read on. (Into an empty one a prompt is read as if
        there were none.)
      cache_dtype: of an empty cache that is read into; see `init_cache`. One that has a past says it itself.

    Raises:
      ValueError: ``"flash"`` is asked for and cannot be had; the message says why.
    """
    has_past = cache is not None and cache is not False
    one_column = not isinstance(cache, Cache) or cache.index.ndim == 0
    dtype = cache.dtype if isinstance(cache, Cache) else cache_dtype
    if isinstance(cache, Cache):
        for_few = cache_for_few(params.placement, cache, queries)
    else:
        for_few = (MANY_COLUMNS, params.dtype) if has_past and queries <= FEW_QUERIES else None
    kind = settle(
        attn_implementation,
        params.config,
        params.placement,
        params.dtype,
        (batch_size, queries),
        has_past=has_past,
        one_column=one_column,
        for_few=for_few,
        not_for_many=rounded_cache(dtype),
        by_hand=spread_by_hand(params),
    )
    return "eager" if kind == "eager" else "flash"


def cache_for_few(placement: Placement | None, cache: Cache, queries: int) -> tuple[int, Any] | None:
    """``for_few`` of `settle` for so many tokens a row."""
    fits = cache.layout == default_layout(kernel_platform(placement)) and queries <= FEW_QUERIES
    return (cache.max_length, cache.dtype) if fits else None


def rounded_cache(dtype: Any) -> str | None:
    """What keeps kernels from reading into or over a cache of such a dtype, in words; None where nothing does.

    Tokens that are read into an empty int8 cache look at what it holds of them, as those that come later do.
    """
    return "the cache is int8" if dtype is not None and jnp.dtype(dtype) == jnp.int8 else None


def told(params: Params, name: str) -> str:
    """What a program is told of ``attn_implementation``: it settles ``"auto"`` by the shapes that it has itself."""
    return "eager" if name == "auto" and spread_by_hand(params) else name


def good_columns(placement: Placement | None, columns: int, name: str) -> int:
    """So many columns of a cache or a few more, so that the kernel for few tokens can read it, unless by ``name`` none
    will; on a GPU so that cuBLAS, too, can read it as it lies."""
    on = kernel_platform(placement)
    wanted = name != "eager" and on == "tpu" and columns >= MANY_COLUMNS
    unit = LANES if wanted else TENSOR_CORES if on == "gpu" else 1
    return -(-columns // unit) * unit


def settle(
    name: str,
    config: OPTConfig,
    placement: Placement | None,
    dtype: Any,
    shape: tuple[int, int],
    *,
    has_past: bool = False,
    one_column: bool = True,
    for_few: tuple[int, Any] | None = None,
    odd: str | None = None,
    not_for_many: str | None = None,
    by_hand: bool = False,
    on: str | None = None,
) -> str:
    """``"flash"``, ``"decode"`` or ``"eager"``, for a pass over ids ``[B, T]``.

    Args:
      one_column: all rows' queries begin in the same column.
      for_few: the columns of the cache that few tokens are read over, and its dtype, where it is in the platform's own
        layout: ``"decode"`` is the kernel for that.
      odd: what else is asked for that no kernel does, in words.
      not_for_many: and what only the kernel for few tokens does.
      by_hand: the params are spread over devices that no placement knows of.
      on: the platform, where the placement has no devices to tell it.

    Raises:
      ValueError: as `attention_kind`.
    """
    if check_implementation(name) == "eager":
        return "eager"
    old = None if _interpreted or on is not None else _too_old(placement)
    on = kernel_platform(placement) if on is None else _interpreted or on
    kernel, small = "flash", shape[1] < MANY_QUERIES
    problem = odd or not_for_many or old or _problem(config, placement, dtype, shape, on, has_past, one_column)
    if for_few and not odd and not old and _has_kernel_for_few(config, placement, dtype, shape[1], for_few, on):
        kernel, small, problem = "decode", for_few[0] < MANY_COLUMNS, None
    if name == "flash":
        if problem is not None:
            raise ValueError(
                f"attn_implementation='flash' cannot be had: {problem}; with 'auto' attention is then 'eager', "
                "the plain path"
            )
        return kernel
    rounds = on == "gpu" and kernel == "flash" and jnp.dtype(dtype) == jnp.float32
    return "eager" if problem or small or rounds or by_hand else kernel


def _problem(config, placement, dtype, shape, on: str, has_past: bool, one_column: bool) -> str | None:
    if on not in _DTYPES:
        return f"the kernels are for TPU and GPU, and these params are on {on.upper()}"
    if jnp.dtype(dtype).name not in _DTYPES[on]:
        return f"on {on.upper()} the kernels compute in {' or '.join(_DTYPES[on])}, not in {jnp.dtype(dtype).name}"
    if config.head_dim > _HEAD_DIM[on]:
        return f"on {on.upper()} the kernels take heads of up to {_HEAD_DIM[on]} dimensions, not {config.head_dim}"
    if parts(placement, shape[1], "length") > 1:
        return "a row's tokens are spread over devices (by the rule for 'length')"
    if on == "gpu" and jax.dtypes.canonicalize_dtype("float64") == jnp.float64:
        return "jax's kernel for GPUs cannot be compiled with jax_enable_x64 on"
    if has_past and on == "gpu":
        return "on GPU no kernel reads many tokens over a cache that has a past"
    if has_past and placement is not None and placement.shards("cache_length") > 1:
        return "the cache's columns are spread over devices (by the rule for 'cache_length')"
    if not one_column:
        return "the rows are in different columns of the cache"
    return None


def _too_old(placement: Placement | None) -> str | None:
    capability = compute_capability(placement)
    if capability is None or capability >= AMPERE:
        return None
    return f"on GPU the kernels need compute capability {AMPERE} or more, and these params are on one of {capability}"


def _has_kernel_for_few(config, placement, dtype, tokens: int, cache: tuple[int, Any], on: str) -> bool:
    columns, cache_dtype = cache
    if on not in _DTYPES or jnp.dtype(dtype).name not in _DTYPES[on]:
        return False
    if jnp.dtype(cache_dtype).name not in (*_DTYPES[on], "int8"):
        return False
    if placement is not None and placement.shards("cache_length") > 1:
        return False
    if on == "gpu":
        return config.head_dim <= _HEAD_DIM[on]
    from optjax.kernels.decode_tpu import fits

    heads = config.num_attention_heads // parts(placement, config.num_attention_heads, "heads")
    sizes = jnp.dtype(dtype).itemsize, jnp.dtype(cache_dtype).itemsize
    return fits(tokens, heads, config.head_dim, columns, *sizes)


def has_triton(placement: Placement | None) -> bool:
    """Whether the params are where kernels compiled by Triton run."""
    return kernel_platform(placement) == "gpu" and (_interpreted is not None or _too_old(placement) is None)


def spread_by_hand(params: Params) -> bool:
    """Whether arrays lie on several devices of which ``params.placement`` knows nothing; no kernel is split then."""
    if params.placement is not None or jax.device_count() == 1:
        return False
    leaves = [leaf for leaf in jax.tree.leaves(params) if isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer)]
    return any(len(leaf.sharding.device_set) > 1 for leaf in leaves)


def kernel_platform(placement: Placement | None) -> str:
    """The platform whose kernels are used: that of the params, or the one that is `interpreted`."""
    return _interpreted or platform(placement)


def interprets() -> bool:
    """Whether kernels are interpreted."""
    return _interpreted is not None


@contextlib.contextmanager
def interpreted(platform: str) -> Iterator[None]:
    """Runs the kernels of ``"tpu"`` or ``"gpu"`` by Pallas' interpreter, on any device and slowly: for tests.

    Compiled programs do not remember who wanted them, so they are forgotten at either end.
    """
    global _interpreted
    jax.clear_caches()
    _interpreted = platform
    try:
        yield
    finally:
        _interpreted = None
        jax.clear_caches()
