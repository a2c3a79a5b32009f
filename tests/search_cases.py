"""A small model made of a seed, and calls of `generate` to it: what golden/make_search.py asks transformers, and the
tests ask us. Those two environments have numpy in common; what needs more is imported where it is used."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np

PAD, ROWS, LONGEST, NEW = 1, 4, 14, 12
CASES = 200

FIELDS = dict(
    vocab_size=47,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    ffn_dim=40,
    max_position_embeddings=48,
    word_embed_proj_dim=20,
    tie_word_embeddings=False,
    pad_token_id=PAD,
)


def weight(name: str, shape: tuple[int, ...], noise: float = 0.0) -> np.ndarray:
    """A weight of that model, float32, by its name in Hugging Face's state dict; with relative noise if told."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    value = rng.standard_normal(shape)
    if "norm" in name:
        value = name.endswith("weight") + 0.3 * value
    elif len(shape) == 1:
        value = 0.3 * value
    elif "embed" not in name:
        # Attention that tells tokens apart: else a model says one word for ever.
        value = value * shape[1] ** -0.5 * (4 if "q_proj" in name else 1)
    return (value * (1 + noise * rng.standard_normal(shape))).astype(np.float32)


@dataclass(frozen=True)
class Call:
    """Prompts ``[ROWS, T]`` of mixed lengths, padded left, and options; ``alone`` where transformers would take padding
    for a part of them, so that it is to be asked row by row."""

    ids: np.ndarray
    mask: np.ndarray
    max_new_tokens: int
    options: dict[str, Any]
    alone: bool


# Of each strategy a few kinds of call; what is among the settings' structure is the same for all calls of a kind.
PROCESSED = dict(no_repeat_ngram_size=2, bad_words_ids=[[7], [8, 9], [3, 4, 5]], suppress_tokens=[11, 12])
KINDS: dict[str, list[dict[str, Any]]] = {
    "beam": [
        dict(num_beams=4, num_return_sequences=3),
        dict(num_beams=3, early_stopping=True, num_return_sequences=2),
        dict(num_beams=2, early_stopping="never", **PROCESSED),
    ],
    "group": [
        dict(num_beams=4, num_beam_groups=2, num_return_sequences=3, **PROCESSED),
        dict(num_beams=6, num_beam_groups=3, early_stopping=True, num_return_sequences=6),
        dict(num_beams=3, num_beam_groups=3, early_stopping="never", num_return_sequences=2),
    ],
    "contrastive": [dict(top_k=4), dict(top_k=7, **PROCESSED)],
}


def calls(strategy: str) -> list[Call]:
    rng = np.random.default_rng(zlib.crc32(strategy.encode()))
    kinds = KINDS[strategy]
    return [_call(rng, strategy, kinds[i % len(kinds)], few_ends=i % len(kinds) == 0) for i in range(CASES)]


def _call(rng: np.random.Generator, strategy: str, kind: dict[str, Any], few_ends: bool) -> Call:
    v = FIELDS["vocab_size"]
    lengths = rng.integers(1, LONGEST + 1, size=ROWS)
    mask = np.arange(lengths.max()) >= (lengths.max() - lengths)[:, None]
    options = dict(kind, eos_token_id=[int(i) for i in rng.choice(v, 2 if few_ends else 9, replace=False)])
    alone = "no_repeat_ngram_size" in kind
    if alone:
        options |= dict(repetition_penalty=float(rng.uniform(0.8, 1.5)), min_new_tokens=int(rng.integers(2, 6)))
    if strategy == "contrastive":
        options["penalty_alpha"] = float(rng.uniform(0.05, 0.95))
    else:
        options["length_penalty"] = float(rng.choice([-1.0, 0.0, 0.6, 1.0, 2.0]))
    if strategy == "group":
        options["diversity_penalty"] = float(rng.uniform(0.1, 3))
    new = int(rng.integers(NEW // 2, NEW + 1))
    return Call(rng.integers(0, v, size=mask.shape), mask.astype(np.int64), new, options, alone)


def ask_transformers(model: Any, call: Call) -> tuple[np.ndarray, np.ndarray]:
    """A torch model's continuations ``[ROWS · R, NEW]``, pad after the end, and the ``sequences_scores`` of beams."""
    import torch

    lengths = call.mask.sum(1)
    asked = [(call.ids, call.mask)]
    if call.alone:
        asked = [(row[None, -n:], np.ones((1, n), np.int64)) for row, n in zip(call.ids, lengths, strict=True)]
    tokens, scores = [], []
    for ids, mask in asked:
        out = model.generate(
            torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            max_new_tokens=call.max_new_tokens,
            do_sample=False,
            pad_token_id=PAD,
            return_dict_in_generate=True,
            output_scores=True,
            **call.options,
        )
        new = out.sequences[:, ids.shape[1] :].numpy()
        tokens.append(np.pad(new, ((0, 0), (0, NEW - new.shape[1])), constant_values=PAD))
        found = getattr(out, "sequences_scores", None)
        scores.append(np.zeros(0) if found is None else found.numpy())
    return np.concatenate(tokens), np.concatenate(scores)


def our_params() -> Any:
    """That model's params."""
    import jax.numpy as jnp

    from optjax import OPTConfig
    from optjax.params import build_params

    def leaf(w: Any, layer: int | None) -> Any:
        return jnp.asarray(weight(w.hf_name(layer), w.shape))

    return build_params(OPTConfig(**FIELDS), "causal_lm", leaf)


def ask_us(params: Any, call: Call) -> tuple[np.ndarray, np.ndarray]:
    """Our answers, as those of `ask_transformers`; all calls of a kind are one program."""
    import optjax

    ids, mask = (np.pad(x, ((0, 0), (LONGEST - x.shape[1], 0))) for x in (call.ids, call.mask))
    out = optjax.generate(
        params, ids, mask, max_new_tokens=call.max_new_tokens, return_dict_in_generate=True, **call.options
    )
    new = np.pad(np.asarray(out.sequences)[:, LONGEST:], ((0, 0), (0, NEW - call.max_new_tokens)), constant_values=PAD)
    return new, np.zeros(0) if out.sequences_scores is None else np.asarray(out.sequences_scores)


def check_answers(strategy: str, golden: Any) -> None:
    """All calls of a strategy: our ids and scores are those of a golden file, wherever there is no near tie."""
    tokens, scores, sure = (golden[name] for name in ("tokens", "scores", "sure"))
    params, asked = our_params(), calls(strategy)
    ours, our_scores = (np.concatenate(each) for each in zip(*(ask_us(params, c) for c in asked), strict=True))
    last = np.concatenate([np.repeat(c.max_new_tokens, ROWS * c.options.get("num_return_sequences", 1)) for c in asked])
    early = np.take_along_axis(tokens, last[:, None] - 1, axis=1) == PAD
    assert sure.mean() > 0.99 and 0.3 < early.mean() < 0.95, "these cases do not tell much"
    np.testing.assert_array_equal(ours[sure], tokens[sure])
    if our_scores.size:
        our_scores, scores = our_scores[sure], scores[sure]
    np.testing.assert_allclose(our_scores, scores, rtol=2e-5, atol=2e-5)


def sure_rows(model: Any, twin: Any, call: Call) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What ``model`` answers, and the rows ``[ROWS · R]`` where a twin of weights a little off says the same: those
    without a near tie, which rounding might decide."""
    tokens, scores = ask_transformers(model, call)
    return tokens, scores, (tokens == ask_transformers(twin, call)[0]).all(1)
