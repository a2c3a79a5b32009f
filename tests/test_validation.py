"""Every documented refusal: a ValueError that says what was given, raised before anything is compiled."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import count_compilations

import optjax
from optjax import OPTConfig

CONFIG = OPTConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    ffn_dim=8,
    max_position_embeddings=12,
    num_labels=3,
)
FUNCTIONS = {
    None: optjax.forward,
    "causal_lm": optjax.causal_lm,
    "sequence_classification": optjax.sequence_classification,
    "question_answering": optjax.question_answering,
}
IDS = np.arange(2, 10).reshape(2, 4)
EMBEDS = np.zeros((2, 4, 8), np.float32)


@pytest.fixture(scope="module")
def params() -> dict[str | None, optjax.Params]:
    """Params with zeros for weights: no test here looks at a number."""
    return {
        head: jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), optjax.abstract_params(CONFIG, head=head))
        for head in FUNCTIONS
    }


def _cache(rows: int = 2, columns: int = 16, used: int = 0, held: int = 0) -> optjax.Cache:
    shape = (rows, 2, columns, 4)
    empty = tuple(np.zeros(shape, np.float32) for _ in range(2))
    lengths = np.full(rows, held, np.int32)
    return optjax.Cache(empty, empty, np.zeros((rows, columns), bool), lengths, np.int32(used), "heads")  # pyright: ignore


# What all four functions refuse: the call, and what the message says.
EVERYWHERE: dict[str, tuple[dict[str, Any], str]] = {
    "neither ids nor embeds": ({}, "give either ids or inputs_embeds, one of them"),
    "both": ({"ids": IDS, "inputs_embeds": EMBEDS}, "give either ids or inputs_embeds, not both"),
    "one-dimensional ids": (
        {"ids": IDS[0]},
        r"ids should have shape \[B, T\], got \(4,\); add a batch axis: ids\[None\]",
    ),
    "three-dimensional ids": ({"ids": IDS[None]}, r"got \(1, 2, 4\)"),
    "float ids": ({"ids": IDS.astype(float)}, "ids should be integers, got float64"),
    "bool ids": ({"ids": IDS > 3}, "ids should be integers, got bool"),
    "text": ({"ids": [["a", "b"]]}, "ids should be integers, got text"),
    "ragged ids": ({"ids": [[1, 2], [3]]}, "ids is not a rectangular array: .*pad the rows to one length"),
    "an object": ({"ids": [[object()]]}, "ids is not an array of numbers"),
    "no ids": ({"ids": np.zeros((2, 0), int)}, r"ids is empty: shape \(2, 0\)"),
    "id past the vocabulary": ({"ids": [[1, 2], [20, 3]]}, r"ids\[1, 0\] is 20, outside the vocabulary: 0 to 19"),
    "negative id": ({"ids": [[1, -2]]}, r"ids\[0, 1\] is -2, outside the vocabulary: 0 to 19"),
    "an id past int32": ({"ids": np.array([[2**40]])}, "outside the vocabulary"),
    "narrow embeds": ({"inputs_embeds": EMBEDS[..., :7]}, r"\[B, T, 8\], got \(2, 4, 7\)"),
    "flat embeds": ({"inputs_embeds": EMBEDS[0]}, r"\[B, T, 8\], got \(4, 8\)"),
    "no embeds": ({"inputs_embeds": EMBEDS[:, :0]}, r"\[B, T, 8\], got \(2, 0, 8\)"),
    "integer embeds": ({"inputs_embeds": EMBEDS.astype(int)}, "inputs_embeds should be floating point, got int64"),
    "mask of another shape": (
        {"attention_mask": np.ones((2, 3), int)},
        r"attention_mask should have shape \(2, 4\).*got \(2, 3\)",
    ),
    "float mask": ({"attention_mask": np.ones((2, 4))}, "attention_mask should be bool or int, got float64"),
    "positions of another shape": (
        {"position_ids": np.arange(4)},
        r"position_ids should have shape \(2, 4\), got \(4,\)",
    ),
    "float positions": ({"position_ids": np.zeros((2, 4))}, "position_ids should be integers, got float64"),
    "position past the table": (
        {"position_ids": IDS + 3},
        r"position_ids\[1, 3\] is 12, outside .*max_position_embeddings\): -1 to 11",
    ),
    "position before the table": ({"position_ids": IDS - 4}, r"position_ids\[0, 0\] is -2"),
    "too long": (
        {"ids": np.ones((2, 13), int)},
        "13 tokens in a row are more than max_position_embeddings = 12; shorten",
    ),
    "too long, masked": (
        {"ids": np.ones((2, 14), int), "attention_mask": np.eye(2, 14, dtype=int)[::-1] < 1},
        "13 tokens in a row",
    ),
    "too long with the cache": ({"cache": _cache(held=9)}, "13 tokens in a row"),
    "head mask of another shape": (
        {"head_mask": np.ones((2, 3))},
        r"head_mask should have shape \(2, 2\) or \(2,\), got \(2, 3\)",
    ),
    "head mask of words": ({"head_mask": ["yes", "no"]}, "head_mask should be bool, int or floating point, got <U3"),
    "no cache": ({"cache": {"keys": 1}}, "cache should come from init_cache, got dict"),
    "cache for other rows": ({"cache": _cache(rows=3)}, "the cache is for 3 rows, and ids have 2"),
    "full cache": (
        {"cache": _cache(used=13)},
        "16 columns, 13 in use, and cannot take 4 more; .*max_length=17 or more",
    ),
    "a number for a key": ({"dropout_key": 0}, r"expected a PRNG key such as jax.random.key\(0\), got int"),
    "an array for a key": ({"dropout_key": np.zeros(3, np.float32)}, "expected a PRNG key .*, got ndarray"),
}


@pytest.mark.parametrize("head", FUNCTIONS)
@pytest.mark.parametrize("case", EVERYWHERE)
def test_every_function(case, head, params):
    arguments, message = EVERYWHERE[case]
    if not {"ids", "inputs_embeds"} & arguments.keys() and arguments:
        arguments = {"ids": IDS} | arguments
    with count_compilations() as count, pytest.raises(ValueError, match=message):
        FUNCTIONS[head](params[head], **arguments)
    assert count.compiled == 0


HEADS: dict[str, tuple[str, dict[str, Any], str]] = {
    "labels of another shape": (
        "causal_lm",
        {"labels": IDS[:, 1:]},
        r"labels should be integers of shape \(2, 4\), got int64 \(2, 3\)",
    ),
    "float labels": ("causal_lm", {"labels": IDS.astype(np.float32)}, "labels should be integers"),
    "labels past the vocabulary": (
        "causal_lm",
        {"labels": IDS + 12},
        r"labels\[1, 2\] is 20, outside the vocabulary: 0 to 19 \(or -100\)",
    ),
    "another label than -100": ("causal_lm", {"labels": np.full_like(IDS, -1)}, r"labels\[0, 0\] is -1"),
    "unknown problem type": (
        "sequence_classification",
        {"problem_type": "ranking"},
        "problem_type 'ranking' is not one of regression, ",
    ),
    "labels for each token": (
        "sequence_classification",
        {"labels": IDS},
        r"labels for single_label_classification should have shape \(2,\)",
    ),
    "float classes": (
        "sequence_classification",
        {"labels": np.ones(2, np.float32), "problem_type": "single_label_classification"},
        "should be integers, got float32",
    ),
    "class past num_labels": (
        "sequence_classification",
        {"labels": np.array([0, 3])},
        r"labels\[1\] is 3, outside num_labels: 0 to 2 \(or -100\)",
    ),
    "multi-label of one dimension": (
        "sequence_classification",
        {"labels": np.ones(2, np.float32)},
        r"multi_label_classification should have shape \(2, 3\), got \(2,\)",
    ),
    "regression of one dimension": (
        "sequence_classification",
        {"labels": np.ones(2), "problem_type": "regression"},
        r"regression should have shape \(2, 3\), got \(2,\)",
    ),
    "one position": (
        "question_answering",
        {"start_positions": np.ones(2, int)},
        "give both start_positions and end_positions, or neither",
    ),
    "positions of another shape": (
        "question_answering",
        {"start_positions": np.ones(2, int), "end_positions": np.ones(3, int)},
        r"end_positions should be integers of shape \(2,\), got int64 \(3,\)",
    ),
    "float positions": (
        "question_answering",
        {"start_positions": np.ones(2), "end_positions": np.ones(2, int)},
        "start_positions should be integers",
    ),
}


@pytest.mark.parametrize("case", HEADS)
def test_labels(case, params):
    head, arguments, message = HEADS[case]
    with count_compilations() as count, pytest.raises(ValueError, match=message):
        FUNCTIONS[head](params[head], IDS, **arguments)
    assert count.compiled == 0


@pytest.mark.parametrize("head", [h for h in FUNCTIONS if h])
def test_another_head(head, params):
    for other in set(FUNCTIONS) - {head}:
        with pytest.raises(ValueError, match=f"these params have head {other!r}, and this function needs '{head}'"):
            FUNCTIONS[head](params[other], IDS)
    with pytest.raises(ValueError, match="expected optjax params, got dict; make them with init_params or load_params"):
        FUNCTIONS[head]({}, IDS)


def test_unknown_argument(params):
    with pytest.raises(TypeError, match="atention_mask"):
        optjax.forward(params[None], IDS, atention_mask=IDS)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 0), "max_length of a cache should be a positive integer, not 0"),
        ((-1, 4), "batch_size of a cache should be a positive integer, not -1"),
        ((2.0, 4), "batch_size of a cache should be a positive integer, not 2.0"),
        ((2, 4, jnp.int16), "a cache is of a floating dtype such as jnp.bfloat16, or of int8"),
    ],
)
def test_cache(arguments, message, params):
    with pytest.raises(ValueError, match=message):
        optjax.init_cache(params[None], *arguments)
    with pytest.raises(ValueError, match="no cache layout 'rows'; there are: heads, flat"):
        optjax.init_cache(CONFIG, 2, 4, layout="rows")
    with pytest.raises(ValueError, match="not for dict"):
        optjax.init_cache({}, 2, 4)  # pyright: ignore[reportArgumentType]


def test_device_arrays_compile_nothing_either(params):
    """The same with arguments that are on a device already, in dtypes that need a cast."""
    ids, mask, heads = jnp.asarray(IDS, jnp.uint8), jnp.ones((2, 4), jnp.int8), jnp.ones(2, bool)
    with count_compilations() as count, pytest.raises(ValueError, match="expected a PRNG key"):
        optjax.forward(params[None], ids, attention_mask=mask, head_mask=heads, dropout_key=3)  # pyright: ignore
    assert count.compiled == 0


def test_shapes_are_checked_inside_jit(params):
    call = jax.jit(optjax.forward)
    for arguments, message in [
        ({"ids": IDS[0]}, "add a batch axis"),
        ({"ids": np.ones((2, 13), int)}, "13 tokens in a row"),
        ({"ids": IDS, "attention_mask": np.ones((2, 5), int)}, "attention_mask should have shape"),
        ({"ids": IDS, "attention_mask": np.ones((2, 4), np.float32)}, "should be bool or int"),
        ({"ids": IDS, "cache": _cache(columns=3)}, "cannot take 4 more"),
        ({"ids": IDS, "cache": _cache(rows=1)}, "the cache is for 1 rows"),
        ({"inputs_embeds": EMBEDS[..., :5]}, r"\[B, T, 8\]"),
        ({"ids": IDS, "head_mask": np.ones(3)}, "head_mask should have shape"),
        ({"ids": IDS, "dropout_key": np.ones(2)}, "expected a PRNG key"),
    ]:
        with count_compilations() as count, pytest.raises(ValueError, match=message):
            call(params[None], **arguments)
        assert count.compiled == 0
    # What cannot be known there is not refused: a traced mask may hold few enough tokens.
    assert (
        call(params[None], np.ones((2, 13), int), attention_mask=np.eye(2, 13, dtype=int)).last_hidden_state.shape[1]
        == 13
    )


def test_what_may_be_given(params):
    """Lists, every integer type, masks of bool or int, one row of positions, old and new keys."""
    expected = optjax.forward(params[None], IDS)
    for arguments in [
        {"ids": IDS.tolist()},
        {"ids": jnp.asarray(IDS)},
        {"ids": IDS.astype(np.uint8), "attention_mask": np.ones((2, 4), bool)},
        {"ids": IDS, "attention_mask": np.full((2, 4), 7)},
        {"ids": IDS, "position_ids": np.arange(4)[None]},
        {"ids": IDS, "head_mask": [True, 1]},
        {"ids": IDS, "dropout_key": jax.random.PRNGKey(0)},
        {"ids": IDS, "dropout_key": jax.random.key(0)},
    ]:
        out = optjax.forward(params[None], **arguments)
        assert jax.tree.structure(out) == jax.tree.structure(expected)
        assert out.last_hidden_state.shape == (2, 4, 8)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
@pytest.mark.parametrize("array", [np.asarray, jnp.asarray])
def test_integers_of_8_bits(dtype, array):
    """They hold neither the length of a row, nor a position and what the table begins with, nor -100 without a sign."""
    config = CONFIG.replace(vocab_size=200, max_position_embeddings=300, num_labels=200)
    top = np.iinfo(dtype).max
    rng = np.random.default_rng(0)
    ids, labels = rng.integers(2, 100, (2, 260)), np.array([156 if dtype == np.uint8 else 100, 7])
    positions = np.broadcast_to(np.arange(260) % (top + 1), ids.shape)

    def of(head, **arguments):
        real = optjax.init_params(config, jax.random.key(0), head=head)
        wide, narrow = (
            FUNCTIONS[head](real, ids, **{name: as_(x) for name, x in arguments.items()})
            for as_ in (np.asarray, lambda x: array(x.astype(dtype)))
        )
        return wide, narrow

    for wide, narrow in (
        of("sequence_classification", labels=labels),
        of("question_answering", start_positions=np.array([50, 7]), end_positions=np.array([top, 9])),
        of("causal_lm", labels=ids),
    ):
        assert narrow.loss == wide.loss
    wide, narrow = of(None, position_ids=positions)
    np.testing.assert_array_equal(narrow.last_hidden_state, wide.last_hidden_state)


def test_longest_row_counts_real_tokens(params):
    """Padding takes no positions: 12 real tokens in 15 columns are as many as the table holds."""
    mask = np.ones((2, 15), int)
    mask[0, :3] = mask[1, 5:8] = 0
    assert optjax.forward(params[None], np.ones((2, 15), int), attention_mask=mask).last_hidden_state.shape == (
        2,
        15,
        8,
    )


@pytest.mark.parametrize("head", FUNCTIONS)
def test_a_second_call_compiles_nothing(head, params):
    rng = np.random.default_rng(0)
    for _ in range(2):
        with count_compilations() as count:
            ids, mask = rng.integers(0, 20, (2, 5)), rng.integers(0, 2, (2, 5))
            out = FUNCTIONS[head](params[head], ids, attention_mask=mask, cache=_cache())
            FUNCTIONS[head](params[head], jnp.asarray(ids, jnp.int32), attention_mask=mask > 0, cache=out.cache)
    assert count.compiled == 0


def test_under_vmap_and_grad(params):
    """The checks let tracers through: rows mapped one by one are the batch, and gradients reach the embeddings."""
    config = CONFIG.replace(dropout=0.5)
    real = optjax.init_params(config, jax.random.key(0), head=None)
    mask = np.array([[0, 1, 1, 1], [1, 1, 1, 0]])

    def one(ids, mask):
        return optjax.forward(real, ids[None], attention_mask=mask[None]).last_hidden_state[0]

    whole = optjax.forward(real, IDS, attention_mask=mask).last_hidden_state
    np.testing.assert_allclose(jax.vmap(one)(IDS, mask), whole, atol=1e-5)

    def total(embeds):
        out = optjax.forward(real, inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        return jnp.square(out[:, 1]).sum()

    grads = np.asarray(jax.grad(total)(np.asarray(real["embed_tokens"]["weight"])[IDS]))
    assert np.isfinite(grads).all() and (grads[:, 1] != 0).any() and (grads[:, 2:] == 0).all()

    keys = jax.random.split(jax.random.key(1), 3)
    outs = jax.vmap(lambda key: optjax.forward(real, IDS, dropout_key=key).last_hidden_state)(keys)
    assert len({np.asarray(o).tobytes() for o in outs}) == 3
