"""A loop in stages, over a cache that grows: a step pays for the columns there are, not for all that there may be.

XLA's programs have static shapes, and a product with some columns of a buffer would copy them on a CPU. So the loop is
cut into a few, each over a cache of twice the columns of the one before, which it begins with a copy of. Where the
memory is a device's own, the two caches that this takes for a moment are too many, and there is one stage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from optjax.cache import Cache, grow_cache
from optjax.manual import as_after
from optjax.params import Params
from optjax.placed import platform

# A stage is another loop to compile: none is worth that for fewer columns, or for fewer steps.
COLUMNS = 512
STEPS = 128


def stages(params: Params, filled: int, columns: int) -> list[int]:
    """The numbers of columns of the stages, from ``filled`` ones to all."""
    sizes = [columns]
    if platform(params.placement) == "cpu":
        while sizes[0] // 2 >= max(COLUMNS, filled + STEPS):
            sizes.insert(0, sizes[0] // 2)
    return sizes


def loop_in_stages(
    params: Params,
    sizes: list[int],
    more: Callable[[Any], jax.Array],
    body: Callable[[Any], Any],
    carry: Any,
    cache_of: Callable[[Any], Cache],
    with_cache: Callable[[Any, Cache], Any],
    width: int,
) -> Any:
    """`jax.lax.while_loop` in stages of so many columns; a step writes ``width`` of them.

    The carry comes with a cache of the first size. It may have more columns by a few, which then all have.
    """
    carry = as_after(body, carry)
    extra = cache_of(carry).max_length - sizes[0]
    for size, following in zip(sizes, sizes[1:], strict=False):

        def goes_on(carry: Any, columns: int = size + extra) -> jax.Array:
            return more(carry) & (cache_of(carry).index + width <= columns)

        carry = jax.lax.while_loop(goes_on, body, carry)
        carry = with_cache(carry, grow_cache(cache_of(carry), following + extra, params.placement))
    return jax.lax.while_loop(more, body, carry)
