"""Rows of a table that is spread over devices, and their cotangents: both ways of getting them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from optjax import OPTConfig
from optjax.sharding import make_mesh, make_placement
from optjax.sharding.lookup import lookup, lookup_gathered

CONFIG = OPTConfig(
    vocab_size=48, hidden_size=16, num_hidden_layers=1, num_attention_heads=4, ffn_dim=16, max_position_embeddings=30
)
MESHES = ("data=2,fsdp=2,tensor=2", "fsdp=4,sequence=2", "fsdp=8", "tensor=4,fsdp=2")


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("way", [lookup, lookup_gathered], ids=["exchanged", "gathered"])
def test_rows_and_cotangents(mesh, way):
    axes = ("vocab", "embed")
    placement = make_placement(make_mesh(mesh), None, CONFIG, "causal_lm")
    rng = np.random.default_rng(0)
    table, cotangent = (rng.standard_normal(shape).astype(np.float32) for shape in ((48, 16), (8, 6, 16)))
    index = rng.integers(0, 48, size=(8, 6))  # of 48 tokens many come twice

    @jax.jit
    def both(table, index, cotangent):
        rows, back = jax.vjp(lambda table: way(table, index, jnp.dtype(jnp.float32), placement, axes), table)
        return rows, back(cotangent)[0]

    rows, gradient = both(jax.device_put(table, placement.sharding(axes)), index, cotangent)
    np.testing.assert_array_equal(rows, table[index])
    expected = np.zeros_like(table)
    np.add.at(expected, index, cotangent)
    np.testing.assert_allclose(gradient, expected, atol=1e-6)
    assert gradient.sharding.is_equivalent_to(placement.sharding(axes), 2)
