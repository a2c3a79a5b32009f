"""Codes, scales and products of quantized weights, against numpy, torch and the formulas of the papers."""

from __future__ import annotations

import re
import sys
from functools import partial
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compilations import AS_USERS_DO
from hf_models import random_config
from jax.sharding import PartitionSpec

import optjax
from optjax import Quantization, QuantizedWeight
from optjax.quantization import int8_on_cpu
from optjax.quantization.codes import NF4
from optjax.quantization.int8_on_cpu import int8_product
from optjax.quantization.product import product
from optjax.quantization.weight import encode
from optjax.sharding import make_mesh
from optjax.train.state import init_state

KINDS = ("int8", "int4", "nf4")


def random_matrix(rng, n_out: int, n_in: int) -> np.ndarray:
    """Rows of different sizes, a few outliers, and a row of zeros."""
    w = rng.standard_normal((n_out, n_in)) * rng.exponential(size=(n_out, 1)) * 0.1
    w[rng.integers(n_out), rng.integers(n_in)] *= 20
    w[rng.integers(n_out)] = 0
    return w.astype(np.float32)


def test_levels_of_nf4():
    """QLoRA's appendix: quantiles at even distances, 8 below and 9 above 0 with 0 shared, scaled to reach ±1."""
    offset = 0.9677083  # (1 - 1/32 + 1 - 1/30) / 2
    quantile = np.vectorize(NormalDist().inv_cdf)
    above, below = quantile(np.linspace(offset, 0.5, 9)[:-1]), -quantile(np.linspace(offset, 0.5, 8)[:-1])
    levels = np.sort([*above, *below, 0.0])
    np.testing.assert_allclose(NF4, levels / levels.max(), atol=1e-6)


def test_int8_is_torchs():
    w = random_matrix(np.random.default_rng(0), 37, 53)
    made = encode(w, "int8", 0, jnp.float32, native=False)
    scales = np.abs(w).max(1) / 127
    np.testing.assert_allclose(made.scales, scales, rtol=1e-6)
    steps, zeros = torch.from_numpy(np.where(scales > 0, scales, 1)), torch.zeros(37, dtype=torch.int32)
    theirs = torch.fake_quantize_per_channel_affine(torch.from_numpy(w), steps, zeros, 0, -127, 127).numpy()
    # The same but for ties, which rounding may send either way.
    difference = np.abs(np.asarray(made.dequantize()) - theirs)
    assert (difference <= 1.01 * scales[:, None]).all() and (difference > 1e-5 * scales.max()).mean() < 1e-3


def test_a_table_has_scales_of_columns():
    """Columns that are large in all rows do not take the others' codes from them: all are about as exact."""
    rng = np.random.default_rng(2)
    w = rng.standard_normal((300, 64)).astype(np.float32)
    w[:, 5] *= 60
    w[:, 9] = 0
    ours, rows = (encode(w, "int8", 0, jnp.float32, native=False, table=table) for table in (True, False))
    others = np.delete(np.arange(64), [5, 9])

    def error(made):
        return np.sqrt(np.mean((np.asarray(made.dequantize()) - w)[:, others] ** 2))

    assert error(ours) < 0.2 * error(rows)
    assert np.abs(np.asarray(ours.dequantize()) - w)[:, 5].max() < 0.01 * np.abs(w[:, 5]).max()
    assert (np.asarray(ours.dequantize())[:, 9] == 0).all() and (np.asarray(ours.column_scales) > 0).all()
    index = jnp.array([[7, 0], [299, 7]])
    np.testing.assert_allclose(ours.rows(index), ours.dequantize()[index], rtol=1e-6)
    for x in (rng.standard_normal((1, 64)), rng.standard_normal((3, 64))):
        x = jnp.asarray(x, jnp.float32)
        rows = np.asarray(ours.values, np.float64) * np.asarray(ours.scales)[:, None]
        for on, digits in (("cpu", of_digits(x * ours.column_scales, rows).max()), ("tpu", 0)):
            wanted = x @ ours.dequantize().T
            np.testing.assert_allclose(product(x, ours, on=on), wanted, rtol=1e-4, atol=1e-3 + digits)


