"""A train step over eight devices, with every lever, is the plain one on one device."""

from __future__ import annotations

import dataclasses
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optjax
from optjax import OPTConfig, init_params
from optjax.sharding import RULES, make_mesh
from optjax.train.adamw import Moments, round_at_random
from optjax.train.backward import loss_and_gradients
from optjax.train.checkpoint import Checkpoints
from optjax.train.loss import evaluate, next_token_loss
from optjax.train.optimizer import Recipe, decayed, learning_rate
from optjax.train.options import StepOptions
from optjax.train.placing import place_batch
from optjax.train.state import abstract_state, init_state, train_step

CONFIG = OPTConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=8,
    ffn_dim=48,
    max_position_embeddings=20,
    dropout=0.0,
    init_std=0.2,
)
ARCHITECTURES = {
    "plain": {},
    "post-norm, projections": dict(do_layer_norm_before=False, word_embed_proj_dim=16, activation_function="gelu"),
    "no biases, no norm weights": dict(enable_bias=False, layer_norm_elementwise_affine=False),
    "untied, no final norm": dict(tie_word_embeddings=False, _remove_final_layer_norm=True),
}
# Every axis that a rule set uses has more than one device.
SPREADS = {
    "data": "data=2,fsdp=2,tensor=2",
    "fsdp": "data=2,fsdp=2,sequence=2",
    "tensor": "fsdp=2,tensor=4",
    "fsdp+tensor": "fsdp=4,tensor=2",
    "fsdp+tensor+sequence": "fsdp=2,sequence=2,tensor=2",
}
# An eps so large that the update of a weight whose gradient is rounding error is small, as it should be.
RECIPE = Recipe(peak_lr=1e-2, total_steps=8, warmup_steps=2, eps=1e-2, clip_norm=0.5)
LEVERS = StepOptions(micro_batches=2, remat="full", query_block=8, loss_chunks=2)
B, T, SEED = 16, 16, 5
RECORDS = np.random.default_rng(0).integers(3, CONFIG.vocab_size, (B, T + 1)).astype(np.int32)
BATCH = {"input_ids": RECORDS[:, :-1], "labels": RECORDS[:, 1:]}
DROPOUT = dict(dropout=0.1, attention_dropout=0.2, layerdrop=0.2)

_ours = jax.jit(loss_and_gradients, static_argnums=3)
_plain = jax.jit(jax.value_and_grad(next_token_loss))


def made(rules: str | None, config: OPTConfig = CONFIG, stacked: bool = True):
    spread = {} if rules is None else {"mesh": make_mesh(SPREADS[rules], jax.devices()[:8]), "rules": rules}
    return init_params(config, jax.random.key(0), stacked=stacked, **spread)


def plain(params, micro_batches: int, step: int = 0):
    """Loss and gradients by `jax.grad` of the model as it is, one micro-batch after the other; and their key."""
    drops = params.config.dropout > 0
    key = jax.random.fold_in(jax.random.key(SEED), step) if drops else None
    parts = [{name: array[m::micro_batches] for name, array in BATCH.items()} for m in range(micro_batches)]
    each = [_plain(params, part, jax.random.fold_in(key, m) if drops else None) for m, part in enumerate(parts)]
    loss, gradients = jax.tree.map(lambda *parts: sum(parts) / micro_batches, *each)
    return loss, gradients, key


def close(ours, theirs, tolerance=1e-5):
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(theirs))
    for (path, one), other in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert one.shape == other.shape and one.dtype == other.dtype
        # A gradient that is zero but for rounding (that of k_proj's bias) is measured by the others.
        scale = max(np.abs(other).max(), 1e-2 * largest)
        assert np.abs(one - other).max() <= tolerance * scale, jax.tree_util.keystr(path)


