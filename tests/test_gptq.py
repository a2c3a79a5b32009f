"""Rounding by what comes in: against the authors' program, the paper's equations, and transformers' layers."""

from __future__ import annotations

import dataclasses
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from compilations import count_compilations
from gptq_cases import CASES, matrix_and_inputs
from hf_models import padded_masks, params_from, random_config, state_of, torch_model

import optjax
from optjax import Quantization
from optjax.quantization import calibrate
from optjax.quantization.codes import NF4, scales_of
from optjax.quantization.gptq import compensate
from optjax.quantization.weight import encode
from optjax.sharding import make_mesh

GOLDEN = Path(__file__).parent / "golden" / "gptq.npz"


def rounded(weight, gram, kind: str, group_size: int) -> np.ndarray:
    """A matrix after GPTQ, as its codes stand for it."""
    scales = scales_of(jnp.asarray(weight), kind, group_size)
    best = compensate(weight, jnp.asarray(gram), scales, kind=kind, group_size=group_size)
    return np.asarray(encode(best, kind, group_size, jnp.float32, native=False, scales=scales).dequantize())


def by_elimination(weight, gram, kind: str, group_size: int) -> np.ndarray:
    """The same by equations 2 and 3 of the paper, in float64: a column is rounded, and its row and column eliminated
    from the inverse."""
    weight, gram = np.asarray(weight, np.float64).copy(), np.asarray(gram, np.float64)
    scales = np.atleast_2d(np.asarray(scales_of(jnp.asarray(weight, jnp.float32), kind, group_size), np.float64))
    size = weight.shape[1] if kind == "int8" else group_size
    levels = {"int8": np.arange(-127, 128), "int4": np.arange(-8, 8), "nf4": np.asarray(NF4)}[kind]
    inverse = np.linalg.inv(gram + 0.01 * np.diag(gram).mean() * np.eye(len(gram)))
    for i in np.argsort(-np.diag(gram), kind="stable"):
        steps = scales[i // size]
        codes = weight[:, i] / np.where(steps == 0, 1, steps)
        nearest = levels[np.abs(codes[:, None] - levels).argmin(1)] * steps
        error = (weight[:, i] - nearest) / inverse[i, i]
        weight -= error[:, None] * inverse[i]
        weight[:, i] = nearest
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i], inverse[:, i] = 0, 0
        inverse[i, i] = 1  # it is done: nothing comes to it any more
    return weight


