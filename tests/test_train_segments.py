"""Documents side by side in a row, told apart by segment_ids, are trained on as each would be alone."""

from __future__ import annotations

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optjax
from optjax import OPTConfig, init_params
from optjax.kernels.choice import interpreted
from optjax.sharding import make_mesh
from optjax.train.backward import loss_and_gradients
from optjax.train.options import StepOptions
from optjax.train.placing import place_batch

CONFIG = OPTConfig(
    vocab_size=40,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    ffn_dim=24,
    max_position_embeddings=12,
    dropout=0.0,
    init_std=0.3,
)
T = 12
# Lengths of the documents of each row; what is left of a row is padding.
ROWS = [[5, 4, 3], [7, 2], [12], [1, 1, 9]]

# A label of the last token but one is the last token, and that of the last one is the next document's first, which
# counts in row 0 and is left out elsewhere.
rng = np.random.default_rng(1)
IDS = rng.integers(3, CONFIG.vocab_size, (len(ROWS), T)).astype(np.int32)
SEGMENTS, LABELS = np.zeros_like(IDS), np.full_like(IDS, -100)
DOCUMENTS = []
for row, lengths in enumerate(ROWS):
    start = 0
    for number, length in enumerate(lengths, 1):
        end = start + length
        SEGMENTS[row, start:end] = number
        LABELS[row, start : end - 1] = IDS[row, start + 1 : end]
        if row == 0 and number < len(lengths):
            LABELS[row, end - 1] = IDS[row, end]
        DOCUMENTS.append((IDS[row, start:end], LABELS[row, start:end]))
        start = end
BATCH = {"input_ids": IDS, "labels": LABELS, "segment_ids": SEGMENTS}
_ours = jax.jit(loss_and_gradients, static_argnums=3)


def of_documents(params):
    """Each document in a row of its own, with nothing but padding after it: the mean over all tokens that count."""
    count = len(DOCUMENTS)
    ids, labels, mask = np.ones((count, T), np.int32), np.full((count, T), -100, np.int32), np.zeros((count, T), bool)
    for i, (tokens, following) in enumerate(DOCUMENTS):
        ids[i, : len(tokens)], labels[i, : len(tokens)], mask[i, : len(tokens)] = tokens, following, True

    def loss(params):
        logits = optjax.causal_lm(params, ids, attention_mask=mask, attn_implementation="eager").logits
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, np.maximum(labels, 0))
        return jnp.where(labels >= 0, nll, 0.0).sum() / (labels >= 0).sum()

    return jax.value_and_grad(loss)(params)


@pytest.fixture(scope="module")
def expected():
    return of_documents(init_params(CONFIG, jax.random.key(0), stacked=True))


@pytest.mark.parametrize(
    "on, options",
    [
        (None, StepOptions()),
        (None, StepOptions(micro_batches=2, remat="full", query_block=4)),
        ("mesh", StepOptions(query_block=4, loss_chunks=3)),
        ("tpu", StepOptions(attn_implementation="flash", remat="full")),
        ("gpu", StepOptions(attn_implementation="flash")),
    ],
    ids=["eager", "blocks", "mesh", "splash", "triton"],
)
def test_a_row_of_documents_is_each_alone(expected, on, options):
    mesh = make_mesh("fsdp=2,sequence=2,tensor=2", jax.devices()[:8]) if on == "mesh" else None
    params = init_params(CONFIG, jax.random.key(0), stacked=True, mesh=mesh)
    with interpreted(on) if on in ("tpu", "gpu") else contextlib.nullcontext():
        loss, gradients = _ours(params, place_batch(BATCH, params, len(IDS)), None, options)
    assert float(loss) == pytest.approx(float(expected[0]), rel=1e-5)
    largest = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(expected[1]))
    for (path, one), other in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(expected[1]), strict=True):
        scale = max(float(np.abs(other).max()), 1e-2 * largest)
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * scale, err_msg=jax.tree_util.keystr(path))