@pytest.mark.parametrize("rules", RULES)
def test_a_step_over_devices(rules):
    """Loss, gradients and two updates by optax's AdamW on one device; and every array of the state in its place."""
    config = CONFIG.replace(**DROPOUT) if rules == "fsdp+tensor+sequence" else CONFIG
    params = made(None, config)
    adamw = optax.chain(
        optax.clip_by_global_norm(RECIPE.clip_norm),
        optax.adamw(
            partial(learning_rate, RECIPE),
            RECIPE.beta1,
            RECIPE.beta2,
            RECIPE.eps,
            weight_decay=RECIPE.weight_decay,
            mask=decayed(config, stacked=True),
        ),
    )
    theirs, state = adamw.init(params), init_state(made(rules, config))
    wanted = abstract_state(config, stacked=True, mesh=state.params.placement.mesh, rules=rules)
    for step in range(2):
        assert jax.tree.structure(state) == jax.tree.structure(wanted)
        for leaf, want in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
            assert (leaf.shape, leaf.dtype) == (want.shape, want.dtype)
            assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)
        loss, gradients, _ = plain(params, 2, step)
        norm = optax.tree.norm(gradients)
        updates, theirs = adamw.update(gradients, theirs, params)
        params = optax.apply_updates(params, updates)
        state, metrics = train_step(state, place_batch(BATCH, state.params, B), RECIPE, SEED, LEVERS)
        np.testing.assert_allclose(float(metrics["loss"]), float(loss), rtol=1e-5)
        np.testing.assert_allclose(float(metrics["grad_norm"]), float(norm), rtol=1e-5)
        if step == 0:
            scale = np.float32((1 - RECIPE.beta1) * min(1.0, RECIPE.clip_norm / float(norm)))
            close(state.moments.first, jax.tree.map(partial(jnp.multiply, scale), gradients))
    close(state.params, params)
    assert int(state.step) == 2
    for moment in (state.moments.first, state.moments.second):
        for leaf, weight in zip(jax.tree.leaves(moment), jax.tree.leaves(state.params), strict=True):
            shards = weight.nbytes // weight.addressable_shards[0].data.nbytes
            assert {shard.data.nbytes * shards for shard in leaf.addressable_shards} == {leaf.nbytes}
    fc1 = state.moments.second["layers"]["fc1"]["weight"]
    assert (fc1.addressable_shards[0].data.nbytes < fc1.nbytes) == (rules != "data")


def test_the_same_curve_on_every_mesh():
    """Forty steps with dropout on one device, eight fully sharded, and four times two that share out each layer."""
    curves = {}
    for mesh, rules in ((None, None), ("fsdp=8", "fsdp"), ("fsdp=4,tensor=2", "fsdp+tensor")):
        spread = {} if mesh is None else {"mesh": make_mesh(mesh, jax.devices()[:8]), "rules": rules}
        state = init_state(init_params(CONFIG.replace(**DROPOUT), jax.random.key(1), stacked=True, **spread))
        recipe, options = Recipe(peak_lr=3e-3, total_steps=40, warmup_steps=4), StepOptions(micro_batches=2)
        losses = []
        for step in range(40):
            batch = {name: np.roll(array, step, axis=0) for name, array in BATCH.items()}
            state, metrics = train_step(state, place_batch(batch, state.params, B), recipe, SEED, options)
            losses.append(metrics["loss"])
        curves[mesh] = np.array(jax.device_get(losses))
    assert curves[None][-1] < 0.9 * curves[None][0]
    for mesh in ("fsdp=8", "fsdp=4,tensor=2"):
        np.testing.assert_allclose(curves[mesh], curves[None], rtol=1e-5, err_msg=mesh)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gradients_of_architectures_over_devices(name):
    config = CONFIG.replace(**ARCHITECTURES[name])
    expected, gradients, _ = plain(made(None, config), 2)
    found, ours = _ours(made("fsdp+tensor+sequence", config), BATCH, None, LEVERS)
    assert abs(float(found) - float(expected)) <= 1e-5 * float(expected)
    close(ours, gradients)


@pytest.mark.parametrize(
    "levers, stacked",
    [
        (StepOptions(), True),
        (StepOptions(micro_batches=4, remat="dots", query_block=4), True),
        (StepOptions(micro_batches=2, remat="none", query_block=8, loss_chunks=16), True),
        (StepOptions(micro_batches=2, remat="full", query_block=8, loss_chunks=8), False),
    ],
    ids=lambda value: value.remat if isinstance(value, StepOptions) else "stacked" if value else "list",
)
def test_levers_change_no_number(levers, stacked):
    """Not even which activations are dropped."""
    params = made(None, CONFIG.replace(**DROPOUT), stacked)
    expected, gradients, key = plain(params, levers.micro_batches)
    found, ours = _ours(params, BATCH, key, levers)
    assert abs(float(found) - float(expected)) <= 1e-5 * float(expected)
    close(ours, gradients)


