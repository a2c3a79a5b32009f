"""Every way of decoding gives the same ids on a mesh, in somebody's jit or shard_map and under x64; 16 bits will do.

None leaves a cast to jax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import optjax
from optjax.sharding import make_mesh

N, ROWS = 9, 4
CONFIG = optjax.OPTConfig(
    vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, max_position_embeddings=64,
    init_std=0.3,
)  # fmt: skip
SMALLER = CONFIG.replace(hidden_size=16, num_hidden_layers=1, word_embed_proj_dim=16)
IDS = np.random.default_rng(0).integers(3, 48, size=(ROWS, 7))
MASK = np.ones_like(IDS)
MASK[1, :3], MASK[2, 5:] = 0, 0
WAYS = {
    "greedy": {},
    "sampled": dict(do_sample=True, top_k=20, top_p=0.95, typical_p=0.95),
    "beams": dict(num_beams=3, length_penalty=0.7, num_return_sequences=2),
    "sampled beams": dict(num_beams=2, do_sample=True),
    "groups": dict(num_beams=4, num_beam_groups=2, diversity_penalty=0.5),
    "contrastive": dict(penalty_alpha=0.6, top_k=4),
    "assistant": dict(assistant_model=None, num_assistant_tokens=3),
    "sampled with assistant": dict(assistant_model=None, num_assistant_tokens=3, do_sample=True, top_p=0.9),
    "prompt lookup": dict(prompt_lookup_num_tokens=4),
    "guidance": dict(guidance_scale=1.5, repetition_penalty=1.2),
    "chunks": dict(prefill_chunk_size=3, penalty_alpha=0.4, top_k=3),
}
needs = pytest.mark.parametrize("way", WAYS)


def generate(way: str, params, mesh=None, prompts=(IDS, MASK)):
    return np.asarray(traced(way, params, mesh, prompts))


def traced(way: str, params, mesh=None, prompts=(IDS, MASK)):
    options = dict(WAYS[way], max_new_tokens=N)
    if options.get("do_sample"):
        options["key"] = jax.random.key(5)
    if "assistant_model" in options:
        options["assistant_model"] = optjax.init_params(SMALLER, jax.random.key(2), mesh=mesh)
    return optjax.generate(params, *prompts, **options)


@pytest.fixture(scope="module")
def alone() -> dict[str, np.ndarray]:
    params = optjax.init_params(CONFIG, jax.random.key(1))
    return {way: generate(way, params) for way in WAYS}


@needs
def test_on_a_mesh(alone, way):
    mesh = make_mesh("data=2,tensor=2", jax.devices()[:4])
    params = optjax.init_params(CONFIG, jax.random.key(1), mesh=mesh)
    np.testing.assert_array_equal(generate(way, params, mesh), alone[way])


@needs
def test_with_64_bits(alone, way):
    """Under x64, where what no dtype was given to is of 64 bits."""
    params = optjax.init_params(CONFIG, jax.random.key(1))
    with jax.enable_x64(True):
        np.testing.assert_array_equal(generate(way, params), alone[way])


@needs
def test_where_jax_promotes_no_dtype(way):
    """Every cast is explicit."""
    with jax.numpy_dtype_promotion("strict"):
        params = optjax.quantize(optjax.init_params(CONFIG, jax.random.key(1), jnp.bfloat16), "int8")
        made = jax.eval_shape(lambda params: traced(way, params), params)
    assert made.shape == (ROWS * WAYS[way].get("num_return_sequences", 1), IDS.shape[1] + N)


@needs
def test_inside_jit(alone, way):
    params = optjax.init_params(CONFIG, jax.random.key(1))
    options = {name: x for name, x in WAYS[way].items() if name != "assistant_model"}
    assistant = optjax.init_params(SMALLER, jax.random.key(2)) if "assistant_model" in WAYS[way] else None

    @jax.jit
    def outer(params, assistant, ids, mask, key):
        more = dict(options) | ({} if assistant is None else {"assistant_model": assistant})
        if options.get("do_sample"):
            more["key"] = key
        return optjax.generate(params, ids, mask, max_new_tokens=N, **more)

    found = outer(params, assistant, IDS, MASK, jax.random.key(5))
    np.testing.assert_array_equal(np.asarray(found), alone[way])


@needs
def test_inside_shard_map(way):
    """Each device decodes rows of its own, in a program of the caller's."""
    params, mesh, half = (
        optjax.init_params(CONFIG, jax.random.key(1)),
        make_mesh("data=2", jax.devices()[:2]),
        ROWS // 2,
    )
    each = [generate(way, params, prompts=(IDS[rows], MASK[rows])) for rows in (slice(half), slice(half, None))]

    options = dict(WAYS[way], max_new_tokens=N)
    if "assistant_model" in options:
        options["assistant_model"] = optjax.init_params(SMALLER, jax.random.key(2))
    if options.get("do_sample"):
        options["key"] = jax.random.key(5)

    def inside(params, ids, mask):
        return optjax.generate(params, ids, mask, **options)

    np.testing.assert_array_equal(_by_rows(inside, mesh)(params, IDS, MASK), np.concatenate(each))


