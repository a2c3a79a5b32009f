"""The kernel for products with 4 bits on GPU, interpreted on the CPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import random_config

import optjax
from optjax.kernels import four_bits
from optjax.kernels.choice import interpreted
from optjax.quantization.product import product
from optjax.quantization.weight import encode

kinds = pytest.mark.parametrize("kind", ["int4", "nf4"])


@pytest.fixture
def calls(monkeypatch):
    """The shapes of the inputs' halves that the kernel is given."""
    calls = []
    inner = four_bits.product

    def product(halves, *rest, **options):
        calls.append(halves[0].shape)
        return inner(halves, *rest, **options)

    monkeypatch.setattr(four_bits, "product", product)
    with interpreted("gpu"):
        yield calls


@kinds
@pytest.mark.parametrize(
    ("rows", "n_out", "n_in", "size"),
    [(1, 70, 200, 32), (3, 130, 512, 64), (16, 64, 640, 128), (5, 33, 90, 32), (2, 5, 1100, 32)],
)
def test_as_the_matrix_decoded(calls, kind, rows, n_out, n_in, size):
    """And the gradient. A group that is not full, outputs that no program divides, and shares of many groups."""
    rng = np.random.default_rng(rows)
    w = encode(jnp.asarray(rng.normal(size=(n_out, n_in)), jnp.float32), kind, size, jnp.float32, native=False)
    x = jnp.asarray(rng.normal(size=(rows, 1, n_in)), jnp.float32)
    found, back = jax.vjp(lambda x: product(x, w, on="gpu", kernels=True), x)
    assert calls == [(rows, -(-n_in // size), size // 2)]
    whole = np.asarray(w.dequantize(), np.float64)
    wanted = np.asarray(x, np.float64) @ whole.T
    np.testing.assert_allclose(found, wanted, atol=2e-6 * np.abs(wanted).max())
    gradient = np.asarray(found, np.float64) @ whole
    np.testing.assert_allclose(back(found)[0], gradient, atol=2e-6 * np.abs(gradient).max())


@kinds
def test_in_16_bits(calls, kind):
    """What is rounded is the input, and a level of nf4: products are summed in float32."""
    rng = np.random.default_rng(1)
    w = encode(jnp.asarray(rng.normal(size=(70, 256)), jnp.float32), kind, 64, jnp.bfloat16, native=False)
    x = jnp.asarray(rng.normal(size=(4, 256)), jnp.bfloat16)
    found = product(x, w, on="gpu", kernels=True)
    wanted = np.asarray(x, np.float64) @ np.asarray(w.astype(jnp.float32).dequantize(), np.float64).T
    assert found.dtype == jnp.float32 and calls
    np.testing.assert_allclose(found, wanted, atol=(1e-6 if kind == "int4" else 4e-3) * np.abs(wanted).max())


@pytest.mark.parametrize(("rows", "size"), [(17, 64), (1, 16), (1, 96)])
def test_what_the_kernel_does_not_take(calls, rows, size):
    """More rows are worth decoding a matrix for; of other groups tensor cores make no product."""
    w = encode(jax.random.normal(jax.random.key(0), (8, 192)), "int4", size, jnp.float32, native=False)
    x = jax.random.normal(jax.random.key(1), (rows, 192))
    found = product(x, w, on="gpu", kernels=True)
    assert not calls
    np.testing.assert_allclose(found, x @ w.dequantize().T, rtol=1e-4, atol=1e-4)


@kinds
def test_generate(calls, kind):
    """A prompt is read with the matrices decoded, and each step is by the kernel: the ids are those of the CPU."""
    config = random_config(np.random.default_rng(3)).replace(max_position_embeddings=64)
    params = optjax.quantize(optjax.init_params(config, jax.random.key(0)), kind)
    ids = np.random.default_rng(4).integers(4, config.vocab_size, size=(2, 11))
    options = {"max_new_tokens": 8, "eos_token_id": []}
    found = optjax.generate(params, ids, **options)
    assert calls and {rows for rows, *_ in calls} == {2}
    with interpreted("tpu"):  # which has none
        calls.clear()
        expected = optjax.generate(params, ids, **options, attn_implementation="eager")
        assert not calls
    np.testing.assert_array_equal(found, expected)