def test_layers_in_a_list_over_devices():
    expected, gradients, _ = plain(made(None, stacked=False), 2)
    found, ours = _ours(made("fsdp+tensor+sequence", stacked=False), BATCH, None, LEVERS)
    assert abs(float(found) - float(expected)) <= 1e-5 * float(expected)
    close(ours, gradients)


def test_labels_that_are_ignored_do_not_count():
    """However unevenly they lie in the micro-batches: records of even rows end early."""
    params, labels = made(None), BATCH["labels"].copy()
    labels[::2, 8:] = -100
    found, _ = _ours(params, BATCH | {"labels": labels}, None, LEVERS)
    logits = np.asarray(optjax.causal_lm(params, BATCH["input_ids"]).logits)
    nll = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), BATCH["labels"][..., None], -1)[..., 0]
    assert float(found) == pytest.approx(nll[labels >= 0].mean(), rel=1e-5)


def test_a_checkpoint_moves_to_another_mesh_bit_for_bit(tmp_path):
    params = made("fsdp+tensor")
    moments = Moments(*(jax.tree.map(lambda w, n=n: w * n + 1, params) for n in (2, 3)))
    state = dataclasses.replace(init_state(params), moments=moments, step=jnp.int32(7))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state)
        for rules in ("fsdp+tensor+sequence", "data", None):
            spread = {} if rules is None else {"mesh": make_mesh(SPREADS[rules], jax.devices()[:8]), "rules": rules}
            target = abstract_state(CONFIG, stacked=True, **spread)
            restored = checkpoints.restore(target)
            assert jax.tree.structure(restored) == jax.tree.structure(target)
            for leaf, want, before in zip(*map(jax.tree.leaves, (restored, target, state)), strict=True):
                np.testing.assert_array_equal(leaf, before)
                assert leaf.sharding.is_equivalent_to(want.sharding, leaf.ndim)


def test_no_logits_of_all_tokens():
    """In the compiled program there is no array of B·T·V numbers, nor one of a micro-batch's B·H·T·T scores."""
    config = CONFIG.replace(vocab_size=67)  # a number that nothing else is a multiple of
    rows = B // LEVERS.micro_batches
    text = train_step.lower(init_state(made(None, config)), BATCH, RECIPE, 0, LEVERS).compile().as_text()
    shapes = [[int(n) for n in dims.split(",")] for dims in re.findall(r"f32\[([\d,]+)\]", text)]
    logits = {int(np.prod(shape)) // 67 for shape in shapes if any(n % 67 == 0 for n in shape)}
    assert rows * T // LEVERS.loss_chunks in logits, "no chunk of logits was found"
    assert max(logits) < rows * T
    assert not any(shape[-2:] == [T, T] for shape in shapes)


def test_a_state_on_one_device_is_one_program():
    state = init_state(made(None))
    programs = train_step._cache_size()
    for _ in range(3):
        state, _ = train_step(state, BATCH, RECIPE)
    assert train_step._cache_size() == programs + 1


@pytest.mark.parametrize("rules", ["fsdp+tensor", None])
def test_the_hosts_memory_changes_no_number(rules):
    found = {}
    for options in (LEVERS, dataclasses.replace(LEVERS, moments_memory="host", remat="offload")):
        state = init_state(made(rules), options)
        for _ in range(2):
            state, metrics = train_step(state, place_batch(BATCH, state.params, B), RECIPE, 0, options)
            kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.moments)}
            assert kinds == {"device" if options is LEVERS else "pinned_host"}
            assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.params)} == {"device"}
        found[options.moments_memory] = state.params, metrics
    close(*(jax.tree.leaves(each) for each in found.values()), tolerance=1e-6)


