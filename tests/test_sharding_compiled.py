"""What the compiler makes of decoding over devices: which collectives there are, and how much they move."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

import optjax
from optjax.generation.decode import _decode_step
from optjax.generation.loop import run_generate
from optjax.generation.options import as_settings
from optjax.sharding import make_mesh
from optjax.sharding.plan.collectives import collectives
from optjax.sharding.plan.generation import abstract_cache

B, S, D = 8, 64, 64


def config(layers: int) -> optjax.OPTConfig:
    return optjax.OPTConfig(vocab_size=256, hidden_size=D, num_hidden_layers=layers, num_attention_heads=4, ffn_dim=128)


def abstract(layers: int, rules: str, mesh: str):
    return optjax.abstract_params(config(layers), mesh=make_mesh(mesh, jax.devices()[:8]), rules=rules)


def step(layers: int, rules: str = "tensor", mesh: str = "data=2,tensor=4") -> list:
    """The collectives of one decode step."""
    params = abstract(layers, rules, mesh)
    placement = params.placement
    ids = jax.ShapeDtypeStruct((B,), jnp.int32, sharding=placement.sharding(("batch",)))
    cache = abstract_cache(params.config, placement, B, S, "float32")
    text = _decode_step.lower(params, ids, cache).compile().as_text()
    return collectives(text, dict(placement.mesh.shape))


def count(found: list, kind: str, axes: tuple[str, ...] | None = None) -> int:
    return sum(c.count for c in found if c.kind == kind and axes in (None, c.axes))


@pytest.mark.parametrize("rules", ["tensor", "fsdp+tensor+sequence"])
def test_two_sums_a_layer(rules):
    """One after attention, one after the feed-forward layer, of an activation's size; and one of the embedding's."""
    two, three = step(2, rules), step(3, rules)
    assert count(three, "all-reduce", ("tensor",)) - count(two, "all-reduce", ("tensor",)) == 2
    assert count(two, "all-reduce") <= 2 * 2 + 1
    assert all(c.kind == "all-reduce" for c in two + three), two
    assert max(c.bytes for c in three) <= B * D * 4


def test_a_weight_is_gathered_once():
    """Fully sharded: each matrix once a step, and no activation is summed over what splits the rows."""
    two, three = (step(layers, "fsdp", "fsdp=8") for layers in (2, 3))
    # q, k, v, out, fc1 and fc2, their biases, two norms with weight and bias.
    matrices = [c for c in three if c.kind == "all-gather"]
    assert count(three, "all-gather") - count(two, "all-gather") <= 6 + 6 + 4, matrices
    assert count(three, "all-gather") - count(two, "all-gather") >= 6
    assert max(c.bytes for c in three) <= 2050 * D * 4  # the position table
    assert count(three, "all-reduce") == count(two, "all-reduce") == 0


@pytest.mark.parametrize("options", [{}, dict(do_sample=True, top_k=5, top_p=0.9)], ids=["greedy", "sampled"])
def test_the_loop_of_generate_moves_no_weight(options):
    """Beside the sums of each layer there is what choosing a token takes: less than the logits of all rows."""
    params = abstract(2, "tensor", "data=2,tensor=4")
    settings = as_settings(params.config, options)
    key = jax.eval_shape(lambda: jax.random.key(0)) if settings.do_sample else None
    prompt = [jax.ShapeDtypeStruct((B, 16), dtype) for dtype in (jnp.int32, jnp.bool_)]
    number = jax.ShapeDtypeStruct((), jnp.int32)
    text = run_generate.lower(params, *prompt, settings, key, number, room=16).compile().as_text()
    found = collectives(text, dict(params.placement.mesh.shape))
    # The prompt's activations are the largest, in the prefill before the loop.
    assert max(c.bytes for c in found) <= max(B * 16 * D * 4, B * 256 * 4), found
