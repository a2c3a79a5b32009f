"""Random prompts, and Hugging Face's `generate` to compare ours with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from hf_models import params_from, state_of, torch_model

import optjax
from optjax import OPTConfig, Params

PAD = 1
# What ends a row in the tests of score processors.
EOS = [3, 40]
# Logits agree to 1e-5 of the largest. Where the two best are nearer to each other than that, either may be chosen.
TOLERANCE = 1e-5

CONFIG = OPTConfig(
    vocab_size=47,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    ffn_dim=32,
    max_position_embeddings=64,
    tie_word_embeddings=False,
)


def make_pair(config: OPTConfig, seed: int = 0) -> tuple[Any, Params]:
    """A torch model whose every weight is random, and the same weights as our params."""
    model = torch_model(config, "causal_lm", seed)
    with torch.no_grad():
        # Attention that tells tokens apart, and embeddings that do not drown it: else a model says one word for ever.
        for name, weight in model.named_parameters():
            if name.endswith("q_proj.weight"):
                weight *= 4
            if name.endswith("embed_tokens.weight") and config.tie_word_embeddings:
                weight *= 0.3
    # No end of sequence but the one a test asks for.
    model.generation_config = transformers.GenerationConfig(pad_token_id=PAD)
    return model, params_from(state_of(model), config, "causal_lm")


def random_prompts(rng: np.random.Generator, rows: int, vocab_size: int, longest: int) -> list[np.ndarray]:
    """Prompts of 1 to ``longest`` ids of any kind: the pad id and the end of sequence are ids like others."""
    return [rng.integers(0, vocab_size, size=rng.integers(1, longest + 1)) for _ in range(rows)]


def pad(prompts: list[np.ndarray], where: str, rng: np.random.Generator, vocab_size: int) -> tuple[np.ndarray, ...]:
    """ids and mask, with padding ``left``, ``right`` or in ``holes`` among the tokens; what stands there is random."""
    width = max(map(len, prompts)) + (where == "holes")
    ids = rng.integers(0, vocab_size, size=(len(prompts), width))
    mask = np.zeros(ids.shape, np.int64)
    for row, prompt in enumerate(prompts):
        n = len(prompt)
        if where == "holes":
            columns = np.sort(rng.choice(width, n, replace=False))
        else:
            columns = np.arange(n) + (width - n if where == "left" else 0)
        ids[row, columns], mask[row, columns] = prompt, 1
    return ids, mask


@dataclass
class Continuation:
    """What transformers made of prompts.

    Attributes:
      tokens: ``[B, N]``, pad after the end.
      scores: ``[B, N, V]`` float32, processed; NaN after the end.
      sure: ``[B]``, the number of steps before the first one whose two best scores are too near to tell apart.
    """

    tokens: np.ndarray
    scores: np.ndarray
    sure: np.ndarray


def hf_generate(model: Any, prompts: list[np.ndarray], max_new_tokens: int, **options: Any) -> Continuation:
    """transformers' greedy continuations of unpadded prompts: a batch for each length there is."""
    lengths = np.array([len(prompt) for prompt in prompts])
    tokens = np.full((len(prompts), max_new_tokens), PAD)
    scores = np.full((len(prompts), max_new_tokens, model.config.vocab_size), np.nan, np.float32)
    for length in np.unique(lengths):
        rows = np.flatnonzero(lengths == length)
        ids = np.stack([prompts[row] for row in rows])
        tokens[rows], scores[rows] = _hf_generate_batch(model, ids, np.ones_like(ids), max_new_tokens, **options)
    return _continuation(tokens, scores, options)


def hf_generate_padded(
    model: Any, ids: np.ndarray, mask: np.ndarray, max_new_tokens: int, **options: Any
) -> Continuation:
    """transformers' greedy continuations of prompts padded on the left, as one batch."""
    return _continuation(*_hf_generate_batch(model, ids, mask, max_new_tokens, **options), options)


def _hf_generate_batch(model: Any, ids: np.ndarray, mask: np.ndarray, max_new_tokens: int, **options: Any):
    out = model.generate(
        torch.from_numpy(ids),
        attention_mask=torch.from_numpy(mask),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_scores=True,
        **{name: value for name, value in options.items() if value != []},
    )
    new = out.sequences[:, ids.shape[1] :].numpy()
    tokens = np.full((len(ids), max_new_tokens), PAD)
    tokens[:, : new.shape[1]] = new
    scores = np.full((len(ids), max_new_tokens, model.config.vocab_size), np.nan, np.float32)
    scores[:, : len(out.scores)] = np.stack([step.numpy() for step in out.scores], axis=1)
    return tokens, scores


def _continuation(tokens: np.ndarray, scores: np.ndarray, options: dict[str, Any]) -> Continuation:
    ended = np.isin(tokens, options.get("eos_token_id", []))
    after = np.cumsum(ended, axis=1) - ended > 0
    scores[after] = np.nan
    best = np.sort(scores, axis=-1)[..., ::-1]
    usual = np.isfinite(scores) & (scores > np.finfo(np.float32).min)
    near = best[..., 0] - best[..., 1] < TOLERANCE * np.abs(np.where(usual, scores, 0)).max()
    sure = np.where(near.any(1), near.argmax(1), tokens.shape[1])
    return Continuation(tokens, scores, sure)


def assert_same_tokens(ours: Any, theirs: Continuation) -> None:
    """Every row equal up to its first near tie; and there are hardly any of those."""
    ours = np.asarray(ours)
    assert ours.shape == theirs.tokens.shape
    compared = np.arange(ours.shape[1]) < theirs.sure[:, None]
    assert compared.all(1).mean() >= 0.97, "too many near ties for a test: choose another seed"
    differ = ((ours != theirs.tokens) & compared).any(1)
    assert not differ.any(), f"row {differ.argmax()}: {ours[differ.argmax()]}, not {theirs.tokens[differ.argmax()]}"


def check_option(
    case: Any, usual: np.ndarray, where: str = "left", changes: int = 10, theirs: dict | None = None, **options: Any
) -> np.ndarray:
    """Ours equals transformers', and the option does change at least so many of the rows that come without it.

    ``case`` is a model of each kind, prompts and a random generator; ``theirs`` what only transformers is told.
    """
    model, params, prompts, rng = case
    n = usual.shape[1]
    options = {"eos_token_id": EOS} | options
    expected = hf_generate(model, prompts, n, **(options | (theirs or {})))
    assert (expected.tokens != usual).any(1).sum() >= changes, "the option hardly shows: a test of nothing"
    ids, mask = pad(prompts, where, rng, params.config.vocab_size)
    ours = optjax.generate(params, ids, mask, max_new_tokens=n, **options)
    assert_same_tokens(np.asarray(ours)[:, ids.shape[1] :], expected)
    return expected.tokens
