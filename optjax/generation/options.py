"""What `generate` can be told, with Hugging Face's names and meanings, checked and turned into arrays.

A number (a temperature, a penalty) is a traced leaf: changing it compiles nothing. Whether an option is used at all is
part of the pytree's structure: what is off costs nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypedDict

import jax
import numpy as np

from optjax.config import OPTConfig
from optjax.generation.reader import Reader


class Options(TypedDict, total=False):
    """The keyword options of `generate` and `stream` (transformers' GenerationConfig has the same).

    Attributes:
      do_sample: draw each token; otherwise the most probable one is taken, and the sampling options do nothing.
      temperature: divides the scores before sampling; above 0. 1 by default.
      top_k: sample among the k most probable (ties with the k-th included); 0 or None for all. 50 by default.
      top_p: sample from the smallest set of most probable tokens whose mass reaches top_p. Off by default.
      min_p: leave out tokens less probable than min_p × the most probable one. Off by default.
      typical_p: locally typical sampling (Meister et al. 2022) with this mass. Off by default.
      repetition_penalty: divides positive and multiplies negative scores of every token that the row holds already
        (Keskar et al. 2019). Above 0; 1 is off.
      no_repeat_ngram_size: no n-gram of this size comes twice in a row's prompt and continuation. 0 is off.
      min_new_tokens: no end-of-sequence token before this many.
      bad_words_ids: token sequences that may not be completed. A sequence that is just an end-of-sequence id is left
        out, as in transformers; use ``eos_token_id=[]`` or ``suppress_tokens`` for that.
      suppress_tokens: ids that never come, such as those a tokenizer does not have (Hugging Face #18268).
      eos_token_id: one id, several, or ``[]`` for none; the config's by default.
      pad_token_id: what follows the end of a row; the config's by default.
      num_return_sequences: samples a prompt; the prompt is computed once. Needs do_sample where above 1.
      output_scores: keep the processed scores of every step; `generate` only.
    """

    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float
    no_repeat_ngram_size: int
    min_new_tokens: int
    bad_words_ids: Sequence[Sequence[int]] | None
    suppress_tokens: Sequence[int] | None
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
    num_return_sequences: int
    output_scores: bool


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "eos_ids",
        "pad_id",
        "min_new_tokens",
        "repetition_penalty",
        "bad_words",
        "suppressed",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "typical_p",
    ],
    meta_fields=["do_sample", "no_repeat_ngram_size", "num_return_sequences", "output_logprobs", "output_scores"],
)
@dataclasses.dataclass(frozen=True)
class Settings:
    """Checked `Options` as a pytree. None where an option is off.

    Attributes:
      eos_ids: ``[n]`` int32.
      bad_words: ``[n, W]`` int32, each aligned right, -1 before its first id.
      suppressed: ``[V]`` bool.
    """

    eos_ids: Any
    pad_id: Any
    min_new_tokens: Any = None
    repetition_penalty: Any = None
    bad_words: Any = None
    suppressed: Any = None
    temperature: Any = None
    top_k: Any = None
    top_p: Any = None
    min_p: Any = None
    typical_p: Any = None
    do_sample: bool = False
    no_repeat_ngram_size: int = 0
    num_return_sequences: int = 1
    output_logprobs: bool = False
    output_scores: bool = False


def as_settings(config: OPTConfig, options: Mapping[str, Any]) -> Settings:
    """Options as `Settings`.

    Raises:
      ValueError: unknown options (with the nearest known name) and impossible values, all of them in one message.
    """
    read = Reader(options, Options.__annotations__, config.vocab_size)
    do_sample, output_scores = read.flag("do_sample"), read.flag("output_scores")
    samples = read.count("num_return_sequences", 1, low=1)
    if samples > 1 and not do_sample:
        read.problems.append(f"num_return_sequences={samples} without do_sample=True would repeat one greedy answer")

    if options.get("eos_token_id") is not None:
        eos_ids = read.ids("eos_token_id")
    else:
        # What the config says may lie outside a small vocabulary: then no token ends a row.
        eos = config.eos_token_id
        eos_ids = [i for i in ((eos,) if isinstance(eos, int) else eos or ()) if 0 <= i < config.vocab_size]
    pad_id = read.one_id("pad_token_id")
    if pad_id is None:
        pad_id = config.pad_token_id if config.pad_token_id is not None else (eos_ids or [0])[0]

    ngram = read.count("no_repeat_ngram_size", 0)
    minimum = read.count("min_new_tokens", 0)
    penalty = read.number("repetition_penalty", lambda x: x > 0, "above 0", off=1.0)
    bad = [word for word in read.lists_of_ids("bad_words_ids") if not (len(word) == 1 and word[0] in eos_ids)]
    suppressed = np.isin(np.arange(config.vocab_size), read.ids("suppress_tokens"))
    if suppressed.all():
        read.problems.append("suppress_tokens leaves no token at all")

    # Checked also where do_sample is off and they do nothing.
    unit = "above 0 and at most 1"
    above = "above 0 (for the most probable token use do_sample=False)"
    top_k = read.count("top_k", 50, none=0)
    sampling: dict[str, Any] = {
        "temperature": read.number("temperature", lambda x: x > 0, above, off=1.0),
        "top_k": np.int32(min(top_k, config.vocab_size)) if top_k else None,
        "top_p": read.number("top_p", lambda x: 0 < x <= 1, unit, off=1.0),
        "min_p": read.number("min_p", lambda x: 0 <= x <= 1, "from 0 to 1"),
        "typical_p": read.number("typical_p", lambda x: 0 < x <= 1, unit, off=1.0),
    }
    if read.problems:
        raise ValueError("generate cannot do this: " + "; ".join(read.problems))

    return Settings(
        eos_ids=np.asarray(eos_ids, np.int32),
        pad_id=np.int32(pad_id),
        min_new_tokens=np.int32(min(minimum, 2**31 - 1)) if minimum and eos_ids else None,
        repetition_penalty=penalty,
        bad_words=_right_aligned(bad) if bad else None,
        suppressed=suppressed if suppressed.any() else None,
        do_sample=do_sample,
        # A longer n-gram does not fit into a row, let alone twice.
        no_repeat_ngram_size=ngram if ngram <= config.max_position_embeddings else 0,
        num_return_sequences=samples,
        output_scores=output_scores,
        **(sampling if do_sample else {}),
    )


def _right_aligned(words: list[list[int]]) -> np.ndarray:
    width = max(map(len, words))
    return np.array([[-1] * (width - len(word)) + word for word in words], np.int32)
