"""The decoder and its heads against transformers' torch models, over configurations drawn at random."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import pytest
import torch
from hf_models import assert_close, padded_masks, params_from, random_config, state_of, torch_model

import optjax
from optjax import OPTConfig

DRAWS = range(44)


@dataclasses.dataclass
class Draw:
    """One random configuration and one random call of it."""

    config: OPTConfig
    ids: np.ndarray
    mask: np.ndarray | None
    positions: np.ndarray | None
    use_embeds: bool
    stacked: bool
    layout: str
    chunks: list[int]
    spare: int
    head: str
    rng: np.random.Generator

    @property
    def real(self) -> np.ndarray:
        return np.ones(self.ids.shape, int) if self.mask is None else self.mask

    @property
    def rows(self) -> int:
        return len(self.ids)


def draw(seed: int) -> Draw:
    rng = np.random.default_rng(seed)
    config = random_config(rng)
    rows, length = int(rng.choice([1, 2, 5])), int(rng.integers(3, 10))
    mask = padded_masks(rng, rows, length) if rng.random() < 0.75 else None
    ids = rng.integers(2, config.vocab_size, size=(rows, length))
    if mask is not None:
        ids = np.where(mask, ids, 1)
    positions = rng.integers(0, config.max_position_embeddings, size=(rows, length)) if rng.random() < 0.25 else None
    size = int(rng.integers(1, length + 1))
    chunks = [size] * (length // size) + ([length % size] if length % size else [])
    rng.shuffle(chunks)
    return Draw(
        config=config,
        ids=ids,
        mask=mask,
        positions=positions,
        use_embeds=bool(rng.random() < 0.3),
        stacked=bool(rng.random() < 0.5),
        layout=str(rng.choice(["heads", "flat"])),
        chunks=chunks,
        spare=int(rng.integers(0, 4)),
        head=str(rng.choice(["sequence_classification", "question_answering"])),
        rng=rng,
    )


def arguments(draw: Draw, model) -> tuple[dict, dict]:
    """The call for us and for Hugging Face."""
    ours, theirs = {}, {}
    if draw.use_embeds:
        embeds = model.get_input_embeddings()(torch.from_numpy(draw.ids)).detach()
        ours["inputs_embeds"] = embeds.numpy()
        theirs["inputs_embeds"] = embeds
    else:
        ours["ids"] = draw.ids
        theirs["input_ids"] = torch.from_numpy(draw.ids)
    if draw.mask is not None:
        ours["attention_mask"] = draw.mask
        theirs["attention_mask"] = torch.from_numpy(draw.mask)
    if draw.positions is not None:
        ours["position_ids"] = draw.positions
        theirs["position_ids"] = torch.from_numpy(draw.positions)
    return ours, theirs


@pytest.mark.parametrize("seed", DRAWS)
def test_language_model(seed):
    d = draw(seed)
    model = torch_model(d.config, "causal_lm", seed)
    params = params_from(state_of(model), d.config, "causal_lm", d.stacked)
    ours, theirs = arguments(d, model)
    # Labels where a real token follows a real one; what a masked query predicts is nobody's business.
    labelled = d.real * np.roll(d.real, 1, axis=1) * (d.rng.random(d.ids.shape) < 0.8)
    labels = np.where(labelled, d.ids, -100)

    with torch.no_grad():
        expected = model(**theirs, labels=torch.from_numpy(labels), output_hidden_states=True, output_attentions=True)
    out = optjax.causal_lm(params, **ours, labels=labels, output_hidden_states=True, output_attentions=True)

    assert_close(out.logits, expected.logits, d.real)
    if labelled[:, 1:].any():
        assert_close(out.loss, expected.loss)
    else:
        assert out.loss == 0
    assert len(out.hidden_states) == len(expected.hidden_states) == d.config.num_hidden_layers + 1
    for a, b in zip(out.hidden_states, expected.hidden_states, strict=True):
        assert_close(a, b, d.real)
    for a, b in zip(out.attentions, expected.attentions, strict=True):
        assert_close(np.moveaxis(a, 1, 2), np.moveaxis(b.numpy(), 1, 2), d.real)

    # The same in chunks of random sizes through a cache with columns to spare.
    cache = optjax.init_cache(params, d.rows, d.ids.shape[1] + d.spare, layout=d.layout)
    logits, start = [], 0
    for size in d.chunks:
        chunk = {name: value[:, start : start + size] for name, value in ours.items()}
        step = optjax.causal_lm(params, **chunk, cache=cache)
        cache = step.cache
        logits.append(step.logits)
        start += size
    assert_close(np.concatenate(logits, axis=1), expected.logits, d.real)
    assert int(cache.index) == d.ids.shape[1]
    np.testing.assert_array_equal(cache.lengths, d.real.sum(1))
    np.testing.assert_array_equal(cache.mask[:, : d.ids.shape[1]], d.real != 0)


@pytest.mark.parametrize("seed", DRAWS)
def test_other_heads(seed):
    d = draw(seed)
    model = torch_model(d.config, d.head, seed)
    params = params_from(state_of(model), d.config, d.head, not d.stacked)
    ours, theirs = arguments(d, model)

    if d.head == "question_answering":
        length = d.ids.shape[1]
        spans = d.rng.integers(0, length + 3, size=(2, d.rows))
        spans[:, 0] = 0, length - 1  # one inside at least
        with torch.no_grad():
            positions = dict(zip(("start_positions", "end_positions"), torch.from_numpy(spans), strict=True))
            expected = model(**theirs, **positions)
        out = optjax.question_answering(params, **ours, start_positions=spans[0], end_positions=spans[1])
        assert_close(out.loss, expected.loss)
        assert_close(out.start_logits, expected.start_logits, d.real)
        assert_close(out.end_logits, expected.end_logits, d.real)
        return

    n = d.config.num_labels
    kind = d.rng.choice(["regression", "single_label_classification", "multi_label_classification"])
    labels = {
        "regression": d.rng.standard_normal((d.rows, n)).astype(np.float32),
        "single_label_classification": d.rng.integers(0, n, size=d.rows),
        "multi_label_classification": d.rng.integers(0, 2, size=(d.rows, n)).astype(np.float32),
    }[kind]
    # Hugging Face looks for pads in the ids alone. Where it has none to look at, the last real column is picked here.
    last = d.ids.shape[1] - 1 - np.argmax(d.real[:, ::-1], axis=1)
    model.config.problem_type = kind
    with torch.no_grad():
        expected = model(**theirs, labels=torch.from_numpy(labels))
        hidden = model.model(**theirs).last_hidden_state[torch.arange(d.rows), torch.from_numpy(last)]
    out = optjax.sequence_classification(params, **ours, labels=labels, problem_type=kind)
    assert_close(out.logits, model.score(hidden).detach())
    if "input_ids" in theirs:
        assert_close(out.logits, expected.logits)
        assert_close(out.loss, expected.loss)


def test_every_switch_is_drawn_often():
    seen = collections.Counter()
    for seed in DRAWS:
        d = draw(seed)
        c = d.config
        seen["projections", c.embed_dim < c.hidden_size, c.embed_dim > c.hidden_size] += 1
        seen["final norm", c.do_layer_norm_before, c.has_final_layer_norm] += 1
        for name in ("activation_function", "enable_bias", "layer_norm_elementwise_affine", "tie_word_embeddings"):
            seen[name, getattr(c, name)] += 1
        seen["heads", min(c.num_attention_heads, 3)] += 1
        for name in ("use_embeds", "stacked", "layout", "head", "rows"):
            seen[name, getattr(d, name)] += 1
        seen["layout", d.layout, d.rows == 1] += 1
        seen["masked", d.mask is not None] += 1
        seen["positions", d.positions is not None] += 1
        seen["chunks", min(len(d.chunks), 3)] += 1
    assert len(seen) == 3 + 3 + 8 + 3 * 2 + 3 + 4 * 2 + 3 + 4 + 2 * 2 + 3
    assert min(seen.values()) >= 3, seen