@pytest.mark.parametrize("way", ["greedy", "prompt lookup"])
def test_inside_shard_map_without_a_mask(way):
    """What is the same on all devices at first is not so any more after a step."""
    mesh, params = make_mesh("data=2", jax.devices()[:2]), optjax.init_params(CONFIG, jax.random.key(1))
    options = dict(WAYS[way], max_new_tokens=N, no_repeat_ngram_size=3)

    def inside(params, ids, _):
        return optjax.generate(params, ids, **options)

    np.testing.assert_array_equal(_by_rows(inside, mesh)(params, IDS, IDS), inside(params, IDS, None))


def test_inside_shard_map_with_a_key_for_each_device():
    """Draws for the same prompts."""
    mesh, params = make_mesh("data=2", jax.devices()[:2]), optjax.init_params(CONFIG, jax.random.key(1))
    keys = jax.random.split(jax.random.key(5), 2)

    def inside(params, keys, _):
        return optjax.generate(params, IDS[:2], key=keys[0], max_new_tokens=N, num_beams=2, do_sample=True)

    each = [inside(params, keys[i:], None) for i in range(2)]
    np.testing.assert_array_equal(_by_rows(inside, mesh)(params, keys, keys), np.concatenate(each))


def _by_rows(function, mesh):
    rows, whole = PartitionSpec("data"), PartitionSpec()
    return jax.jit(jax.shard_map(function, mesh=mesh, in_specs=(whole, rows, rows), out_specs=rows))


def test_stop_strings_inside_shard_map():
    tokenizer, mesh = optjax.Tokenizer.load("opt-mini"), make_mesh("data=2", jax.devices()[:2])
    params = optjax.init_params(CONFIG.replace(vocab_size=tokenizer.vocab_size), jax.random.key(1))
    ids, mask = tokenizer(["The old house", "He", "She said that", "It was a very cold night"])

    def decode(params, ids, mask):
        options = dict(stop_strings=["e", "an"], tokenizer=tokenizer, max_new_tokens=12)
        return optjax.generate(params, ids, mask, **options)

    alone = decode(params, ids, mask)
    assert (np.asarray(alone)[:, -1] == CONFIG.pad_token_id).any()
    np.testing.assert_array_equal(_by_rows(decode, mesh)(params, ids, mask), alone)


@needs
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_in_16_bits(way, dtype):
    """Rounding moves few tokens of many prompts, of the first ones fewer still, from those of float32."""
    many = [np.concatenate([rows] * 16) for rows in (IDS, MASK)]
    many[0] = np.random.default_rng(1).permuted(many[0], axis=0)
    params = optjax.init_params(CONFIG, jax.random.key(1), dtype=dtype)
    exact = jax.tree.map(lambda weight: weight.astype(jnp.float32), params)
    made, expected = (generate(way, each, prompts=many)[:, IDS.shape[1] :] for each in (params, exact))
    assert (made[:, 0] == expected[:, 0]).mean() > 0.85
    assert (made == expected).mean() > 0.7