@pytest.mark.parametrize("seed", range(len(CASES)))
def test_authors_program(seed):
    case = CASES[seed]
    weight, inputs = matrix_and_inputs(seed, case)
    found = rounded(weight, inputs.T @ inputs, case.kind, case.group_size)
    with np.load(GOLDEN) as golden:
        np.testing.assert_allclose(found, golden[str(seed)], atol=1e-5)
    plain = np.asarray(encode(jnp.asarray(weight), case.kind, case.group_size, jnp.float32, native=False).dequantize())
    assert np.linalg.norm(inputs @ (found - weight).T) < 0.8 * np.linalg.norm(inputs @ (plain - weight).T)


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
@pytest.mark.parametrize(("n_out", "n_in", "group_size"), [(7, 33, 8), (2, 140, 64), (3, 5, 6), (1, 1, 2)])
def test_equations_of_the_paper(kind, n_out, n_in, group_size):
    rng = np.random.default_rng(n_in)
    inputs = rng.standard_normal((3 * n_in, n_in)) @ rng.standard_normal((n_in, n_in))
    weight = rng.standard_normal((n_out, n_in)).astype(np.float32)
    weight[0, : n_in // 2] = 0  # of groups that are all 0
    gram = (inputs.T @ inputs).astype(np.float32)
    found, wanted = (make(weight, gram, kind, group_size) for make in (rounded, by_elimination))
    # Where a number is halfway between two levels, what float32 rounds decides, and the rest of its row follows.
    same = np.isclose(found, wanted, atol=1e-5).mean(1)
    assert (same == 1).mean() >= 0.7, same


@pytest.mark.parametrize("kind", ["int8", "int4", "nf4"])
def test_inputs_that_say_nothing(kind):
    """Nothing came in, or what came does not depend on each other: every number goes to its nearest level."""
    weight = jax.random.normal(jax.random.key(0), (5, 30))
    plain = encode(weight, kind, 8, jnp.float32, native=False).dequantize()
    for gram in (np.zeros((30, 30)), np.diag(np.arange(30.0))):
        np.testing.assert_allclose(rounded(weight, gram.astype(np.float32), kind, 8), plain, atol=1e-6)


def test_a_gram_matrix_that_rounding_spoils():
    """Not positive definite even with the paper's damping: it is damped harder."""
    rng = np.random.default_rng(0)
    gram = np.ones((40, 40), np.float32) * 1e4
    gram[3, 5] = gram[5, 3] = 1.05e4
    assert np.linalg.eigvalsh(gram + 0.01 * 1e4 * np.eye(40)).min() < 0
    weight = rng.standard_normal((6, 40)).astype(np.float32)
    found = rounded(weight, gram, "int4", 8)
    assert np.isfinite(found).all() and np.abs(found - weight).max() < 2


def test_memory_of_a_matrix():
    """Beside the Gram matrix two of its size, and four of the matrix; a quarter of one more for what is small."""
    n_in, n_out = 512, 128
    shapes = ((n_out, n_in), (n_in, n_in), (n_in // 64, n_out))
    given = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    compiled = compensate.lower(*given, kind="int4", group_size=64).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * (2.3 * n_in**2 + 4 * n_in * n_out)


# Matrices of one input.
STAGES = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.out_proj",), ("fc1",), ("fc2",))


def torchs_matrices(model):
    """The matrices of transformers' model in the order of their pass, by stages: those of a stage have one input."""
    decoder = getattr(model, "model", model).decoder
    if decoder.project_in is not None:
        yield ("project_in",), [decoder.project_in]
    for i, layer in enumerate(decoder.layers):
        for stage in STAGES:
            yield tuple(f"{i}.{name}" for name in stage), [layer.get_submodule(name) for name in stage]
    if decoder.project_out is not None:
        yield ("project_out",), [decoder.project_out]


@pytest.mark.parametrize(("seed", "kind"), [(0, "int4"), (1, "nf4"), (2, "int4"), (3, "int8"), (4, "nf4")])
def test_what_comes_in(seed, kind, no_digits):
    """Each matrix is rounded for what comes to it in transformers' model of the matrices before it, as rounded."""
    rng = np.random.default_rng(seed)
    config = random_config(rng)
    model = torch_model(config, "causal_lm", seed)
    params = params_from(state_of(model), config, "causal_lm")
    ids = rng.integers(0, config.vocab_size, (5, config.max_position_embeddings))
    mask = padded_masks(rng, *ids.shape).astype(bool)
    quantization = Quantization(kind, 4)
    made = optjax.gptq(params, ids, quantization, attention_mask=mask, batch_size=int(rng.integers(1, 7)))
    assert made.quantization == (quantization if kind != "int8" else Quantization("int8"))

    def ours(name):
        *layer, path = name.split(".", 1) if name[0].isdigit() else [name]
        node = made["layers"][int(layer[0])] if layer else made
        for step in path.split("."):
            node = node[step]
        return np.array(node["weight"].dequantize())

    tables = {"embed_tokens": model.model.decoder.embed_tokens, "lm_head": model.lm_head}
    with torch.no_grad():
        for name, module in tables.items():
            if name in made.weights:
                module.weight.copy_(torch.from_numpy(np.array(made[name]["weight"].dequantize())))
    seen, agree = [], []
    for names, modules in torchs_matrices(model):
        hook = modules[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].numpy()))
        with torch.no_grad():
            model(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask.astype(np.int64)))
        hook.remove()
        inputs = seen.pop().reshape(*ids.shape, -1)[mask].astype(np.float64)
        for name, module in zip(names, modules, strict=True):
            wanted = by_elimination(module.weight.detach().numpy(), inputs.T @ inputs, kind, 4)
            found = ours(name)
            agree.append(np.isclose(found, wanted, atol=1e-5).all(1).mean())
            # What follows goes by ours, that a number halfway between two levels may not make all else differ.
            with torch.no_grad():
                module.weight.copy_(torch.from_numpy(found))
    assert np.mean(agree) > 0.97, agree


