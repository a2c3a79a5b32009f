"""The kernels that read a cache for few tokens, by themselves, interpreted on the CPU: beside the plain path."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from optjax.attention import attend as attend_plainly
from optjax.cache_codes import Codes, encode
from optjax.kernels import decode_gpu, decode_tpu

# Five blocks of 128.
COLUMNS = 640


both = pytest.mark.parametrize("on", ["tpu", "gpu"])


def arrays(seed: int, rows: int, tokens: int, heads: int, head_dim: int, on: str, coded: bool = False):
    """Queries, keys and values in a platform's layout, a mask with a beginning and an end for each row, and the buffers
    of the kernel."""
    rng = np.random.default_rng(seed)
    q = rng.normal(size=(rows, tokens, heads, head_dim)).astype(np.float32)
    k, v = (jnp.asarray(rng.normal(size=(rows, COLUMNS, heads, head_dim)), jnp.float32) for _ in range(2))
    bounds = np.sort(rng.integers(0, COLUMNS, size=(rows, 2)), axis=1)
    columns = np.arange(COLUMNS)
    mask = (columns >= bounds[:, :1]) & (columns <= bounds[:, 1:])
    mask = mask[:, None] & (rng.random((rows, tokens, COLUMNS)) < 0.8)
    mask[np.arange(rows), :, bounds[:, 0]] = True  # no query sees nothing

    def laid_out(x):
        return x.reshape(rows, COLUMNS, -1) if on == "tpu" else x.swapaxes(1, 2)

    if coded:
        k, v = (Codes(laid_out(codes), scales.swapaxes(1, 2)) for codes, scales in map(encode, (k, v)))
        buffers = [k.codes, k.scales, v.codes, v.scales]
    else:
        buffers = k, v = [laid_out(x) for x in (k, v)]
    return jnp.asarray(q), k, v, mask, buffers


def attend(q, mask, buffers, on):
    b, t, _, k = q.shape
    if on == "gpu":
        return decode_gpu.attend(q, jnp.asarray(mask), buffers, interpret=True).reshape(b, t, -1)
    return decode_tpu.attend(q.reshape(b, t, -1), jnp.asarray(mask), buffers, head_dim=k, interpret=True)


@both
@pytest.mark.parametrize("coded", [False, True], ids=["float32", "int8"])
@pytest.mark.parametrize(
    ("rows", "tokens", "heads", "head_dim"), [(1, 1, 3, 4), (4, 1, 12, 8), (3, 1, 8, 16), (3, 3, 5, 6), (2, 8, 16, 5)]
)
def test_as_the_plain_path(rows, tokens, heads, head_dim, coded, on):
    q, k, v, mask, buffers = arrays(rows + tokens, rows, tokens, heads, head_dim, on, coded)
    layout = "flat" if on == "tpu" else "heads"
    expected, _ = attend_plainly(q, k, v, jnp.asarray(mask)[:, None], layout=layout)
    np.testing.assert_allclose(attend(q, mask, buffers, on), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("columns", [1, 40, 128, 300, 515, 1100])
def test_columns_that_no_block_divides(columns):
    """On GPU any will do; of wide heads a block has fewer."""
    for heads, head_dim in ((2, 4), (1, 80)):
        rng = np.random.default_rng(columns)
        q = jnp.asarray(rng.normal(size=(2, 2, heads, head_dim)), jnp.float32)
        k, v = (jnp.asarray(rng.normal(size=(2, heads, columns, head_dim)), jnp.float32) for _ in range(2))
        mask = rng.random((2, 2, columns)) < 0.5
        mask[..., -1] = True
        expected, _ = attend_plainly(q, k, v, jnp.asarray(mask)[:, None], layout="heads")
        np.testing.assert_allclose(attend(q, mask, [k, v], "gpu"), expected, rtol=2e-5, atol=2e-5)


def test_a_row_costs_its_own_columns():
    """On TPU blocks in which a row looks at nothing are not read: what lies there would be seen."""
    q, _, _, mask, buffers = arrays(0, 4, 1, 4, 8, "tpu")
    expected = attend(q, mask, buffers, "tpu")
    used = mask.any(1).reshape(4, 5, 128).any(2)
    first, last = used.argmax(1), 4 - used[:, ::-1].argmax(1)
    assert (last - first < 4).any()
    block = np.arange(COLUMNS) // 128
    read = (block >= first[:, None]) & (block <= last[:, None])
    poisoned = [jnp.where(read[..., None], x, jnp.nan) for x in buffers]
    np.testing.assert_array_equal(attend(q, mask, poisoned, "tpu"), expected)


def test_a_row_costs_its_own_columns_on_gpu():
    """To the column: none before the first that it looks at, none after the last."""
    q, _, _, mask, buffers = arrays(0, 4, 1, 4, 8, "gpu")
    expected = attend(q, mask, buffers, "gpu")
    used = mask.any(1)
    read = (np.cumsum(used, axis=1) > 0) & (np.cumsum(used[:, ::-1], axis=1)[:, ::-1] > 0)
    assert (read.sum(1) < COLUMNS).all()
    poisoned = [jnp.where(read[:, None, :, None], x, jnp.nan) for x in buffers]
    np.testing.assert_array_equal(attend(q, mask, poisoned, "gpu"), expected)


@pytest.mark.parametrize(
    ("heads", "columns", "wanted"), [(12, 2048, 16), (96, 2048, 6), (256, 2048, 2), (1024, 2048, 1), (12, 200, 1)]
)
def test_a_head_is_shared_where_there_are_few(heads, columns, wanted):
    assert decode_gpu.parts(heads, columns, decode_gpu.block_of_columns(64)) == wanted


def test_each_block_is_fetched_once():
    """And no other one: a fetch is a step whose row or block is not that of the step before."""
    rng = np.random.default_rng(0)
    for rows in (1, 2, 5):
        first, last = np.sort(rng.integers(0, 6, size=(2, rows)), axis=0)
        steps = [(row, i) for row in range(rows) for i in range(6)]
        there = [tuple(map(int, decode_tpu.fetched(row, i, first, last, rows))) for row, i in steps]
        fetches = [each for each, before in zip(there, [None, *there], strict=False) if each != before]
        assert fetches == [(row, i) for row in range(rows) for i in range(first[row], last[row] + 1)]
        used = [at for at, (row, i) in zip(there, steps, strict=True) if first[row] + i <= last[row]]
        assert used == fetches


@both
def test_a_row_that_sees_nothing_gets_the_mean(on):
    """As by softmax over what is all masked: finite, whatever else is in the batch."""
    q, _, _, mask, buffers = arrays(1, 3, 1, 4, 8, on)
    mask[1] = False
    found = attend(q, mask, buffers, on)
    np.testing.assert_allclose(found[1, 0], buffers[1][1].mean(-2).ravel(), rtol=1e-4, atol=1e-5)
    assert np.isfinite(found).all()