@pytest.mark.parametrize(("kind", "native"), [("int4", False), ("int4", True), ("nf4", False)])
def test_four_bits_are_the_nearest(kind, native):
    """Every number goes to the nearest of its group's 16 levels, and the scale is as large as it must be."""
    rng, size = np.random.default_rng(1), 6
    w = random_matrix(rng, 11, 20)  # the last group holds 2
    made = encode(w, kind, size, jnp.float32, native=native)
    assert made.shape == w.shape and made.scales.shape == (4, 11)
    found = np.asarray(made.dequantize())
    levels = np.asarray(NF4) if kind == "nf4" else np.arange(-8, 8)
    for o in range(11):
        for i in range(20):
            group = w[o, i // size * size : (i // size + 1) * size]
            largest = group[np.abs(group).argmax()]
            scale = np.abs(largest) if kind == "nf4" else largest / -8
            scale = np.asarray(made.scales, np.float32)[i // size, o] if abs(scale) > 0 else 0.0
            assert abs(scale) == pytest.approx(abs(largest) / (1 if kind == "nf4" else 8), rel=2**-8)
            allowed = levels * scale
            assert np.abs(allowed - w[o, i]).min() == pytest.approx(np.abs(found[o, i] - w[o, i]), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_how_exact(kind):
    """The error of normal numbers is near what theory says: half a step, uniform; nf4 beats int4's."""
    w = jax.random.normal(jax.random.key(0), (64, 512))
    error = float(jnp.sqrt(jnp.mean((encode(w, kind, 64, w.dtype, native=False).dequantize() - w) ** 2)))
    assert error < {"int8": 0.0085, "int4": 0.105, "nf4": 0.095}[kind]


@pytest.mark.parametrize("on", ["cpu", "tpu", "gpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_products(kind, on):
    """Every backend's form is x Wᵀ, for few and many rows and odd sizes, and so is its gradient."""
    rng = np.random.default_rng(2)
    for rows, n_out, n_in, size in [(1, 37, 53, 16), (5, 300, 70, 8), (40, 41, 128, 32)]:
        w = encode(random_matrix(rng, n_out, n_in), kind, size, jnp.float32, native=on == "tpu")
        x = jnp.asarray(rng.standard_normal((rows, 1, n_in)), jnp.float32)

        @jax.jit
        def both(x, w, on=on, spread=rows == 5):
            out, back = jax.vjp(lambda x: product(x, w, on=on, spread=spread), x)
            return out, back(out)[0]

        whole = np.asarray(w.dequantize(), np.float64)
        wanted = np.asarray(x, np.float64) @ whole.T
        found, gradient = both(x, w)
        digits = kind == "int8" and on == "cpu" and rows != 5
        atol = 2e-6 * np.abs(wanted).max() + (of_digits(x, whole).max() if digits else 0)
        np.testing.assert_allclose(found, wanted, atol=atol)
        back = np.asarray(found, np.float64) @ whole
        np.testing.assert_allclose(gradient, back, atol=2e-6 * np.abs(back).max())


@pytest.mark.parametrize("rows", [1, 4, 40])
@pytest.mark.parametrize("kind", ["int4", "nf4"])
def test_a_gpu_loops_over_no_blocks(kind, rows):
    """Each step of a loop would be kernels of its own, for a block that a CPU's cache holds. On a CPU there is one."""
    w = jax.eval_shape(lambda w: encode(w, kind, 64, jnp.bfloat16, native=False), jnp.zeros((2048, 2048)))
    x = jax.ShapeDtypeStruct((rows, 2048), jnp.bfloat16)
    loops = {on: str(jax.make_jaxpr(partial(product, on=on))(x, w)) for on in ("gpu", "cpu")}
    assert not re.search(r"\b(while|scan)\[", loops["gpu"]) and re.search(r"\b(while|scan)\[", loops["cpu"])


def of_digits(x, whole) -> np.ndarray:
    """The largest error of products ``[…, out]`` with x in two digits: half a step of the second, for each input."""
    x = np.asarray(x, np.float64)
    return np.abs(x).max(-1, keepdims=True) / (2 * 127 * 254) * np.abs(whole).sum(-1)


def test_digits():
    """Integers on a CPU: rows of any size and sign, of zeros, and of what is not finite, each by itself."""
    rng = np.random.default_rng(4)
    values = rng.integers(-127, 128, (29, 75)).astype(np.int8)
    x = rng.standard_normal((40, 75)).astype(np.float32)
    x *= 10.0 ** rng.integers(-20, 20, (40, 1))
    x[2], x[4] = 1e-36, -3e-36  # a 254th of them is no normal number
    x[3], x[5, 7], x[6, 8] = 0, np.nan, np.inf
    for rows in (slice(0, 1), slice(2, 7), slice(None)):
        found, finite = np.asarray(jax.jit(int8_product)(x[rows], values)), np.isfinite(x[rows]).all(-1)
        assert not np.isfinite(found[~finite]).any()
        found, some = found[finite], x[rows][finite].astype(np.float64)
        error, bound = np.abs(found - some @ values.T.astype(np.float64)), of_digits(some, values)
        assert (error <= 1.01 * bound).all()
    with jax.debug_nans(True):
        assert (int8_product(jnp.zeros((2, 75)), values) == 0).all()


def test_wider_inputs_are_not_made_digits():
    rng = np.random.default_rng(5)
    values = rng.integers(-127, 128, (29, 75)).astype(np.int8)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.standard_normal((3, 75)))
        found = int8_product(x, values)
        assert found.dtype == jnp.float64
        np.testing.assert_allclose(found, np.asarray(x) @ values.T.astype(np.float64), rtol=1e-12, atol=1e-10)


@pytest.mark.skipif(sys.platform != "linux", reason="jaxlib is known to have kernels for int8 on Linux")
def test_digits_are_multiplied_by_a_kernel():
    """The codes are read as they are, for one row too, and not written in a wider type first."""
    x, values = jax.ShapeDtypeStruct((1, 512), jnp.float32), jax.ShapeDtypeStruct((384, 512), jnp.int8)
    text = jax.jit(int8_product).lower(x, values).compile().as_text()
    assert "ynn_fusion" in text and "f32[384,512]" not in text and "s32[384,512]" not in text


def test_without_kernels(monkeypatch):
    """Where XLA has none for integers, products are those of float32."""
    monkeypatch.setattr("optjax.quantization.int8_on_cpu._multiplies_integers", lambda: False)
    rng = np.random.default_rng(6)
    w = encode(random_matrix(rng, 33, 40), "int8", 0, jnp.float32, native=False)
    for rows in (1, 3):
        x = jnp.asarray(rng.standard_normal((rows, 40)), jnp.float32)
        wanted = np.asarray(x, np.float64) @ np.asarray(w.dequantize(), np.float64).T
        np.testing.assert_allclose(product(x, w, on="cpu"), wanted, atol=2e-6 * np.abs(wanted).max())


def test_blocks_of_the_cpu(monkeypatch):
    """Many blocks, the last one overlapping, give what one gives."""
    monkeypatch.setattr("optjax.quantization.int8_on_cpu._multiplies_integers", lambda: False)
    rng = np.random.default_rng(3)
    for kind in KINDS:
        w = encode(random_matrix(rng, 45, 96), kind, 8, jnp.float32, native=False)
        x = jnp.asarray(rng.standard_normal((3, 96)), jnp.float32)
        whole = product(x, w, on="cpu")
        with monkeypatch.context() as small:
            for module in ("product", "int8_on_cpu"):
                small.setattr(f"optjax.quantization.{module}.BLOCK", 800)
            found = product(x, w, on="cpu")
        np.testing.assert_allclose(found, whole, atol=1e-5)
        np.testing.assert_allclose(found, np.asarray(x) @ np.asarray(w.dequantize()).T, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_inside_shard_map(kind):
    """Where jax checks what varies over devices, product and gradient are those of all rows at once."""
    rng = np.random.default_rng(8)
    w = encode(random_matrix(rng, 45, 96), kind, 8, jnp.float32, native=False)
    x = jnp.asarray(rng.standard_normal((8, 96)), jnp.float32)
    mesh, rows = make_mesh("data=4", jax.devices()[:4]), PartitionSpec("data")

    def each(x, w):
        y, back = jax.vjp(lambda x: product(x, w, on="cpu"), x)
        return y, back(y)[0]

    inside = jax.jit(jax.shard_map(each, mesh=mesh, in_specs=(rows, PartitionSpec()), out_specs=rows))(x, w)
    for found, wanted in zip(inside, each(x, w), strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5 * np.abs(wanted).max())


def quantized_and_plain(seed: int, head: str | None = "causal_lm", stacked: bool = False):
    """Params quantized, the same dequantized again, and some ids with padding."""
    rng = np.random.default_rng(seed)
    config = random_config(rng).replace(activation_function="gelu", dropout=0.0, num_hidden_layers=1)
    params = optjax.init_params(config.replace(init_std=0.3), jax.random.key(seed), head=head, stacked=stacked)
    made = optjax.quantize(params, Quantization(KINDS[seed % 3], 4))
    ids = rng.integers(0, config.vocab_size, size=(3, 6))
    mask = np.ones((3, 6), int)
    mask[1, :2] = mask[2, 4:] = 0
    return made, optjax.dequantize(made), ids, mask


@pytest.mark.parametrize("digits", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_language_model(seed, digits, request, monkeypatch):
    """A quantized model is the model of its dequantized weights: logits, loss, ids, and gradients of its inputs."""
    if not digits:
        request.getfixturevalue("no_digits")
    traced = []

    def noted(x, values):
        traced.append(x.shape)
        return in_integers(x, values)

    in_integers = int8_on_cpu._in_integers
    monkeypatch.setattr(int8_on_cpu, "_in_integers", noted)
    quantized, plain, ids, mask = quantized_and_plain(seed, stacked=seed % 2 == 0)

    def loss(embeds, params):
        out = optjax.causal_lm(params, inputs_embeds=embeds, attention_mask=mask, labels=ids)
        return out.loss, out.logits

    embeds = np.asarray(plain["embed_tokens"]["weight"])[ids]
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    found, wanted = (jax.tree.leaves(step(embeds, params)) for params in (quantized, plain))
    assert bool(traced) == (digits and int8_on_cpu._multiplies_integers())  # tables are int8 in every kind
    # Two digits are exact to 2**-15 of the largest input of each product.
    exact = 2**-13 if digits and quantized.quantization.kind == "int8" else 3e-5
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=exact * max(1.0, float(jnp.abs(theirs).max())))
    ids, mask = ids[: 1 + seed % 3], mask[: 1 + seed % 3]
    made = [optjax.generate(params, ids, mask, max_new_tokens=3, eos_token_id=[]) for params in (quantized, plain)]
    np.testing.assert_array_equal(*made)


@pytest.mark.parametrize("head", ["sequence_classification", None])
def test_other_heads(head):
    quantized, plain, ids, mask = quantized_and_plain(7, head)
    functions = {
        "sequence_classification": lambda p: optjax.sequence_classification(p, ids, attention_mask=mask).logits,
        None: lambda p: optjax.forward(p, ids, attention_mask=mask).last_hidden_state,
    }
    np.testing.assert_allclose(functions[head](quantized), functions[head](plain), atol=1e-4)


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "int8"), ("float16", "nf4")])
def test_other_dtypes(dtype, kind):
    """They compute in the dtype that the weights stand for."""
    config = random_config(np.random.default_rng(5)).replace(vocab_size=50, max_position_embeddings=16)
    made = optjax.quantize(optjax.init_params(config, jax.random.key(5), dtype), kind)
    assert made.dtype == jnp.dtype(dtype) and optjax.init_cache(made, 1, 4).keys[0].dtype == jnp.dtype(dtype)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(optjax.dequantize(made))} == {dtype}
    ids = np.arange(6)[None]
    out = optjax.causal_lm(made, ids, output_hidden_states=True)
    assert out.hidden_states[-1].dtype == jnp.dtype(dtype)
    wanted = optjax.causal_lm(optjax.dequantize(made, "float32"), ids).logits
    np.testing.assert_allclose(out.logits, wanted, atol=0.05 * float(jnp.abs(wanted).max()))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_the_tree(kind):
    """Stacking, mapping and abstract params know nothing of it and need not."""
    config = random_config(np.random.default_rng(9)).replace(num_hidden_layers=2, tie_word_embeddings=False)
    params = optjax.init_params(config, jax.random.key(0), "bfloat16")
    made = optjax.quantize(params, kind)
    assert made.quantization == Quantization(kind) and params.quantization is None
    stacked = optjax.stack_layers(made)
    again = optjax.quantize(optjax.stack_layers(params), kind)
    abstract = optjax.quantize(optjax.abstract_params(config, "bfloat16", stacked=True), kind)
    assert jax.tree.structure(stacked) == jax.tree.structure(again) == jax.tree.structure(abstract)
    for a, b, c in zip(*map(jax.tree.leaves, (stacked, again, abstract)), strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
        assert (a.shape, a.dtype) == (c.shape, c.dtype)
    assert jax.tree.structure(optjax.unstack_layers(stacked)) == jax.tree.structure(made)
    fc1 = stacked["layers"]["fc1"]["weight"]
    assert fc1.shape == (2, config.ffn_dim, config.hidden_size) and fc1.ndim == 3
    for weight, layer in ((made["layers"][0]["fc2"]["weight"], kind), (made["lm_head"]["weight"], "int8")):
        assert isinstance(weight, QuantizedWeight) and weight.kind == layer
    for name in ("embed_positions",):
        assert not isinstance(made[name]["weight"], QuantizedWeight)


def test_bytes():
    """What they take: 8 bits and a scale for each output; 4.25 bits; on a TPU the same."""
    w = jnp.ones((256, 1024))
    for kind, native, wanted in [("int8", False, 8), ("int4", False, 4.25), ("nf4", False, 4.25), ("int4", True, 4.25)]:
        made = encode(w, kind, 64, jnp.bfloat16, native=native)
        assert made.nbytes * 8 / w.size == pytest.approx(wanted, rel=0.01)


def test_no_copy_in_full_precision():
    """A step on the CPU has temporaries of a block, not of a matrix."""
    config = optjax.OPTConfig(
        vocab_size=4000, hidden_size=1024, num_hidden_layers=1, num_attention_heads=8, ffn_dim=4096
    )
    for kind in ("int8", "int4"):
        params = optjax.quantize(optjax.abstract_params(config), kind)
        for rows in (1, 4):
            ids = jax.ShapeDtypeStruct((rows,), jnp.int32)
            cache = jax.eval_shape(partial(optjax.init_cache, config, rows, 32))
            step = jax.jit(optjax.decode_step).lower(params, ids, cache).compile(compiler_options=AS_USERS_DO)
            # 4 MB are a block of a quarter, and what products of it take.
            assert step.memory_analysis().temp_size_in_bytes < 5e6


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: optjax.quantize(p, "int3"), "no quantization 'int3'; there are: int8, int4, nf4"),
        (lambda p: optjax.quantize(p, 8), "should be 'int8', 'int4', 'nf4' or a Quantization, not int"),
        (lambda p: optjax.quantize(p, None), "give a quantization"),
        (lambda p: optjax.quantize(p["layers"]), "params should be"),
        (lambda p: optjax.quantize(optjax.quantize(p)), "quantized already"),
        (lambda p: optjax.dequantize(p), "not quantized"),
        (lambda p: Quantization("int4", 7), "group_size should be an even number of at least 2, not 7"),
        (lambda p: init_state(optjax.quantize(p)), "quantized to int8, and codes do not train"),
        (lambda p: Quantization("int4", True), "group_size should be"),
    ],
)
def test_errors(call, message):
    config = optjax.OPTConfig(vocab_size=9, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, ffn_dim=4)
    with pytest.raises(ValueError, match=message):
        call(optjax.init_params(config, jax.random.key(0)))
