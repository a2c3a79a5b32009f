"""Dropout, attention dropout and layerdrop: off without a key, and with one at their rates, each on its own."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hf_models import params_from, state_of, torch_model

import optjax
from optjax import OPTConfig
from optjax.attention import drop

CONFIG = OPTConfig(
    vocab_size=60,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    ffn_dim=32,
    max_position_embeddings=12,
    dropout=0.0,
)
IDS = np.random.default_rng(0).integers(3, 60, size=(2, 6))
KEYS = jax.random.split(jax.random.key(0), 300)


def _params(**changes):
    config = CONFIG.replace(**changes)
    return params_from(state_of(torch_model(config, None, seed=9)), config, None)


def _runs(params: optjax.Params, **options):
    """The outputs for all keys, with a leading axis; of stacked layers, as that compiles one only."""
    params = optjax.stack_layers(params)
    return jax.jit(jax.vmap(lambda key: optjax.forward(params, IDS, dropout_key=key, **options)))(KEYS)


def _assert_rate(events: np.ndarray, rate: float) -> None:
    """The share of True among independent events, within 5 standard errors of ``rate``."""
    assert abs(np.mean(events) - rate) < 5 * np.sqrt(rate * (1 - rate) / np.size(events))


def test_without_a_key_rates_do_nothing():
    plain = optjax.forward(_params(), IDS)
    rates = optjax.forward(_params(dropout=0.5, attention_dropout=0.5, layerdrop=0.5), IDS)
    np.testing.assert_array_equal(plain.last_hidden_state, rates.last_hidden_state)
    keyed = optjax.forward(_params(), IDS, dropout_key=jax.random.key(0))
    np.testing.assert_array_equal(plain.last_hidden_state, keyed.last_hidden_state)


def test_same_key_same_result_in_both_layouts():
    listed = _params(dropout=0.2, attention_dropout=0.3, layerdrop=0.4)
    stacked = optjax.stack_layers(listed)
    options = dict(output_hidden_states=True, output_attentions=True)
    for seed in range(3):
        key = jax.random.key(seed)
        first = optjax.forward(listed, IDS, dropout_key=key, **options)
        again = optjax.forward(listed, IDS, dropout_key=jax.random.PRNGKey(seed), **options)
        scanned = optjax.forward(stacked, IDS, dropout_key=key, **options)
        for a, b, c in zip(*(jax.tree.leaves(out) for out in (first, again, scanned)), strict=True):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(np.asarray(a) == 0, np.asarray(c) == 0)  # the same are dropped
            np.testing.assert_allclose(a, c, atol=1e-5)
    other = optjax.forward(listed, IDS, dropout_key=jax.random.key(99)).last_hidden_state
    assert not np.allclose(other, first.last_hidden_state)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_drop(rate, dtype):
    x = jnp.full((100, 200), 3.0, dtype)
    y = drop(x, rate, jax.random.key(1))
    assert y.dtype == dtype
    y = np.asarray(y, np.float32)
    _assert_rate(y == 0, rate)
    np.testing.assert_allclose(y[y != 0], 3 / (1 - rate), rtol=2 * float(jnp.finfo(dtype).eps))


def test_dropout_of_both_blocks():
    """With out_proj and fc2 answering 1 and 2 everywhere, a layer adds just what dropout leaves of them."""
    rate = 0.2
    params = _params(dropout=rate)
    for layer in params["layers"]:
        for linear, answer in ((layer["self_attn"]["out_proj"], 1.0), (layer["fc2"], 2.0)):
            linear["weight"] = jnp.zeros_like(linear["weight"])
            linear["bias"] = jnp.full_like(linear["bias"], answer)
    hidden = _runs(params, output_hidden_states=True).hidden_states
    np.testing.assert_array_equal(hidden[0], np.broadcast_to(hidden[0][:1], hidden[0].shape))  # none on embeddings
    kept = 1 / (1 - rate)
    attention, mlp = [], []
    for before, after in zip(hidden[:-2], hidden[1:-1], strict=True):
        added = np.asarray(after - before)
        nearest = np.round(added / kept)
        np.testing.assert_allclose(added, nearest * kept, atol=1e-5)
        assert set(np.unique(nearest)) == {0, 1, 2, 3}
        attention.append(nearest % 2 == 0)
        mlp.append(nearest < 2)
    attention, mlp = np.array(attention), np.array(mlp)
    _assert_rate(attention, rate)
    _assert_rate(mlp, rate)
    _assert_rate(attention & mlp, rate * rate)  # of each other
    _assert_rate(attention[0] & attention[1], rate * rate)  # of the next layer
    _assert_rate(attention[:, :-1] & attention[:, 1:], rate * rate)  # of the next key
    _assert_rate(attention[..., 1:, :] & attention[..., :-1, :], rate * rate)  # of the next token


def test_attention_dropout():
    rate = 0.3
    params = _params(attention_dropout=rate)
    plain = optjax.forward(params, IDS, output_attentions=True)
    out = _runs(params, output_attentions=True)
    weights, exact = np.asarray(out.attentions[0]), np.asarray(plain.attentions[0])
    open_ = np.broadcast_to(exact > 0, weights.shape)
    _assert_rate(weights[open_] == 0, rate)
    kept = weights != 0
    np.testing.assert_allclose(weights[kept], np.broadcast_to(exact / (1 - rate), weights.shape)[kept], rtol=1e-5)
    np.testing.assert_allclose(weights.mean(0), exact, atol=5 * (rate / (1 - rate) / len(KEYS)) ** 0.5)
    assert not np.allclose(out.last_hidden_state[0], out.last_hidden_state[1])


@pytest.mark.parametrize("before", [True, False])
def test_layerdrop(before):
    """A dropped layer hands on its input bit for bit; one that is not does what it always does."""
    rate = 0.25
    params = _params(layerdrop=rate, do_layer_norm_before=before)
    hidden = _runs(params, output_hidden_states=True).hidden_states
    plain = optjax.forward(params, IDS, output_hidden_states=True).hidden_states
    skipped = []
    for before_layer, after in zip(hidden[:-2], hidden[1:-1], strict=True):
        same = (np.asarray(before_layer) == np.asarray(after)).reshape(len(KEYS), -1)
        assert (same.all(1) | ~same.any(1)).all()  # whole layers, all rows at once
        skipped.append(same.all(1))
    _assert_rate(np.array(skipped), rate)
    _assert_rate(skipped[0] & skipped[1], rate * rate)
    whole = ~skipped[0]
    np.testing.assert_allclose(hidden[1][whole], np.broadcast_to(plain[1], hidden[1][whole].shape), atol=1e-5)


def test_mean_over_keys_approaches_the_plain_result():
    params = _params(dropout=0.1, attention_dropout=0.1, _remove_final_layer_norm=True)
    out = np.asarray(_runs(params).last_hidden_state)
    plain = np.asarray(optjax.forward(params, IDS).last_hidden_state)
    # The layers are not linear, so the mean is not quite the plain result; one run is much further off.
    one, mean = np.abs(out - plain).mean(), np.abs(out.mean(0) - plain).mean()
    assert mean < 0.2 * one


def test_gradients_with_dropout_are_those_of_the_same_masks():
    """Along a direction, the gradient under a key is the slope of the loss under that key."""
    params = optjax.stack_layers(_params(dropout=0.2, attention_dropout=0.2, layerdrop=0.2, activation_function="tanh"))

    def loss(embeds):
        out = optjax.forward(params, inputs_embeds=embeds, dropout_key=jax.random.key(2))
        return jnp.square(out.last_hidden_state).mean()

    embeds = params["embed_tokens"]["weight"][IDS]
    direction = jax.random.normal(jax.random.key(3), embeds.shape)
    program = jax.jit(jax.value_and_grad(loss))
    slope = (program(embeds + 1e-2 * direction)[0] - program(embeds - 1e-2 * direction)[0]) / 2e-2
    np.testing.assert_allclose(jnp.vdot(program(embeds)[1], direction), slope, rtol=1e-2)