def test_evaluation_over_devices():
    """The mean over all labels, however many of them each batch has."""
    first, second = ({name: array[part].copy() for name, array in BATCH.items()} for part in (slice(8), slice(8, 16)))
    second["labels"][:, 3:] = -100
    counts = [np.sum(each["labels"] >= 0) for each in (first, second)]
    losses = [float(_plain(made(None), each, None)[0]) for each in (first, second)]
    spread = evaluate(made("fsdp+tensor+sequence"), iter((first, second)), LEVERS, bytes_per_token=2.0)
    assert spread["loss"] == pytest.approx(np.average(losses, weights=counts), 1e-5)
    assert spread["perplexity"] == pytest.approx(np.exp(spread["loss"]))
    assert spread["bits_per_byte"] == pytest.approx(spread["loss"] / np.log(2) / 2)


def test_bfloat16_is_near():
    """Computed in bfloat16 over float32 weights, the loss is that of float32 to three digits, and it falls."""
    losses = {}
    for dtype in ("float32", "bfloat16"):
        options = StepOptions(dtype=dtype, micro_batches=2, remat="full", moments_dtype=dtype)
        state = init_state(made("fsdp+tensor+sequence"), options)
        assert state.moments.second["layers"]["fc1"]["weight"].dtype == dtype
        losses[dtype] = []
        for _ in range(8):
            state, metrics = train_step(state, BATCH, RECIPE, 0, options)
            losses[dtype].append(float(metrics["loss"]))
        assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=1e-2)
    assert losses["bfloat16"][-1] < losses["bfloat16"][0] - 0.1


def test_bfloat16_of_few_tokens():
    """On one CPU: project_out ends in a transpose there, which XLA took into the head's product, and failed."""
    batch = {name: array[:2, :5] for name, array in BATCH.items()}
    params = made(None, CONFIG.replace(**ARCHITECTURES["post-norm, projections"]))
    losses = [
        train_step(init_state(jax.tree.map(jnp.copy, params)), batch, RECIPE, 0, StepOptions(dtype=dtype))[1]["loss"]
        for dtype in ("float32", "bfloat16")
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-2)


def test_rounding_is_right_on_average():
    x = jnp.float32(1.0 + 2**-9)  # a quarter of the way from 1 to the next bfloat16
    noise = jax.random.bits(jax.random.key(0), (40000,), jnp.uint32) & 0xFFFF
    for sign in (1, -1):
        many = round_at_random(jnp.full(40000, sign * x), noise)
        many = np.asarray(many, np.float32) * sign
        assert set(many) == {1.0, 1.0078125}
        assert abs(np.mean(many > 1) - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 40000)
    exact = jnp.array([0.0, 1.5, -3e-20, 1e20], jnp.bfloat16)
    np.testing.assert_array_equal(round_at_random(exact.astype(jnp.float32), jnp.full(4, 0xFFFF, jnp.uint32)), exact)


@pytest.mark.parametrize(
    "rows, length, changes, message",
    [
        (6, 16, {}, "a batch of 6 records .* 2 micro-batches over 2 groups .* multiple of 4"),
        (16, 15, {}, "records of 15 tokens do not divide over"),
        (16, 16, {"query_block": 5}, "query_block 5 does not divide records of 16"),
        (16, 16, {"loss_chunks": 3}, "loss_chunks 3 does not divide the 8 tokens"),
        (16, 22, {}, "records of 22 tokens, but max_position_embeddings 20"),
    ],
)
def test_what_does_not_divide_is_said(rows, length, changes, message):
    options = StepOptions(**({"micro_batches": 2} | changes))
    mesh = make_mesh(SPREADS["fsdp+tensor+sequence"], jax.devices()[:8])
    state = abstract_state(CONFIG, options, stacked=True, mesh=mesh)
    with pytest.raises(ValueError, match=message):
        array = jax.ShapeDtypeStruct((rows, length), jnp.int32)
        train_step.lower(state, {"input_ids": array, "labels": array}, RECIPE, 0, options)


@pytest.mark.parametrize(
    "wrong", [{"dtype": "float64"}, {"remat": "half"}, {"micro_batches": 0}, {"moments_memory": "disk"}]
)
def test_options_refuse_nonsense(wrong):
    with pytest.raises(ValueError, match="should be"):
        StepOptions(**wrong)
