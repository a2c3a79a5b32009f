"""FLOPs and bytes counted from a config, against counts made another way."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optjax
from optjax import OPTConfig
from optjax.sharding import RULES, make_mesh, make_placement, parse_mesh
from optjax.sharding.placement import Placement
from optjax.sharding.plan import analytic
from optjax.sharding.plan.analytic import Training
from optjax.sharding.plan.estimate import memory
from optjax.sharding.plan.hardware import parse_topology
from optjax.sharding.plan.program import bytes_per_device, find_job
from optjax.sharding.plan.request import make_request
from optjax.sharding.plan.roofline import roofline
from optjax.sharding.plan.working_set import working_set
from optjax.sharding.rules import as_rules

SIZES: dict[str, Any] = dict(
    vocab_size=512, hidden_size=128, num_hidden_layers=3, num_attention_heads=8, ffn_dim=384, dropout=0.0,
    max_position_embeddings=62, bos_token_id=2,
)  # fmt: skip
ARCHITECTURES = {
    "plain": {},
    "projections": {"word_embed_proj_dim": 64, "do_layer_norm_before": False},
    "no biases": {"enable_bias": False, "layer_norm_elementwise_affine": False},
    "untied": {"tie_word_embeddings": False},
}
ALONE = "data"


def config(**changes: Any) -> OPTConfig:
    return OPTConfig(**{**SIZES, **changes})


def splits(mesh: str = "data=1", rules: str = ALONE) -> Placement:
    sizes = parse_mesh(mesh)
    shape: Any = SimpleNamespace(shape=sizes, size=int(np.prod(list(sizes.values()))), axis_names=tuple(sizes))
    return Placement(shape, as_rules(rules, shape))


def products(function: Any, *arguments: Any) -> int:
    """FLOPs of all matrix products that a function traces to, loops and inner jits included."""
    return products_in(jax.make_jaxpr(function)(*arguments).jaxpr)


def products_in(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracting, _), _ = equation.params["dimension_numbers"]
            left, out = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
            total += 2 * int(np.prod(out)) * int(np.prod([left[i] for i in contracting]))
        times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += times * products_in(inner)
    return total


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("stacked", [False, True])
def test_forward_flops_are_those_of_the_model(architecture: str, stacked: bool):
    """The model multiplies every query with every key; here that is counted as it is, not the causal half."""
    c, b, t = config(**ARCHITECTURES[architecture]), 2, 48
    params = optjax.abstract_params(c, stacked=stacked)
    ids = jnp.zeros((b, t), jnp.int32)
    traced = products(lambda p: optjax.causal_lm(p, ids).logits, params)
    assert traced == analytic.token_flops(c) * b * t + analytic.attention_flops(c, b * t * t)


@pytest.mark.parametrize("architecture", ["plain", "projections"])
def test_training_flops_are_those_of_the_gradient(architecture: str):
    c, b, t = config(**ARCHITECTURES[architecture]), 2, 48
    params = optjax.abstract_params(c)
    ids = jnp.zeros((b, t), jnp.int32)
    traced = products(jax.grad(lambda p: optjax.causal_lm(p, ids, labels=ids).loss), params)
    work = analytic.training(c, splits(), Training(batch=b, length=t, remat="none"))
    assert work.flops == pytest.approx(traced)
    again = analytic.training(c, splits(), Training(batch=b, length=t, remat="full"))
    head = 2 * b * t * c.vocab_size * c.embed_dim + 4 * b * t * c.hidden_size * c.embed_dim * c.has_projections
    fc2 = 2 * b * t * c.hidden_size * c.ffn_dim * c.num_hidden_layers * c.do_layer_norm_before
    assert again.flops == pytest.approx(traced + traced / 3 - head - fc2)


def traced_programs(request: Any) -> dict[str, int]:
    """FLOPs of the products of a request's programs, on one device at hand."""
    placement = make_placement(make_mesh("data=1", jax.devices()[:1]), None, request.config, "causal_lm")
    programs = find_job(request.job)(request.config, placement, **request.options)
    return {p.name: products_in(p.function.trace(*p.arguments).jaxpr.jaxpr) for p in programs}


