"""Every refusal of generate, stream, prefill and decode_step: what it says, and that nothing is compiled before it."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import count_compilations
from generation_helpers import CONFIG

import optjax
from optjax.generation.settings import as_settings

IDS = np.array([[5, 6, 7], [8, 9, 10]])
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def params():
    return optjax.init_params(CONFIG, KEY)


@pytest.fixture(scope="module")
def other_head():
    return optjax.init_params(CONFIG, KEY, head=None)


def refuse(call, *parts: str) -> None:
    """``call()`` raises a ValueError that holds all ``parts``, and compiles nothing."""
    with count_compilations() as count, pytest.raises(ValueError) as caught:
        call()
    assert count.compiled == 0
    for part in parts:
        assert part in str(caught.value), f"{part!r} is not in: {caught.value}"


OPTIONS = [
    # unknown
    (dict(temprature=1.0), "unknown option 'temprature'", "did you mean 'temperature'?"),
    (dict(num_beam=4), "unknown option 'num_beam'", "did you mean 'num_beams'?"),
    (dict(max_length=20), "unknown option 'max_length' (say max_new_tokens, which does not count the prompt)"),
    (dict(prng_key=KEY), "unknown option 'prng_key' (say key)"),
    (dict(temprature=1, top_p=7), "'temprature'", "top_p should be above 0 and at most 1, not 7"),
    # numbers
    *[
        (dict(temperature=x), "temperature should be above 0", "do_sample=False")
        for x in (0, -1, 1e-50, 1e-35, "1", True)
    ],
    *[(dict(temperature=x), "temperature should be above 0") for x in (float("nan"), float("inf"), 1e40, [1.0], 1j)],
    *[
        (dict(repetition_penalty=x), "repetition_penalty should be above 0")
        for x in (0, -1.0, 1e-39, "x", np.complex64(2))
    ],
    *[(dict(top_p=x), "top_p should be above 0 and at most 1") for x in (0, 1.1, -0.5, 1e-60, False)],
    *[(dict(typical_p=x), "typical_p should be above 0 and at most 1") for x in (0, 1.1)],
    *[(dict(min_p=x), "min_p should be from 0 to 1") for x in (-0.1, 1.01)],
    *[
        (dict([(name, x)]), f"{name} should be at least 0 and below 1")
        for name in ("epsilon_cutoff", "eta_cutoff")
        for x in (1, -0.1, "0.1")
    ],
    (dict(encoder_repetition_penalty=0), "encoder_repetition_penalty should be above 0"),
    *[
        (
            dict(exponential_decay_length_penalty=x),
            "exponential_decay_length_penalty should be (tokens, factor above 0)",
        )
        for x in (3, (3,), (2.5, 1.1), (-1, 1.1), (3, 0), (3, "1"), (3, float("nan")))
    ],
    # counts
    (dict(encoder_no_repeat_ngram_size=-1), "encoder_no_repeat_ngram_size should be an integer of at least 0"),
    (dict(min_length=1.5), "min_length should be an integer of at least 0"),
    *[(dict(top_k=x), "top_k should be an integer of at least 0") for x in (-1, 2.5, "5", True)],
    *[(dict(no_repeat_ngram_size=x), "no_repeat_ngram_size should be an integer of at least 0") for x in (-1, 1.0)],
    *[(dict(min_new_tokens=x), "min_new_tokens should be an integer of at least 0") for x in (-1, "3")],
    *[(dict(num_return_sequences=x), "num_return_sequences should be an integer of at least 1") for x in (0, 1.5)],
    # flags
    (dict(do_sample=1), "do_sample should be True or False, not 1"),
    (dict(do_sample="yes"), "do_sample should be True or False"),
    (dict(renormalize_logits=1), "renormalize_logits should be True or False, not 1"),
    (dict(remove_invalid_values=0), "remove_invalid_values should be True or False, not 0"),
    # ids
    *[
        (dict(eos_token_id=x), "eos_token_id holds", "the vocabulary of 47")
        for x in (47, -1, [2, 99], 2.5, [True], "2")
    ],
    *[(dict(pad_token_id=x), "pad_token_id holds", "the vocabulary of 47") for x in (47, -1, "1")],
    (dict(pad_token_id=[1, 2]), "pad_token_id should be one id, not [1, 2]"),
    *[(dict(suppress_tokens=x), "suppress_tokens holds", "the vocabulary of 47") for x in ([50265], [[1]], [1.5])],
    (dict(suppress_tokens=range(47)), "suppress_tokens leaves no token at all"),
    *[(dict(bad_words_ids=x), "bad_words_ids should be a list of lists") for x in ([3], 3, [[]], [[1], []], "ab")],
    *[(dict(bad_words_ids=x), "bad_words_ids holds", "the vocabulary of 47") for x in ([[47]], [[1, -2]], [[1.0]])],
    (dict(begin_suppress_tokens=range(30), suppress_tokens=range(30, 47)), "begin_suppress_tokens leaves no token"),
    (dict(forced_bos_token_id=7, suppress_tokens=[6, 7]), "forced_bos_token_id 7 is among suppress_tokens"),
    (dict(forced_eos_token_id=[3, 4], suppress_tokens=[3, 4]), "forced_eos_token_id [3, 4] is among suppress_tokens"),
    (dict(forced_bos_token_id=47), "forced_bos_token_id holds 47"),
    (dict(forced_eos_token_id=[2, 47]), "forced_eos_token_id holds 47"),
    *[
        (dict(sequence_bias=x), "sequence_bias should be a dict from tuples of ids to numbers")
        for x in (
            {},
            [],
            {3: 1.0},
            {(): 1.0},
            {(1,): "1"},
            {(1,): float("nan")},
            {(1,): float("inf")},
            [[1, 2]],
            [3],
            5,
        )
    ],
    (dict(sequence_bias={(3, 47): 1.0}), "sequence_bias holds 47"),
    # functions
    *[(dict(logits_processor=x), "logits_processor should be a function") for x in (3, [3], "f", [[]])],
    (dict(logits_processor=lambda ids, scores: scores[:, :3]), "scores of shape (2, 47)", "float32 (2, 3)"),
    (dict(logits_processor=lambda ids, scores: None), "scores of shape (2, 47)", "NoneType"),
    # together
    (dict(min_length=5, min_new_tokens=3), "min_new_tokens=3 and min_length=5", "give one"),
    (dict(exponential_decay_length_penalty=(3, 1.1), eos_token_id=[]), "needs an end of sequence"),
    (dict(num_return_sequences=2), "num_return_sequences=2 without do_sample=True"),
    # search
    *[(dict(num_beams=x), "num_beams should be an integer of at least 1") for x in (0, 2.0, "4", True)],
    (dict(num_beams=2, num_return_sequences=3), "num_return_sequences=3 is more than there are beams (num_beams=2)"),
    *[(dict(num_beams=2, early_stopping=x), "early_stopping should be True, False or 'never'") for x in ("no", 1, [])],
    (dict(num_beams=2, length_penalty="x"), "length_penalty should be a number"),
    (dict(length_penalty=2.0, early_stopping=True), "length_penalty and early_stopping", "give num_beams above 1"),
    (dict(num_beam_groups=2, diversity_penalty=1.0), "num_beam_groups and diversity_penalty", "give num_beams above 1"),
    (dict(num_beams=4, num_beam_groups=3, diversity_penalty=1.0), "num_beams=4", "multiple of num_beam_groups=3"),
    (dict(num_beams=4, num_beam_groups=2), "needs a diversity_penalty above 0"),
    (dict(num_beams=4, num_beam_groups=2, diversity_penalty=-1), "diversity_penalty should be at least 0"),
    (dict(num_beams=4, diversity_penalty=1.0), "diversity_penalty needs num_beam_groups above 1"),
    (
        dict(num_beams=4, num_beam_groups=2, diversity_penalty=1.0, do_sample=True, key=jax.random.key(0)),
        "num_beam_groups above 1 is for do_sample=False",
    ),
    (dict(num_beams=2, eos_token_id=range(47)), "an id that is no eos_token_id"),
    (dict(num_beams=2, do_sample=True), "do_sample=True needs a key"),
    *[(dict(penalty_alpha=x), "penalty_alpha should be from 0 to 1") for x in (-0.1, 1.5, "x")],
    *[(dict(penalty_alpha=0.6, top_k=x), "penalty_alpha needs top_k of at least 2") for x in (0, 1, None)],
    (dict(penalty_alpha=0.6, do_sample=True, key=jax.random.key(0)), "penalty_alpha is for do_sample=False"),
    (dict(penalty_alpha=0.6, num_beams=2), "num_beams above 1 and penalty_alpha are two strategies"),
    (dict(penalty_alpha=0.6, num_return_sequences=2), "num_return_sequences=2 without do_sample=True"),
    (dict(do_sample=True), "do_sample=True needs a key"),
    (dict(do_sample=True, key=0), "expected a PRNG key"),
    (dict(do_sample=True, key=np.zeros(2)), "expected a PRNG key"),
]


def said(case) -> str:
    """Without addresses of functions, which differ between the processes that share out the tests."""
    return re.sub(r" at 0x\w+", "", str(case[0]))


@pytest.mark.parametrize("case", OPTIONS, ids=said)
def test_options(case, params):
    options, *parts = case
    refuse(lambda: optjax.generate(params, IDS, max_new_tokens=3, **options), *parts)
    # at the call, not when the first token is asked for
    refuse(lambda: optjax.stream(params, IDS, max_new_tokens=3, **options), *parts)


def test_no_beams_in_stream(params):
    refuse(lambda: optjax.stream(params, IDS, max_new_tokens=3, num_beams=2), "stream yields each token", "generate")


def test_output_scores(params):
    refuse(lambda: optjax.generate(params, IDS, max_new_tokens=3, output_scores=True), "return_dict_in_generate=True")
    refuse(lambda: optjax.stream(params, IDS, max_new_tokens=3, output_scores=True), "stream yields ids only")
    refuse(
        lambda: optjax.generate(params, IDS, max_new_tokens=3, output_scores=2, return_dict_in_generate=True),
        "output_scores should be True or False, not 2",
    )


INPUTS = [
    (dict(ids=np.array([5, 6])), "ids should have shape [B, T], got (2,)", "add a batch axis: ids[None]"),
    (dict(ids=[5, 6]), "ids should have shape [B, T], got (2,)", "add a batch axis: [ids]"),
    (dict(ids=(IDS, np.ones_like(IDS))), "got a pair of (2, 3)", "pass each as its own argument"),
    (dict(ids=np.zeros((0, 3), int)), "ids is empty"),
    (dict(ids=np.zeros((2, 0), int)), "ids is empty"),
    (dict(ids=[[1.0, 2.0]]), "ids should be integers, got float64"),
    (dict(ids=KEY[None, None]), "ids should be integers, got key<fry>"),
    (dict(ids=[[1, 2], [3]]), "not a rectangular array", "pad the rows"),
    (dict(ids=[[1, 47]]), "ids[0, 1] is 47, outside the vocabulary: 0 to 46"),
    (dict(ids=[[-1, 4]]), "ids[0, 0] is -1"),
    *[(dict(ids=x), "ids should be integers, got text", "tokenizer(texts)") for x in ("a text", ["a text"], [["a"]])],
    (dict(attention_mask=[[1, 1, 1]]), "attention_mask should have shape (2, 3)", "got (1, 3)"),
    (dict(attention_mask=np.ones((2, 3))), "attention_mask should be bool or int, got float64"),
    (dict(attention_mask=[[1, 1, 1], [0, 0, 0]]), "attention_mask is all 0 in row 1", "BOS"),
]


@pytest.mark.parametrize("case", INPUTS, ids=lambda case: str(case[0]))
def test_inputs(case, params):
    given, *parts = case
    ids, mask = given.get("ids", IDS), given.get("attention_mask")
    refuse(lambda: optjax.generate(params, ids, mask, max_new_tokens=3), *parts)
    refuse(lambda: optjax.stream(params, ids, mask, max_new_tokens=3), *parts)
    refuse(lambda: optjax.prefill(params, ids, mask, max_length=9), *parts)


@pytest.mark.parametrize("n", [0, -1, 2.0, "5", None, True])
def test_max_new_tokens(n, params):
    refuse(
        lambda: optjax.generate(params, IDS, max_new_tokens=n),
        f"max_new_tokens should be an integer of at least 1, not {n!r}",
    )


def test_past_the_last_position(params):
    """Real tokens count, padding does not; the message names the three numbers and what would fit."""
    ids = np.ones((2, 40), int)
    parts = ("40 tokens", "max_new_tokens = 25", "make 65", "max_position_embeddings = 64", "at most 24")
    refuse(lambda: optjax.generate(params, ids, max_new_tokens=25), *parts)
    refuse(lambda: optjax.stream(params, ids, max_new_tokens=25), *parts)
    mask = np.tri(2, 40, 20, dtype=int)
    parts = ("22 tokens", "max_new_tokens = 43", "make 65", "max_position_embeddings = 64", "at most 42")
    refuse(lambda: optjax.generate(params, ids, mask, max_new_tokens=43), *parts)
    refuse(lambda: optjax.generate(params, np.ones((1, 70), int), max_new_tokens=1), "70 tokens", "at most 0")
    # the longest that fits, in more columns than there are positions
    wide = np.ones((2, 70), int)
    assert optjax.generate(params, wide, np.tri(2, 70, 20, dtype=int), max_new_tokens=42).shape == (2, 112)


def test_past_the_last_position_inside_jit(params):
    """Shapes, and a mask that is not traced, are checked while tracing."""
    ids = jnp.ones((2, 40), jnp.int32)

    def length_is_shape(ids):
        return optjax.generate(params, ids, max_new_tokens=25)

    def known_mask(ids):
        return optjax.generate(params, ids, np.tri(2, 40, 20, dtype=int), max_new_tokens=43)

    refuse(lambda: jax.eval_shape(length_is_shape, ids), "make 65")
    refuse(lambda: jax.eval_shape(known_mask, ids), "22 tokens", "make 65")
    refuse(lambda: jax.eval_shape(lambda ids: list(optjax.stream(params, ids, max_new_tokens=2)), ids), "inside jit")


def test_params(params, other_head):
    for call in (
        lambda p: optjax.generate(p, IDS, max_new_tokens=3),
        lambda p: optjax.stream(p, IDS, max_new_tokens=3),
        lambda p: optjax.prefill(p, IDS, max_length=9),
        lambda p: optjax.decode_step(p, IDS[:, 0], None),
    ):
        refuse(lambda call=call: call(other_head), "head None", "'causal_lm'")
        refuse(lambda call=call: call({"weights": 1}), "expected optjax params, got dict")


def test_prefill(params):
    cache = optjax.init_cache(params, 2, 8)
    refuse(lambda: optjax.prefill(params, IDS), "either max_length, for a new cache, or cache")
    refuse(lambda: optjax.prefill(params, IDS, max_length=9, cache=cache), "either max_length")
    refuse(lambda: optjax.prefill(params, IDS, max_length=2), "max_length 2 is less than the 3 columns")
    refuse(lambda: optjax.prefill(params, IDS, max_length=9.0), "max_length should be an integer, not 9.0")
    refuse(lambda: optjax.prefill(params, IDS, cache={}), "cache should come from prefill or init_cache, got dict")
    refuse(lambda: optjax.prefill(params, IDS[:1], cache=cache), "the cache is for 2 rows, and ids have 1")
    refuse(
        lambda: optjax.prefill(params, np.ones((2, 9), int), cache=cache), "8 columns, 0 in use", "cannot take 9 more"
    )
    refuse(
        lambda: optjax.prefill(params, np.ones((2, 65), int), max_length=80),
        "65 tokens",
        "max_position_embeddings = 64",
    )
    _, cache = optjax.prefill(params, IDS, cache=cache)
    refuse(
        lambda: optjax.prefill(params, np.ones((2, 6), int), cache=cache), "8 columns, 3 in use", "cannot take 6 more"
    )
    # a later chunk may not leave out a row that has begun: its logits would be of nothing
    refuse(lambda: optjax.prefill(params, IDS, [[1, 1, 1], [0, 0, 0]], cache=cache), "row 1", "on the left")


def test_caches_of_other_models(params):
    """Of a flat cache the heads are not known."""
    k, d = CONFIG.head_dim, CONFIG.hidden_size
    for layout in optjax.cache.LAYOUTS:
        larger = [CONFIG.replace(num_hidden_layers=CONFIG.num_hidden_layers + 1), CONFIG.replace(hidden_size=2 * d)]
        others = [*larger, CONFIG.replace(num_attention_heads=d // k // 2)] if layout == "heads" else larger
        for config in others:
            cache = optjax.init_cache(config, 2, 12, layout=layout)
            refuse(lambda cache=cache: optjax.decode_step(params, [1, 2], cache), "of a model of another shape")
            refuse(lambda cache=cache: optjax.prefill(params, IDS, cache=cache), "of a model of another shape")
            refuse(lambda cache=cache: optjax.forward(params, IDS, cache=cache), f"{len(cache.keys)} layers of")
    coded = optjax.init_cache(CONFIG.replace(num_attention_heads=1), 2, 12, "int8", layout="flat")
    refuse(lambda: optjax.decode_step(params, [1, 2], coded), "of a model of another shape")


def test_ends_that_are_named_twice_count_once():
    assert as_settings(CONFIG, dict(eos_token_id=[5, 6, 5] * 20, num_beams=2)).eos_ids.tolist() == [5, 6]


def test_a_cache_that_was_given_away(params):
    _, cache = optjax.prefill(params, IDS, max_length=12)
    optjax.decode_step(params, [1, 2], cache)
    refuse(lambda: optjax.decode_step(params, [1, 2], cache), "donated to an earlier call", "the cache that came back")
    for mask in (None, np.ones_like(IDS)):
        refuse(lambda mask=mask: optjax.prefill(params, IDS, mask, cache=cache), "donated to an earlier call")
    prefix = optjax.read_prefix(params, IDS[:1])
    optjax.decode_step(params, [1], prefix.cache)
    refuse(lambda: optjax.generate(params, IDS, max_new_tokens=2, prefix=prefix), "the prefix's cache was donated")


def test_decode_step(params):
    _, cache = optjax.prefill(params, IDS, max_length=8)
    refuse(lambda: optjax.decode_step(params, IDS, cache), "ids should be integers of shape (2,), got int64 (2, 3)")
    refuse(lambda: optjax.decode_step(params, [1, 2, 3], cache), "shape (2,)")
    refuse(lambda: optjax.decode_step(params, [1.0, 2.0], cache), "should be integers", "float64")
    refuse(lambda: optjax.decode_step(params, [1, 47], cache), "ids[1] is 47, outside the vocabulary")
    refuse(
        lambda: optjax.decode_step(params, [1, 2], None), "cache should come from prefill or init_cache, got NoneType"
    )


def test_what_may_be_given():
    """numpy's numbers and arrays, jax's arrays, tuples and ranges, None for the default."""
    listed = as_settings(
        CONFIG, dict(suppress_tokens=[3, 4], eos_token_id=[5, 6], bad_words_ids=[[7], [8, 9]], do_sample=True)
    )
    for kind, number in ((tuple, np.float32), (np.array, np.array), (jnp.array, jnp.array)):
        same = as_settings(
            CONFIG,
            dict(
                suppress_tokens=kind([3, 4]), eos_token_id=kind([5, 6]), bad_words_ids=[kind([7]), kind([8, 9])],
                do_sample=number(1) > 0, top_k=kind([50])[0], temperature=number(1), top_p=None,
                pad_token_id=np.int8(1),
            ),
        )  # fmt: skip
        assert jax.tree.structure(listed) == jax.tree.structure(same)
        jax.tree.map(np.testing.assert_array_equal, listed, same)
    biased = as_settings(CONFIG, dict(sequence_bias={(3,): -(10**400), (4,): -1e39, (5,): -3e38})).sequence_bias
    np.testing.assert_array_equal(biased[1], np.array([-np.inf, -np.inf, -3e38], np.float32))
    none = dict.fromkeys(
        ["top_p", "min_p", "typical_p", "bad_words_ids", "suppress_tokens", "eos_token_id", "pad_token_id"]
    )
    off = as_settings(CONFIG, none | dict(top_k=None, repetition_penalty=1, temperature=1, do_sample=True))
    assert off.top_k is None and off.temperature is None and off.repetition_penalty is None and off.top_p is None
    assert off.eos_ids.tolist() == [2] and off.pad_id == 1


def test_special_ids_of_the_config():
    """Several ends; ends outside a small vocabulary end nothing; no pad id: the end's, or 0."""
    several = CONFIG.replace(eos_token_id=(2, 9, 50), pad_token_id=None)
    assert as_settings(several, {}).eos_ids.tolist() == [2, 9] and as_settings(several, {}).pad_id == 2
    none = CONFIG.replace(eos_token_id=None, pad_token_id=None)
    assert as_settings(none, {}).eos_ids.tolist() == [] and as_settings(none, {}).pad_id == 0
    assert as_settings(CONFIG, {"eos_token_id": []}).eos_ids.tolist() == []
    # without an end there is nothing to put off
    assert as_settings(none, {"min_new_tokens": 4}).min_new_tokens is None