def error(params, made, ids) -> float:
    """Of the logits: the root of the mean square, as a share of their deviation."""
    theirs, ours = (optjax.causal_lm(each, ids).logits for each in (params, made))
    return float(jnp.sqrt(jnp.square(ours - theirs).mean() / theirs.var(-1).mean()))


def test_what_it_is_for():
    """On text that it did not go by, the error of 4 bits is little more than half of what it would be."""
    params = optjax.load_params("opt-mini", "float32")
    first = np.full((20, 1), params.config.bos_token_id)
    ids = np.asarray(optjax.generate(params, first, do_sample=True, key=jax.random.key(0), max_new_tokens=127))
    plain = error(params, optjax.quantize(params, "int4"), ids[16:])
    found = error(params, optjax.gptq(params, ids[:16], "int4"), ids[16:])
    assert found < 0.65 * plain, (found, plain)


CONFIG = optjax.OPTConfig(
    vocab_size=64, hidden_size=16, num_hidden_layers=2, ffn_dim=32, num_attention_heads=4, max_position_embeddings=32,
    word_embed_proj_dim=8, init_std=0.3,
)  # fmt: skip


def codes_agree(a, b) -> float:
    """The share of equal numbers in the leaves of two trees of the same structure."""
    a, b = (jax.tree.leaves(each) for each in (a, b))
    same = [
        np.isclose(np.asarray(x, np.float32), np.asarray(y, np.float32), rtol=1e-5) for x, y in zip(a, b, strict=True)
    ]
    return float(np.concatenate([each.ravel() for each in same]).mean())


def test_padding_batches_and_layouts(no_digits):
    """Padding does not count, wherever it is; nor do the number of rows at a time, nor stacked layers."""
    params = optjax.init_params(CONFIG, jax.random.key(0))
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 64, (7, 12))
    wanted = optjax.gptq(params, ids, Quantization("int4", 8), batch_size=7)
    wide, mask = np.pad(ids, ((0, 2), (4, 3)), constant_values=5), np.pad(np.ones_like(ids), ((0, 2), (4, 3)))
    for made in (
        optjax.gptq(params, wide, Quantization("int4", 8), attention_mask=mask, batch_size=4),
        optjax.gptq(params, ids[::-1], Quantization("int4", 8), batch_size=100),
        optjax.unstack_layers(optjax.gptq(optjax.stack_layers(params), ids, Quantization("int4", 8), batch_size=2)),
    ):
        assert jax.tree.structure(made) == jax.tree.structure(wanted)
        assert codes_agree(made, wanted) > 0.99
    unlike = optjax.gptq(params, wide, Quantization("int4", 8))
    assert codes_agree(unlike, wanted) < 0.95


def test_compiled_once():
    """Another model of the same config compiles nothing."""
    first, second = (optjax.init_params(CONFIG, jax.random.key(i)) for i in (0, 1))
    ids = np.ones((2, 9), int)
    optjax.gptq(first, ids)
    with count_compilations() as count:
        optjax.gptq(second, ids)
    assert count.compiled == 0


def test_hidden_states_are_kept_once(monkeypatch):
    """As a layer gives new ones, those that it was given go; of 6 batches there are 7 at most."""
    most, run = [], calibrate._run

    def counted(*given):
        made = run(*given)
        most.append(sum(array.shape == (2, 11, 16) for array in jax.live_arrays()))
        return made

    monkeypatch.setattr(calibrate, "_run", counted)
    optjax.gptq(optjax.init_params(CONFIG, jax.random.key(0)), np.ones((12, 11), int), batch_size=2)
    assert most[5] == 6 and max(most) == 7, most


