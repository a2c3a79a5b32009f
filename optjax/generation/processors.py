"""Score processors: pure functions that change the scores ``[B, V]`` of the next token.

They come in Hugging Face's order. Each one looks at its own setting, which is there: `process` leaves out those that
are off while tracing. To add one, add its option in `options.py`, check it in `settings.py`, write the function in the
file of its kind, and list it in `PROCESSORS` or `WARPERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optjax.generation import forced, repetition, sequences, warpers
from optjax.generation.history import History
from optjax.generation.settings import Settings


def process(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    """Scores ``[B, V]`` after every processor that is on; what may not come is -inf."""
    for processor, option in PROCESSORS + (WARPERS if settings.do_sample else ()) + LAST:
        if _is_on(getattr(settings, option)):
            with jax.named_scope(processor.__name__):
                scores = processor(settings, history, scores)
    return scores


def _is_on(value: Any) -> bool:
    return value is not None and not (isinstance(value, int | tuple) and not value)


def remove_invalid_values(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    return jnp.nan_to_num(scores)


def own_processors(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    """The functions of the caller, who sees a row's tokens at the right end, as in a batch padded on the left."""
    columns = jnp.arange(history.tokens.shape[1])
    real = (columns >= history.first[:, None]) & (columns < history.count)
    ids = jnp.roll(jnp.where(real, history.tokens, settings.pad_id), -history.count, axis=1)
    for function in settings.logits_processor:
        scores = function(ids, scores).astype(scores.dtype)
    return scores


def check_own_processors(settings: Settings, batch_size: int, columns: int, vocab_size: int) -> None:
    """ValueError if a function of the caller does not return scores. It is traced, and nothing is compiled."""
    rows = settings.num_return_sequences if settings.beams is None else settings.beams.group_size
    shape = batch_size * rows, vocab_size
    ids, scores = jax.ShapeDtypeStruct((shape[0], columns), jnp.int32), jax.ShapeDtypeStruct(shape, jnp.float32)
    for function in settings.logits_processor:
        made = jax.eval_shape(function, ids, scores)
        if getattr(made, "shape", None) != shape or not jnp.issubdtype(made.dtype, jnp.floating):
            got = f"{made.dtype} {made.shape}" if hasattr(made, "shape") else type(made).__name__
            raise ValueError(f"logits_processor should return scores of shape {shape}, got {got}")


def renormalize_logits(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(scores, axis=-1)


Processor = Callable[[Settings, History, jax.Array], jax.Array]

PROCESSORS: tuple[tuple[Processor, str], ...] = (
    (sequences.sequence_bias, "sequence_bias"),
    (repetition.encoder_repetition_penalty, "encoder_repetition_penalty"),
    (repetition.repetition_penalty, "repetition_penalty"),
    (repetition.no_repeat_ngram, "no_repeat_ngram_size"),
    (repetition.encoder_no_repeat_ngram, "encoder_no_repeat_ngram_size"),
    (sequences.bad_words, "bad_words"),
    (forced.min_length, "min_length"),
    (forced.min_new_tokens, "min_new_tokens"),
    (forced.forced_bos, "forced_bos"),
    (forced.forced_eos, "forced_eos"),
    (remove_invalid_values, "remove_invalid_values"),
    (forced.exponential_decay_length_penalty, "decay"),
    (forced.suppress_tokens, "suppressed"),
    (forced.begin_suppress_tokens, "begin_suppressed"),
    (own_processors, "logits_processor"),
)
WARPERS: tuple[tuple[Processor, str], ...] = (
    (warpers.temperature, "temperature"),
    (warpers.top_k, "top_k"),
    (warpers.top_p, "top_p"),
    (warpers.min_p, "min_p"),
    (warpers.typical_p, "typical_p"),
    (warpers.epsilon_cutoff, "epsilon_cutoff"),
    (warpers.eta_cutoff, "eta_cutoff"),
)
LAST: tuple[tuple[Processor, str], ...] = ((renormalize_logits, "renormalize_logits"),)
