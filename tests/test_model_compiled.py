"""What XLA is given and what it makes of it: dtypes, and memory beyond arguments and results."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from compilations import AS_USERS_DO

import optjax
from optjax import OPTConfig

CONFIG = OPTConfig(
    vocab_size=64, hidden_size=64, num_hidden_layers=12, num_attention_heads=8, ffn_dim=256, max_position_embeddings=512
)
DEEP = CONFIG.replace(num_hidden_layers=24)


def _compile(function, *arguments):
    return jax.jit(function).lower(*arguments).compile(compiler_options=AS_USERS_DO)


def _ids(rows: int, columns: int):
    return jax.ShapeDtypeStruct((rows, columns), jnp.int32)


def _temporary(compiled) -> int:
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def _bytes(tree) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_no_float64_and_no_stray_float32(dtype):
    params = optjax.abstract_params(CONFIG.replace(num_hidden_layers=1), dtype)
    cache = jax.eval_shape(lambda: optjax.init_cache(params, 2, 16))
    text = jax.jit(lambda *a: optjax.causal_lm(a[0], a[1], cache=a[2], labels=a[1])).lower(params, _ids(2, 8), cache)
    text = text.as_text()
    assert "f64" not in text
    products = re.findall(r"dot_general .* : \(tensor<\S*x(\w+)>, tensor<\S*x(\w+)>\) -> tensor<\S*x(\w+)>", text)
    # q, k, v, scores, values, out, fc1, fc2, logits: scores and logits come out in float32, and on CPU linear layers.
    own = "bf16" if dtype == jnp.bfloat16 else "f32"
    linear = "f32" if jax.default_backend() == "cpu" else own
    results = [linear, linear, linear, "f32", own, linear, linear, linear, "f32"]
    assert products == [(own, own, result) for result in results]
    # Of norms, softmax and loss no square root, exponential, logarithm or sum is of another dtype than float32.
    lines = [line for line in text.splitlines() if re.search(r"stablehlo\.(rsqrt|exponential|log|reduce)\b", line)]
    floats = [line for line in lines if "f32>" in line or "f16>" in line]
    assert len(floats) >= 3 * 3 + 4 and not [line for line in floats if "f16>" in line]


def test_only_what_was_asked_for_is_kept():
    """Without output_attentions no program holds the attention weights of more than a layer or two at once."""
    rows, columns = 2, 256
    one_layer = rows * CONFIG.num_attention_heads * columns * columns * 4
    for stacked in (False, True):
        params = optjax.abstract_params(DEEP, stacked=stacked)
        lean = _compile(optjax.causal_lm, params, _ids(rows, columns))
        assert _temporary(lean) < 4 * one_layer
    out = jax.eval_shape(optjax.forward, params, _ids(rows, columns))
    assert out.attentions is None and out.hidden_states is None and out.cache is None
    assert [leaf.shape for leaf in jax.tree.leaves(out)] == [(rows, columns, 64)]
    asked = jax.eval_shape(lambda *a: optjax.forward(*a, output_attentions=True), params, _ids(rows, columns))
    assert len(asked.attentions) == 24 and asked.hidden_states is None


@pytest.mark.parametrize("stacked", [False, True])
def test_no_copy_of_the_weights(stacked):
    params = optjax.abstract_params(DEEP, stacked=stacked)
    one_layer = _bytes(optjax.abstract_params(DEEP)["layers"][0])
    compiled = _compile(optjax.causal_lm, params, _ids(1, 4))
    assert _temporary(compiled) < 2 * one_layer + 2**18 < _bytes(params) / 4


@pytest.mark.parametrize("rows", [1, 4])
def test_a_step_in_bfloat16_copies_no_weights(rows):
    """XLA's CPU backend multiplies most products of bfloat16 by way of float32 copies; not those with weights."""
    params = optjax.abstract_params(CONFIG.replace(vocab_size=2048, hidden_size=256, ffn_dim=1024), jnp.bfloat16)
    cache = jax.eval_shape(lambda: optjax.init_cache(params, rows, 16))
    step = jax.jit(lambda params, ids, cache: optjax.causal_lm(params, ids, cache=cache), donate_argnums=2)
    compiled = step.lower(params, _ids(rows, 1), cache).compile(compiler_options=AS_USERS_DO)
    assert _temporary(compiled) < _bytes(params["layers"][0]["fc1"]["weight"])


@pytest.mark.parametrize("layout", ["heads", "flat"])
def test_a_cached_step_writes_in_place(layout):
    """With the cache donated, one token's step needs no room of a layer's cache, let alone of all.

    In float32: XLA's CPU backend multiplies bfloat16 by way of float32 copies.
    """
    params = optjax.abstract_params(CONFIG)
    cache = jax.eval_shape(lambda: optjax.init_cache(params, 4, 512, layout=layout))
    step = jax.jit(lambda params, ids, cache: optjax.causal_lm(params, ids, cache=cache), donate_argnums=2)
    compiled = step.lower(params, _ids(4, 1), cache).compile(compiler_options=AS_USERS_DO)
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.alias_size_in_bytes >= _bytes((cache.keys, cache.values))
    assert memory.temp_size_in_bytes < _bytes((cache.keys[0], cache.values[0]))