@pytest.mark.parametrize("architecture", ["plain", "projections"])
@pytest.mark.parametrize(
    "options",
    [
        dict(remat="none", query_block=0),
        dict(remat="none", query_block=12),
        dict(remat="dots", query_block=12),
        dict(remat="full", query_block=12),
        dict(remat="full", micro_batches=2),
        dict(remat="offload", query_block=24, loss_chunks=3),
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_a_train_step_multiplies_what_its_plan_says(architecture: str, options: dict[str, Any]):
    """Blocks of queries look at no key beyond their last; fc2 is computed again only where a norm comes after it."""
    request = make_request(config(**ARCHITECTURES[architecture]), "v5e:1x1", batch=4, length=48, **options)
    assert request.works()["train step"].flops == pytest.approx(traced_programs(request)["train step"])


@pytest.mark.parametrize("architecture", ["plain", "projections"])
@pytest.mark.parametrize("cache_dtype", [None, "int8"])
def test_reading_prompts_multiplies_what_its_plan_says(architecture: str, cache_dtype: str | None):
    """A prompt looks at itself and not at an empty cache; where a cache rounds what it is given, at all of that."""
    request = make_request(
        config(**ARCHITECTURES[architecture]), "v5e:1x1", "generate", batch=2, prompt=16, cache_length=62,
        dtype="float32", cache_dtype=cache_dtype,
    )  # fmt: skip
    assert request.works()["prefill"].flops == pytest.approx(traced_programs(request)["prefill"])


def test_what_kernels_attend():
    """The past alone, by scores that never reach the memory; to train, those are made again for the backward pass."""
    c = config(max_position_embeddings=2048)
    pairs, width = 4 * 2048 * 2049 / 2, c.hidden_size * c.num_hidden_layers
    for topology, options, flash in (
        ("v5e:1x1", dict(attn_implementation="flash"), True),
        ("h100:1", dict(attn_implementation="auto"), True),
        ("v5e:1x1", dict(attn_implementation="auto", query_block=256), False),
        ("v5e:2x2", dict(attn_implementation="auto", mesh="sequence=4"), False),
    ):
        request = make_request(c, topology, batch=4, remat="dots", micro_batches=1, **options)
        assert request.flash == flash and ("scores of a block of queries" in working_set(request)) != flash
        if flash:
            plain = make_request(c, topology, batch=4, remat="dots", micro_batches=1)
            work = request.works()["train step"]
            products = 4 * 2048 * (3 * analytic.token_flops(c))
            assert work.flops == pytest.approx(products + 4.5 * 4 * width * pairs)
            scores = 2 * 2 * 4 * 2048 * (2048 + 512) / 2 * c.num_attention_heads * c.num_hidden_layers
            assert plain.works()["train step"].hbm_bytes - work.hbm_bytes == pytest.approx(3 * scores)
            assert memory(plain) > memory(request)
    with pytest.raises(ValueError, match="'flash' cannot be had: a row's tokens are spread"):
        make_request(c, "v5e:2x2", mesh="sequence=4", batch=4, attn_implementation="flash")
    read = dict(batch=4, prompt=2048, cache_length=2048)
    by_kernel, rounded = (make_request(c, "v5e:1x1", "generate", cache_dtype=d, **read) for d in (None, "int8"))
    assert by_kernel.flash and not rounded.flash
    ours, theirs = (each.works()["prefill"] for each in (by_kernel, rounded))
    assert theirs.flops - ours.flops == pytest.approx(4 * width * (4 * 2048**2 - pairs))
    assert theirs.hbm_bytes - ours.hbm_bytes > 4 * 2048**2 * c.num_attention_heads * c.num_hidden_layers


def test_the_compiler_counts_the_same():
    """XLA's own count has elementwise operations too, a few percent at these sizes."""
    c, b, t = config(), 2, 48
    ids = jax.ShapeDtypeStruct((b, t), jnp.int32)
    compiled = jax.jit(lambda p, ids: optjax.causal_lm(p, ids).logits).lower(optjax.abstract_params(c), ids).compile()
    theirs = compiled.cost_analysis()["flops"]
    ours = analytic.token_flops(c) * b * t + analytic.attention_flops(c, b * t * t)
    assert ours <= theirs <= 1.05 * ours


def test_the_paper_counts_much_the_same():
    """Zhang et al. 2022: 4.3e23 FLOPs for 300B tokens of 175B, of which they count activations again: 8/6. All of them:
    here what fc2 gives is not computed again."""
    c = OPTConfig.preset("opt-175b")
    step = analytic.training(c, splits(), Training(batch=1024, length=2048))
    whole = 300e9 / (1024 * 2048)
    assert step.model_flops * whole == pytest.approx(6 * optjax.count_params(c) * 300e9, rel=0.05)
    fc2 = 2 * c.hidden_size * c.ffn_dim * c.num_hidden_layers
    assert step.flops * whole + fc2 * 300e9 == pytest.approx(4.3e23, rel=0.05)


def test_a_causal_row_attends_to_its_past():
    assert analytic.causal_pairs(5) == sum(1 for query in range(5) for key in range(5) if key <= query)


MESHES = {
    "data": "data=2,tensor=4",
    "fsdp": "data=2,fsdp=2,sequence=2",
    "tensor": "fsdp=2,tensor=4",
    "fsdp+tensor": "fsdp=4,tensor=2",
    "fsdp+tensor+sequence": "fsdp=2,sequence=2,tensor=2",
}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weights_take_what_their_shardings_say(rules: str, architecture: str):
    c, mesh = config(**ARCHITECTURES[architecture]), make_mesh(MESHES[rules])
    params = optjax.abstract_params(c, jnp.bfloat16, mesh=mesh, rules=rules)
    assert analytic.stored_bytes(c, splits(MESHES[rules], rules), 2) == bytes_per_device(params)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("batch", [1, 2, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_cache_takes_what_its_shardings_say(rules: str, batch: int, dtype: str):
    from optjax.sharding.plan.generation import abstract_cache

    c, mesh = config(), make_mesh(MESHES[rules])
    params = optjax.abstract_params(c, jnp.bfloat16, mesh=mesh, rules=rules)
    cache = abstract_cache(c, params.placement, batch, 16, dtype)
    ours = analytic.cache_bytes(c, splits(MESHES[rules], rules), batch, 16, analytic.cache_width(c, dtype))
    assert ours == bytes_per_device((cache.keys, cache.values))


@pytest.mark.parametrize("rules", RULES)
def test_the_devices_together_do_the_work_once(rules: str):
    c, split = config(), splits(MESHES[rules], rules)
    one = analytic.training(c, splits(), Training(batch=8, length=48))
    each = analytic.training(c, split, Training(batch=8, length=48))
    assert 8 * each.flops == pytest.approx(one.flops)
    assert each.model_flops == one.model_flops
    decode, alone = (analytic.decoding(c, s, batch=8, cache_length=16) for s in (split, splits()))
    # Along the length there is nothing to split while one token is made.
    assert 8 // split.mesh.shape["sequence"] * decode.flops == pytest.approx(alone.flops)


def test_gathered_weights_are_whole_along_the_batch():
    c = config()
    assert analytic.used_bytes(c, splits("fsdp=8", "fsdp"), 2) == analytic.used_bytes(c, splits(), 2)
    whole = analytic.used_bytes(c, splits(), 2)
    assert whole == 2 * (optjax.count_params(c) - (c.max_position_embeddings + 2) * c.hidden_size)
    half = analytic.used_bytes(c, splits("fsdp=4,tensor=2", "fsdp+tensor"), 2)
    assert 0.5 * whole <= half < 0.51 * whole  # but for norms and a few biases
    # A few tokens come to the weights' parts, many do not.
    spread = splits("fsdp=8", "fsdp")
    assert analytic.used_bytes(c, spread, 2, (8,)) <= whole / 8 * 1.05
    assert analytic.used_bytes(c, spread, 2, (8, 64)) == whole
    shape = dict(batch=8, cache_length=62)
    moved = analytic.decoding(c, spread, **shape).hbm_bytes
    assert moved < analytic.decoding(c, splits(), **shape).hbm_bytes / 7


def test_state_of_training_by_hand():
    """Float32 weights, gradients and two moments: 16 bytes a parameter; and each layer's input in bfloat16."""
    c = config()
    work = analytic.training(c, splits(), Training(batch=8, length=48, micro_batches=4))
    n = optjax.count_params(c)
    assert work.memory == {
        "weights": 4 * n,
        "optimizer state": 8 * n,
        "gradients": 4 * n,
        "activations": 2 * 48 * c.hidden_size * c.num_hidden_layers * 2,
    }
    small = analytic.training(c, splits(), Training(batch=8, length=48, moment=2))
    assert small.memory["optimizer state"] == 4 * n
    elsewhere = analytic.training(c, splits(), Training(batch=8, length=48, moments_on_device=False))
    assert "optimizer state" not in elsewhere.memory


def test_decoding_reads_weights_and_cache():
    c, t = OPTConfig.preset("opt-1.3b"), parse_topology("v5e:1x1")
    work = analytic.decoding(c, splits(), batch=8, cache_length=2048)
    assert work.memory["weights"] == 2 * optjax.count_params(c)
    assert work.memory["cache"] == 8 * 2048 * 192 * 1024  # 192 KiB a token
    codes = analytic.decoding(c, splits(), batch=8, cache_length=2048, cache_width=analytic.cache_width(c, "int8"))
    assert codes.memory["cache"] == 8 * 2048 * (96 + 6) * 1024  # and a float32 for each head of 64 numbers
    times = roofline(t, work)
    # 5.85 GB at 819 GB/s.
    assert times.bound == "memory" and times.floor == pytest.approx(7.14e-3, rel=0.01)
    assert times.tokens_per_second == pytest.approx(8 / times.floor)


def test_the_slowest_rate_is_the_floor():
    c, t = OPTConfig.preset("opt-1.3b"), parse_topology("v5e:4x4")
    work = analytic.training(c, splits("fsdp=16", "fsdp"), Training(batch=64, length=2048))
    free, slow = roofline(t, work), roofline(t, work, interconnect=10.0)
    assert free.bound == "compute" and free.mfu == pytest.approx(work.model_flops / (work.flops * 16))
    assert (slow.bound, slow.floor) == ("interconnect", 10.0)
    assert slow.mfu == pytest.approx(free.mfu * free.floor / 10.0)


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_two_layers_are_on_their_way_where_there_are_two(layers: int):
    c = config(num_hidden_layers=layers)
    work = make_request(c, "v5e:1x1", "generate", prompt=8, cache_length=62, offload="host").works()["decode step"]
    layer = 2 * (4 * c.hidden_size**2 + 2 * c.hidden_size * c.ffn_dim)
    assert work.memory["layers on their way"] == min(layers, 2) * layer and work.host_bytes == layers * layer
