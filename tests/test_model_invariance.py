"""A row's result depends neither on its neighbours, nor on its padding, nor on how it was cut into chunks."""

from __future__ import annotations

import numpy as np
import pytest
from hf_models import assert_close, params_from, state_of, torch_model

import optjax
from optjax import OPTConfig

CONFIGS = {
    "pre_norm": OPTConfig(
        vocab_size=60,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        ffn_dim=40,
        max_position_embeddings=12,
    )
}
CONFIGS["post_norm"] = CONFIGS["pre_norm"].replace(do_layer_norm_before=False, word_embed_proj_dim=16)
COLUMNS = 9
LENGTHS = [4, 7, 9]
RNG = np.random.default_rng(0)
ROWS = [RNG.integers(3, 60, size=n) for n in LENGTHS]
# For each row, the columns its tokens stand in.
PADDINGS = {
    "left": [np.arange(COLUMNS - n, COLUMNS) for n in LENGTHS],
    "right": [np.arange(n) for n in LENGTHS],
    "both": [np.arange((COLUMNS - n) // 2, (COLUMNS - n) // 2 + n) for n in LENGTHS],
    "holes": [np.sort(RNG.permutation(COLUMNS)[:n]) for n in LENGTHS],
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    """Params, and each row's logits by itself without padding."""
    config = CONFIGS[request.param]
    params = params_from(state_of(torch_model(config, "causal_lm", seed=4)), config, "causal_lm")
    return params, [np.asarray(optjax.causal_lm(params, row[None]).logits[0]) for row in ROWS]


def _batch(padding: str) -> tuple[np.ndarray, np.ndarray]:
    ids, mask = np.ones((2, len(ROWS), COLUMNS), int) * [[[1]], [[0]]]
    for i, columns in enumerate(PADDINGS[padding]):
        ids[i, columns], mask[i, columns] = ROWS[i], 1
    return ids, mask


def _check(logits, padding, alone):
    for i, columns in enumerate(PADDINGS[padding]):
        ours = np.asarray(logits)[i, columns]
        assert_close(ours, alone[i])
        np.testing.assert_array_equal(ours.argmax(-1), alone[i].argmax(-1))


@pytest.mark.parametrize("padding", PADDINGS)
def test_batch_and_padding(model, padding):
    params, alone = model
    ids, mask = _batch(padding)
    logits = optjax.causal_lm(params, ids, attention_mask=mask).logits
    _check(logits, padding, alone)

    # Other neighbours, and other ids under the padding: not a bit of the first row changes.
    others = np.where(mask, ids[:, ::-1], 17)
    others[0] = np.where(mask[0], ids[0], 23)
    changed = optjax.causal_lm(params, others, attention_mask=mask).logits
    columns = PADDINGS[padding][0]
    np.testing.assert_array_equal(changed[0, columns], logits[0, columns])


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("layout", ["heads", "flat"])
def test_cached(model, padding, layout):
    params, alone = model
    ids, mask = _batch(padding)
    cache = optjax.init_cache(params, len(ROWS), COLUMNS + 2, layout=layout)
    logits, start = [], 0
    for size in (5, 1, 1, 1, 1):
        part = np.s_[:, start : start + size]
        out = optjax.causal_lm(params, ids[part], attention_mask=mask[part], cache=cache)
        logits.append(out.logits)
        cache, start = out.cache, start + size
    _check(np.concatenate(logits, 1), padding, alone)
    np.testing.assert_array_equal(cache.lengths, LENGTHS)


def test_positions_follow_the_mask_unless_given(model):
    params, alone = model
    ids, mask = _batch("both")
    positions = np.cumsum(mask, axis=1) - 1
    logits = optjax.causal_lm(params, ids, attention_mask=mask, position_ids=positions).logits
    _check(logits, "both", alone)
    shifted = optjax.causal_lm(params, ids, attention_mask=mask, position_ids=positions + 1).logits
    assert not np.allclose(shifted[2], alone[2], atol=1e-2)
