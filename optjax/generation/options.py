"""What `generate` can be told, with Hugging Face's names and meanings, checked and turned into arrays.

A number (a temperature, a penalty) is a traced leaf: changing it compiles nothing. Whether an option is used at all is
part of the pytree's structure: what is off costs nothing.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypedDict

import jax
import numpy as np

from optjax.config import OPTConfig


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
    problems = [_unknown(name) for name in options if name not in Options.__annotations__]
    get = dict(top_k=50, temperature=1.0, repetition_penalty=1.0) | dict(options)
    v = config.vocab_size

    def number(name: str, ok, wanted: str, off: Any = None):
        value = get.get(name)
        if value is None or (off is not None and value == off):
            return None
        if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not ok(value):
            problems.append(f"{name} should be {wanted}, not {value!r}")
            return None
        return value

    def flag(name: str) -> bool:
        value = get.get(name, False)
        if not isinstance(value, bool | np.bool_):
            problems.append(f"{name} should be True or False, not {value!r}")
        return bool(value)

    def count(name: str, low: int, default: int) -> int:
        value = get.get(name, default)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < low:
            problems.append(f"{name} should be an integer of at least {low}, not {value!r}")
            return default
        return int(value)

    def ids(name: str, value: Any) -> list[int]:
        listed = [value] if isinstance(value, int | np.integer) else list(value)
        for i in listed:
            if isinstance(i, bool) or not isinstance(i, int | np.integer) or not 0 <= i < v:
                problems.append(f"{name} holds {i!r}, which is no id of the vocabulary of {v}")
        return [i for i in listed if isinstance(i, int | np.integer) and 0 <= i < v]

    do_sample, output_scores = flag("do_sample"), flag("output_scores")
    eos = get["eos_token_id"] if get.get("eos_token_id") is not None else config.eos_token_id
    # What the config says may lie outside a small vocabulary: then no token ends a row. What the caller says may not.
    if get.get("eos_token_id") is None:
        eos_listed = [eos] if isinstance(eos, int) else list(eos or ())
        eos_ids = [i for i in eos_listed if 0 <= i < v]
    else:
        eos_ids = ids("eos_token_id", eos)
    pad = get.get("pad_token_id")
    if pad is not None:
        ids("pad_token_id", pad)
    elif config.pad_token_id is not None:
        pad = config.pad_token_id
    else:
        pad = eos_ids[0] if eos_ids else 0
    samples = count("num_return_sequences", 1, 1)
    if samples > 1 and not do_sample:
        problems.append(f"num_return_sequences={samples} without do_sample=True would repeat one greedy answer")
    bad = [ids("bad_words_ids", word) for word in get.get("bad_words_ids") or ()]
    if any(not word for word in bad):
        problems.append("bad_words_ids holds an empty sequence")
    bad = [word for word in bad if word and not (len(word) == 1 and word[0] in eos_ids)]
    suppressed = ids("suppress_tokens", list(get.get("suppress_tokens") or ()))
    ngram = count("no_repeat_ngram_size", 0, 0)
    minimum = count("min_new_tokens", 0, 0)
    penalty = number("repetition_penalty", lambda x: x > 0, "above 0", off=1.0)
    unit = "above 0 and at most 1"
    sampling = {
        "temperature": number(
            "temperature", lambda x: x > 0, "above 0 (for the most probable token use do_sample=False)", off=1.0
        ),
        "top_k": number("top_k", lambda x: isinstance(x, int | np.integer) and x > 0, "a positive integer", off=0),
        "top_p": number("top_p", lambda x: 0 < x <= 1, unit, off=1.0),
        "min_p": number("min_p", lambda x: 0 <= x <= 1, "from 0 to 1"),
        "typical_p": number("typical_p", lambda x: 0 < x <= 1, unit, off=1.0),
    }
    if problems:
        raise ValueError("generate cannot do this: " + "; ".join(problems))

    if not do_sample:
        sampling = dict.fromkeys(sampling)
    as_type = {name: np.int32 if name == "top_k" else np.float32 for name in sampling}
    return Settings(
        eos_ids=np.asarray(eos_ids, np.int32),
        pad_id=np.int32(pad),
        min_new_tokens=np.int32(minimum) if minimum and eos_ids else None,
        repetition_penalty=None if penalty is None else np.float32(penalty),
        bad_words=_right_aligned(bad) if bad else None,
        suppressed=np.isin(np.arange(v), suppressed) if suppressed else None,
        do_sample=do_sample,
        no_repeat_ngram_size=ngram,
        num_return_sequences=samples,
        output_scores=output_scores,
        **{name: None if value is None else as_type[name](value) for name, value in sampling.items()},
    )


def _right_aligned(words: list[list[int]]) -> np.ndarray:
    width = max(map(len, words))
    return np.array([[-1] * (width - len(word)) + word for word in words], np.int32)


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name, Options.__annotations__, n=1)
    return f"unknown option {name!r}" + (f" (did you mean {near[0]!r}?)" if near else "")
