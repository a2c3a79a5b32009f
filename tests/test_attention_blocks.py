"""Attention over blocks of queries: as transformers has it, whatever the block, the layout and the padding."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hf_models import assert_close, padded_masks, params_from, random_config, state_of, torch_model

import optjax
from optjax.attention_blocks import block_of_queries
from optjax.model import Inputs, decoder
from optjax.sharding import make_mesh, make_placement

ROWS, LENGTH, ROOM = 3, 14, 6


@pytest.fixture
def blocks_of(monkeypatch):
    """Sets the block that the model takes."""

    def set_block(block: int | None) -> None:
        monkeypatch.setattr("optjax.model.block_of_queries", lambda *_: block)

    return set_block


def model(seed: int, **changes):
    rng = np.random.default_rng(seed)
    config = random_config(rng).replace(max_position_embeddings=LENGTH + ROOM, **changes)
    theirs = torch_model(config, None, seed)
    ids = rng.integers(2, config.vocab_size, size=(ROWS, LENGTH))
    mask = padded_masks(rng, ROWS, LENGTH)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state.numpy()
    return params_from(state_of(theirs), config, None), ids, mask, expected


def run(params, ids, mask, cache=None, key=None):
    inputs = Inputs(jnp.asarray(ids), mask=jnp.asarray(mask, bool), cache=cache, dropout_key=key)
    return jax.jit(lambda params, inputs: decoder(params, inputs))(params, inputs)  # not to be found compiled


# 7 divides the row: blocks leave out the keys beyond them. The others take the loop, with a rest or of single queries.
@pytest.mark.parametrize("block", [7, 5, 1])
@pytest.mark.parametrize("seed", range(3))
def test_the_same_as_transformers(blocks_of, seed, block):
    params, ids, mask, expected = model(seed)
    blocks_of(block)
    assert_close(run(params, ids, mask).last_hidden_state, expected, mask)


@pytest.mark.parametrize("rows", [ROWS, 1])
@pytest.mark.parametrize("layout", ["heads", "flat"])
def test_the_same_over_a_cache(blocks_of, layout, rows):
    params, ids, mask, expected = model(3)
    ids, mask, expected = ids[:rows], mask[:rows], expected[:rows]
    blocks_of(4)
    cache = optjax.init_cache(params, rows, LENGTH + ROOM, layout=layout)
    first = run(params, ids[:, :9], mask[:, :9], cache)
    second = run(params, ids[:, 9:], mask[:, 9:], first.cache)
    found = np.concatenate([first.last_hidden_state, second.last_hidden_state], 1)
    assert_close(found, expected, mask)


def test_dropout_falls_as_without_blocks(blocks_of):
    params, ids, mask, _ = model(4)
    params = dataclasses.replace(params, config=params.config.replace(attention_dropout=0.4, dropout=0.0))
    found = []
    for block in (None, 7, 5):
        blocks_of(block)
        found.append(run(params, ids, mask, key=jax.random.key(0)).last_hidden_state)
    assert_close(found[1], found[0], mask)
    assert_close(found[2], found[0], mask)


def test_spread_over_the_length(blocks_of):
    """Blocks are then every n-th query, so that each device has its part of every block."""
    params, ids, mask, expected = model(5, ffn_dim=20)  # rows that two devices share out
    mesh = make_mesh("sequence=2", jax.devices()[:2])
    placement = make_placement(mesh, None, params.config, None)
    for block in (7, 5):
        blocks_of(block)
        assert_close(run(dataclasses.replace(params, placement=placement), ids, mask).last_hidden_state, expected, mask)


def test_gradients_flow_through_the_loop(blocks_of):
    params, ids, mask, _ = model(6)

    def total(block):
        blocks_of(block)
        inputs = Inputs(jnp.asarray(ids), mask=jnp.asarray(mask, bool))
        return jax.grad(lambda params: jnp.square(decoder(params, inputs).last_hidden_state).sum())(params)

    # All together: what the keys' biases should have is 0.
    ours, theirs = (np.concatenate([g.ravel() for g in jax.tree.leaves(total(block))]) for block in (5, None))
    assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("rows", "queries", "keys", "heads", "block"),
    [
        (1, 1, 2048, 96, None),  # a decode step
        (8, 512, 1024, 12, 256),
        (1, 2048, 2048, 12, 1024),  # never all of [B, H, T, T] of a long prompt
        (1, 2048, 2048, 40, 512),
        (32, 512, 2048, 96, 128),  # no fewer
    ],
)
def test_the_block_follows_from_the_bytes(rows, queries, keys, heads, block):
    assert block_of_queries(None, rows, queries, keys, heads) == block


def test_a_prompt_on_many_devices_counts_a_devices_share():
    config = optjax.OPTConfig(hidden_size=64, num_attention_heads=32, num_hidden_layers=1, ffn_dim=8, vocab_size=32)
    placement = make_placement(make_mesh("data=2,tensor=4", jax.devices()[:8]), None, config, None)
    assert block_of_queries(None, 4, 1024, 1024, 32) == 256
    assert block_of_queries(placement, 4, 1024, 1024, 32) is None
