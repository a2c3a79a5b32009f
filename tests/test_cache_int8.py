"""The int8 cache beside numpy's own rounding, and decoding with it beside the float cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import assert_close

import optjax
from optjax.attention import attend
from optjax.cache import write_columns
from optjax.cache_codes import Codes

CONFIG = optjax.OPTConfig(
    vocab_size=48, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, ffn_dim=64, max_position_embeddings=64,
    init_std=0.3,
)  # fmt: skip


def as_numpy(new: np.ndarray) -> np.ndarray:
    """``[B, T, H, K]`` as 8 bits tell it."""
    scales = np.abs(new).max(-1, keepdims=True).astype(np.float32) / np.float32(127)
    return np.rint(new * (1 / np.where(scales == 0, 1, scales))) * scales


@pytest.mark.parametrize("layout", ["heads", "flat"])
@pytest.mark.parametrize("rows, queries", [(1, 1), (3, 2), (3, 20)])
@pytest.mark.parametrize("on_cpu", [False, True])
def test_attention_is_that_of_rounded_keys_and_values(layout, rows, queries, on_cpu):
    """Columns that nothing was written to, rows at columns of their own, and a column of zeros among them."""
    rng = np.random.default_rng(rows + queries)
    s, h, k = 24, 3, 16
    cache = optjax.init_cache(CONFIG, rows, s, "int8", layout=layout)
    assert cache.dtype == jnp.int8 and all(x.dtype == jnp.int8 for x in cache.keys)
    at = np.arange(1, rows + 1) if rows > 1 else np.int32(2)
    buffers, exact = [], []
    for buffer in (cache.keys[0], cache.values[0]):
        new = rng.standard_normal((rows, 20, h, k)).astype(np.float32) * rng.exponential(size=(rows, 20, h, 1))
        new[:, 3] = 0
        buffers.append(write_columns(buffer, jnp.asarray(new, jnp.float32), jnp.asarray(at, jnp.int32), layout))
        whole = np.zeros((rows, s, h, k), np.float32)
        for row, first in enumerate(np.broadcast_to(at, rows)):
            whole[row, first : first + 20] = as_numpy(new[row].astype(np.float32))
        exact.append(whole)
    q = rng.standard_normal((rows, queries, h, k)).astype(np.float32)
    mask = rng.random((rows, 1, queries, s)) < 0.7
    mask[..., 6] = True
    out, weights = attend(jnp.asarray(q), *buffers, jnp.asarray(mask), layout=layout, on_cpu=on_cpu)
    scores = np.where(mask, np.einsum("bthk,bshk->bhts", q, exact[0]), -np.inf)
    expected = np.exp(scores - scores.max(-1, keepdims=True))
    expected /= expected.sum(-1, keepdims=True)
    assert_close(weights, expected)
    assert_close(out, np.einsum("bhts,bshk->bthk", expected, exact[1]).reshape(rows, queries, h * k))


def test_a_scale_for_each_head_of_each_token():
    cache = optjax.init_cache(CONFIG, 2, 8, "int8")
    assert isinstance(cache.keys[0], Codes) and cache.keys[0].scales.shape == (2, 3, 8)
    total = sum(x.nbytes for x in jax.tree.leaves((cache.keys, cache.values)))
    assert total == 2 * 2 * 2 * 8 * (48 + 3 * 4)
    # Of the sizes there are, heads of 64 numbers and more: at most 0.55 of bfloat16's.
    config = optjax.OPTConfig.preset("opt-125m")
    size = {}
    for dtype in ("int8", "bfloat16"):
        keys = jax.eval_shape(lambda: optjax.init_cache(config, 4, 128, dtype).keys)  # noqa: B023
        size[dtype] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(keys))
    assert size["int8"] <= 0.55 * size["bfloat16"]
    for wrong in ("int4", jnp.int32, "uint8"):
        with pytest.raises(ValueError, match="floating dtype such as jnp.bfloat16, or of int8"):
            optjax.init_cache(CONFIG, 2, 8, wrong)


WAYS = {
    "samples": (1, dict(do_sample=True, key=jax.random.key(1), top_k=5, num_return_sequences=2)),
    "beams": (1, dict(num_beams=3)),
    "contrastive": (3, dict(penalty_alpha=0.6, top_k=4)),
}


@pytest.mark.parametrize("way", WAYS)
def test_decoding_says_what_it_says_with_floats(way):
    """Rounding moves few tokens: a cache that lost a column, a row or a scale would move most of them."""
    rows, options = WAYS[way]
    params = optjax.init_params(CONFIG, jax.random.key(1))
    ids = np.random.default_rng(0).integers(3, 48, size=(rows, 9))
    mask = np.ones_like(ids)
    mask[0, :4] = 0
    floats, codes = (
        np.asarray(optjax.generate(params, ids, mask, max_new_tokens=12, cache_dtype=dtype, **options))[:, 9:]
        for dtype in (None, "int8")
    )
    assert (floats[:, 0] == codes[:, 0]).all() and (floats == codes).mean() > 0.7


def test_a_smaller_model_guesses_with_codes_too():
    """The greedy ids of the int8 cache, whatever is guessed."""
    params = optjax.init_params(CONFIG, jax.random.key(1))
    smaller = optjax.init_params(CONFIG.replace(num_hidden_layers=1), jax.random.key(2))
    ids = np.random.default_rng(0).integers(3, 48, size=(3, 9))
    options = dict(max_new_tokens=12, cache_dtype="int8", eos_token_id=[])
    plain = optjax.generate(params, ids, **options)
    np.testing.assert_array_equal(optjax.generate(params, ids, assistant_model=smaller, **options), plain)
    logits, cache = optjax.prefill(params, ids, max_length=32, cache_dtype="int8")
    for column in range(9, 21):
        assert (np.asarray(logits).argmax(-1) == np.asarray(plain)[:, column]).all()
        logits, cache = optjax.decode_step(params, plain[:, column], cache)
    assert isinstance(cache.keys[0], Codes)
