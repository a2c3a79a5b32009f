"""How tokens are guessed, where they are: the options of speculative decoding and prompt lookup."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax

from optjax.config import OPTConfig
from optjax.generation.buckets import bucket
from optjax.generation.reader import Reader
from optjax.params import Params


@partial(jax.tree_util.register_dataclass, data_fields=["assistant"], meta_fields=["width", "max_ngram"])
@dataclasses.dataclass(frozen=True)
class Speculation:
    """Guesses of a smaller model, or by prompt lookup.

    Attributes:
      assistant: the smaller model; None for prompt lookup.
      width: γ, tokens guessed at a time.
      max_ngram: of prompt lookup, the longest n-gram that is looked for.
    """

    assistant: Params | None
    width: int
    max_ngram: int


def read_speculation(read: Reader, config: OPTConfig, max_new_tokens: int | None = None) -> Speculation | None:
    """The options about it; None where none is given. What is wrong with them goes to the reader.

    A round guesses no more tokens than there is room for, whatever was asked for.
    """
    given = {name for name in _NAMES if read.options.get(name) is not None}
    width = read.count("num_assistant_tokens", 5, low=1)
    lookup = read.count("prompt_lookup_num_tokens", 1, low=1)
    ngram = read.count("max_matching_ngram_size", 2, low=1)
    assistant = read.options.get("assistant_model")
    if {"assistant_model", "prompt_lookup_num_tokens"} <= given:
        read.problems.append("assistant_model and prompt_lookup_num_tokens both guess tokens; give one")
    for name, needed in (
        ("num_assistant_tokens", "assistant_model"),
        ("max_matching_ngram_size", "prompt_lookup_num_tokens"),
    ):
        if name in given and needed not in given:
            read.problems.append(f"{name} says how {needed} works, which is not given")
    if max_new_tokens is not None:
        lookup, width = (min(n, bucket(max_new_tokens)) for n in (lookup, width))
    if assistant is None:
        return Speculation(None, lookup, ngram) if "prompt_lookup_num_tokens" in given else None
    if not isinstance(assistant, Params) or assistant.head != "causal_lm":
        what = f"params with the head {assistant.head!r}" if isinstance(assistant, Params) else type(assistant).__name__
        read.problems.append(f"assistant_model should be params with the causal_lm head, not {what}")
        return None
    if assistant.config.vocab_size != config.vocab_size:
        sizes = f"{assistant.config.vocab_size} ids and the model's {config.vocab_size}"
        read.problems.append(f"the assistant_model's vocabulary has {sizes}: they should be the same")
    return Speculation(assistant, width, ngram)


_NAMES = ("assistant_model", "num_assistant_tokens", "prompt_lookup_num_tokens", "max_matching_ngram_size")