@pytest.mark.parametrize("head", ["causal_lm", "question_answering"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_bar_comes_to_its_end(monkeypatch, head, tied):
    told = []

    @contextmanager
    def bar(total, description, show):
        told.append(-total)
        assert description == "quantizing to int4" and show
        yield told.append

    monkeypatch.setattr("optjax.quantization.calibrate.progress_bar", bar)
    params = optjax.init_params(CONFIG.replace(tie_word_embeddings=tied), jax.random.key(0), head=head)
    optjax.gptq(params, np.zeros((1, 4), int), progress=True)
    assert len(told) > 13 and sum(told) == 0


@pytest.mark.parametrize("axes", ["data=2,tensor=2", "fsdp=2,sequence=2,tensor=2"])
def test_over_a_mesh(axes, no_digits):
    """The same codes, and each part of them where `quantize` has it."""
    mesh = make_mesh(axes, jax.devices()[: 2 ** axes.count("=")])
    ids, quantization = np.random.default_rng(0).integers(0, 64, (8, 12)), Quantization("int4", 2)
    wanted = optjax.gptq(optjax.init_params(CONFIG, jax.random.key(0)), ids, quantization)
    spread = optjax.init_params(CONFIG, jax.random.key(0), mesh=mesh)
    made, like = optjax.gptq(spread, ids, quantization), optjax.quantize(spread, quantization)
    assert codes_agree(made.weights, wanted.weights) > 0.98
    for ours, theirs in zip(jax.tree.leaves(made), jax.tree.leaves(like), strict=True):
        assert ours.sharding.is_equivalent_to(theirs.sharding, ours.ndim) and ours.dtype == theirs.dtype


def test_other_heads_and_dtypes():
    """Float16 and bfloat16 stay what the rest is in; a classifier stays as it is."""
    ids = np.random.default_rng(0).integers(0, 64, (4, 12))
    for dtype, head in (("float16", "question_answering"), ("bfloat16", None)):
        params = optjax.init_params(CONFIG, jax.random.key(0), dtype, head)
        with jax.numpy_dtype_promotion("strict"):
            made = optjax.gptq(params, ids, "nf4")
        like = jax.eval_shape(partial(optjax.quantize, quantization="nf4"), params)
        assert jax.tree.structure(made) == jax.tree.structure(like)
        assert all(a.dtype == b.dtype for a, b in zip(jax.tree.leaves(made), jax.tree.leaves(like), strict=True))
        assert head is None or (made["qa_outputs"]["weight"] == params["qa_outputs"]["weight"]).all()


def spoiled(params: optjax.Params) -> optjax.Params:
    """One number of the last matrix is not finite, and nothing follows that would tell."""
    *layers, last = params["layers"]
    fc2 = last["fc2"] | {"weight": last["fc2"]["weight"].at[3, 5].set(jnp.inf)}
    return dataclasses.replace(params, weights=params.weights | {"layers": [*layers, last | {"fc2": fc2}]})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p, ids: optjax.gptq(p, ids, "int3"), "no quantization 'int3'"),
        (lambda p, ids: optjax.gptq(optjax.quantize(p), ids), "quantized already"),
        (lambda p, ids: optjax.gptq(p["layers"], ids), "params should be"),
        (lambda p, ids: optjax.gptq(p, ids[0]), r"ids should have shape \[B, T\]"),
        (lambda p, ids: optjax.gptq(p, ids + 60), "64"),
        (lambda p, ids: optjax.gptq(p, np.zeros((1, 40), int)), "40"),
        (lambda p, ids: optjax.gptq(p, ids, attention_mask=ids[:, :3]), "attention_mask"),
        (lambda p, ids: optjax.gptq(p, ids, attention_mask=np.zeros_like(ids)), "no text to go by"),
        (lambda p, ids: optjax.gptq(optjax.abstract_params(CONFIG), ids), "or on abstract params"),
        (lambda p, ids: jax.jit(optjax.gptq)(p, ids), "it cannot run inside jit"),
        (lambda p, ids: optjax.gptq(p, ids, batch_size=0), "batch_size should be an integer at least 1, not 0"),
        (lambda p, ids: optjax.gptq(spoiled(p), ids), "layers.fc2.weight is not finite"),
        (lambda p, ids: optjax.gptq(jax.tree.map(lambda a: a * jnp.nan, p), ids), "what comes to project_in.weight is"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(optjax.init_params(CONFIG, jax.random.key(0)), np.arange(8).reshape(2, 4))
