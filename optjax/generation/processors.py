"""Score processors: pure functions that change the scores ``[B, V]`` of the next token.

They come in Hugging Face's order. Each one looks at its own setting, which is there: `process` leaves out those that
are off while tracing. To add one, add its option in `options.py`, write the function in the file of its kind, and list
it in `PROCESSORS` or `WARPERS`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

from optjax.generation.forced import min_new_tokens, suppress_tokens
from optjax.generation.history import History
from optjax.generation.options import Settings
from optjax.generation.repetition import no_repeat_ngram, repetition_penalty
from optjax.generation.sequences import bad_words
from optjax.generation.warpers import min_p, temperature, top_k, top_p, typical_p


def process(settings: Settings, history: History, scores: jax.Array) -> jax.Array:
    """Scores ``[B, V]`` after every processor that is on; what may not come is -inf."""
    for processor, option in PROCESSORS + (WARPERS if settings.do_sample else ()):
        value = getattr(settings, option)
        if value is not None and not (isinstance(value, int) and value == 0):
            with jax.named_scope(processor.__name__):
                scores = processor(settings, history, scores)
    return scores


Processor = Callable[[Settings, History, jax.Array], jax.Array]

PROCESSORS: tuple[tuple[Processor, str], ...] = (
    (repetition_penalty, "repetition_penalty"),
    (no_repeat_ngram, "no_repeat_ngram_size"),
    (bad_words, "bad_words"),
    (min_new_tokens, "min_new_tokens"),
    (suppress_tokens, "suppressed"),
)
WARPERS: tuple[tuple[Processor, str], ...] = (
    (temperature, "temperature"),
    (top_k, "top_k"),
    (top_p, "top_p"),
    (min_p, "min_p"),
    (typical_p, "typical_p"),
)
