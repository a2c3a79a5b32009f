"""`generate`'s options checked and turned into arrays.

A number (a temperature, a penalty) is a traced leaf: changing it compiles nothing. Whether an option is used at all is
part of the pytree's structure: what is off costs nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np

from optjax.cache import cache_dtype
from optjax.config import OPTConfig
from optjax.generation.guidance import Guidance
from optjax.generation.options import Options
from optjax.generation.prefix import Prefix
from optjax.generation.reader import LEAST, Reader
from optjax.generation.search import Beams, Contrastive, read_search
from optjax.generation.speculation import Speculation, read_speculation
from optjax.generation.stop_strings import StopTable, stop_table
from optjax.kernels.choice import IMPLEMENTATIONS


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "eos_ids",
        "pad_id",
        "min_new_tokens",
        "min_length",
        "repetition_penalty",
        "encoder_repetition_penalty",
        "bad_words",
        "sequence_bias",
        "forced_bos",
        "forced_eos",
        "decay",
        "suppressed",
        "begin_suppressed",
        "stop",
        "speculation",
        "guidance",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "typical_p",
        "epsilon_cutoff",
        "eta_cutoff",
        "beams",
        "contrastive",
        "prefix",
    ],
    meta_fields=[
        "do_sample",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "remove_invalid_values",
        "logits_processor",
        "renormalize_logits",
        "num_return_sequences",
        "output_logprobs",
        "output_scores",
        "cache_dtype",
        "prefill_chunk_size",
        "attn_implementation",
    ],
)
@dataclasses.dataclass(frozen=True)
class Settings:
    """Checked `Options` as a pytree. None where an option is off.

    Attributes:
      eos_ids: ``[n]`` int32.
      bad_words: ``[n, W]`` int32, each aligned right, -1 before its first id.
      sequence_bias: such sequences, and their biases ``[n]`` float32.
      forced_eos: ids ``[n]`` int32, and the number of tokens before the last one.
      decay: the start and the factor of exponential_decay_length_penalty.
      suppressed, begin_suppressed: ``[V]`` bool.
      stop: what each token does to the search for stop_strings.
      speculation: how tokens are guessed; None for one token a pass.
      guidance: the other branch of classifier-free guidance, if any.
      prefix: what stands before all prompts, read before.
    """

    eos_ids: Any
    pad_id: Any
    min_new_tokens: Any = None
    min_length: Any = None
    repetition_penalty: Any = None
    encoder_repetition_penalty: Any = None
    bad_words: Any = None
    sequence_bias: Any = None
    forced_bos: Any = None
    forced_eos: Any = None
    decay: Any = None
    suppressed: Any = None
    begin_suppressed: Any = None
    stop: StopTable | None = None
    speculation: Speculation | None = None
    guidance: Guidance | None = None
    temperature: Any = None
    top_k: Any = None
    top_p: Any = None
    min_p: Any = None
    typical_p: Any = None
    epsilon_cutoff: Any = None
    eta_cutoff: Any = None
    beams: Beams | None = None
    contrastive: Contrastive | None = None
    prefix: Prefix | None = None
    do_sample: bool = False
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    remove_invalid_values: bool = False
    logits_processor: tuple[Callable[..., Any], ...] = ()
    renormalize_logits: bool = False
    num_return_sequences: int = 1
    output_logprobs: bool = False
    output_scores: bool = False
    cache_dtype: Any = None
    prefill_chunk_size: int | None = None
    attn_implementation: str = "auto"

    @property
    def attention_of_steps(self) -> str:
        """``attn_implementation`` of all passes after the prompts: a kernel asked for is taken where there is one."""
        return "eager" if self.attn_implementation == "eager" else "auto"

    @property
    def candidates(self) -> int:
        """Of beam search: the continuations of each beam that are looked at, so that one may go on, whichever end."""
        return max(2, 1 + len(self.eos_ids))


def as_settings(config: OPTConfig, options: Mapping[str, Any], max_new_tokens: int | None = None) -> Settings:
    """Options as `Settings`; some need to know how many tokens there will be.

    Raises:
      ValueError: unknown options (with the nearest known name) and impossible values, all of them in one message.
    """
    read = Reader(options, Options.__annotations__, config.vocab_size)
    do_sample, output_scores = read.flag("do_sample"), read.flag("output_scores")
    samples = read.count("num_return_sequences", 1, low=1)
    if options.get("eos_token_id") is not None:
        eos_ids = list(dict.fromkeys(read.ids("eos_token_id")))
    else:
        # What the config says may lie outside a small vocabulary: then no token ends a row.
        eos = config.eos_token_id
        eos_ids = [i for i in ((eos,) if isinstance(eos, int) else eos or ()) if 0 <= i < config.vocab_size]
    pad_id = read.one_id("pad_token_id")
    if pad_id is None:
        pad_id = config.pad_token_id if config.pad_token_id is not None else (eos_ids or [0])[0]

    search = read_search(read, do_sample, len(eos_ids))
    if samples > 1 and not do_sample and search["beams"] is None:
        read.problems.append(f"num_return_sequences={samples} without do_sample=True would repeat one greedy answer")
    sampling = _sampling(read, config)  # checked also where do_sample is off and they do nothing
    sequences = _sequences(read, eos_ids)
    stop_strings = read.texts("stop_strings")
    if stop_strings and options.get("tokenizer") is None:
        read.problems.append("stop_strings needs the tokenizer of the ids: tokenizer=")
    settings = Settings(
        eos_ids=np.asarray(eos_ids, np.int32),
        pad_id=np.int32(pad_id),
        do_sample=do_sample,
        num_return_sequences=samples,
        output_scores=output_scores,
        attn_implementation=read.one_of("attn_implementation", IMPLEMENTATIONS),
        remove_invalid_values=read.flag("remove_invalid_values"),
        renormalize_logits=read.flag("renormalize_logits"),
        logits_processor=read.functions("logits_processor"),
        speculation=read_speculation(read, config, max_new_tokens),
        guidance=_guidance(read, any(search.values())),
        cache_dtype=_cache_dtype(read),
        prefill_chunk_size=_chunk_size(read),
        prefix=options.get("prefix"),
        **_repetition(read, config),
        **sequences,
        **search,
        **_ends(read, eos_ids, sequences["suppressed"], max_new_tokens),
        **(sampling if do_sample else {}),
    )
    if read.problems:
        raise ValueError("generate cannot do this: " + "; ".join(read.problems))
    if stop_strings:
        stop = stop_table(stop_strings, options["tokenizer"], config.vocab_size)
        settings = dataclasses.replace(settings, stop=stop)
    return settings


def _guidance(read: Reader, searches: bool) -> Guidance | None:
    scale = read.number("guidance_scale", lambda x: True, "a number", off=1.0)
    given = [name for name in ("negative_prompt_ids", "negative_prompt_attention_mask") if _given(read, name)]
    if scale is None and given:
        read.problems.append(f"{given[0]} is of no use without a guidance_scale other than 1")
    if given == ["negative_prompt_attention_mask"]:
        read.problems.append("negative_prompt_attention_mask is of negative_prompt_ids, which are not given")
    guesses = [name for name in ("assistant_model", "prompt_lookup_num_tokens") if _given(read, name)]
    if scale is not None and guesses:
        read.problems.append(f"guidance_scale and {guesses[0]} do not go together")
    if scale is not None and searches:
        read.problems.append("guidance_scale goes with neither num_beams above 1 nor penalty_alpha")
    return None if scale is None else Guidance(scale)


def _given(read: Reader, name: str) -> bool:
    return read.options.get(name) is not None


def _cache_dtype(read: Reader) -> Any:
    if not _given(read, "cache_dtype"):
        return None
    prefix = read.options.get("prefix")
    try:
        dtype = cache_dtype(read.options["cache_dtype"])
    except ValueError as error:
        read.problems.append(f"cache_dtype: {error}")
        return None
    if isinstance(prefix, Prefix) and prefix.cache.dtype != dtype:
        read.problems.append(f"cache_dtype {dtype} is not that of the prefix, {prefix.cache.dtype}; leave it out")
    return dtype


def _chunk_size(read: Reader) -> int | None:
    return read.count("prefill_chunk_size", 1, low=1) if _given(read, "prefill_chunk_size") else None


def _sampling(read: Reader, config: OPTConfig) -> dict[str, Any]:
    unit = "above 0 and at most 1"
    above = f"above 0, {LEAST:g} or more (for the most probable token use do_sample=False)"
    top_k = read.count("top_k", 50, none=0)
    return {
        "temperature": read.number("temperature", lambda x: x >= LEAST, above, off=1.0),
        "top_k": np.int32(min(top_k, config.vocab_size)) if top_k else None,
        "top_p": read.number("top_p", lambda x: 0 < x <= 1, unit, off=1.0),
        "min_p": read.number("min_p", lambda x: 0 <= x <= 1, "from 0 to 1"),
        "typical_p": read.number("typical_p", lambda x: 0 < x <= 1, unit, off=1.0),
        "epsilon_cutoff": read.number("epsilon_cutoff", lambda x: 0 <= x < 1, "at least 0 and below 1", off=0.0),
        "eta_cutoff": read.number("eta_cutoff", lambda x: 0 <= x < 1, "at least 0 and below 1", off=0.0),
    }


def _repetition(read: Reader, config: OPTConfig) -> dict[str, Any]:
    def ngram(name: str) -> int:
        n = read.count(name, 0)
        # A longer n-gram does not fit into a row, let alone twice.
        return n if n <= config.max_position_embeddings else 0

    return {
        "repetition_penalty": read.number(
            "repetition_penalty", lambda x: x >= LEAST, f"above 0, {LEAST:g} or more", off=1.0
        ),
        "encoder_repetition_penalty": read.number(
            "encoder_repetition_penalty", lambda x: x >= LEAST, f"above 0, {LEAST:g} or more", off=1.0
        ),
        "no_repeat_ngram_size": ngram("no_repeat_ngram_size"),
        "encoder_no_repeat_ngram_size": ngram("encoder_no_repeat_ngram_size"),
    }


def _sequences(read: Reader, eos_ids: list[int]) -> dict[str, Any]:
    bad = [word for word in read.lists_of_ids("bad_words_ids") if not (len(word) == 1 and word[0] in eos_ids)]
    biased = read.biases("sequence_bias")
    biases = np.asarray(list(biased.values()), np.float32)
    suppressed, at_first = (
        np.isin(np.arange(read.vocab_size), read.ids(name)) for name in ("suppress_tokens", "begin_suppress_tokens")
    )
    if suppressed.all():
        read.problems.append("suppress_tokens leaves no token at all")
    elif (suppressed | at_first).all():
        read.problems.append("begin_suppress_tokens leaves no token at all")
    return {
        "bad_words": _right_aligned(bad) if bad else None,
        "sequence_bias": (_right_aligned([list(ids) for ids in biased]), biases) if biased else None,
        "suppressed": suppressed if suppressed.any() else None,
        "begin_suppressed": at_first if at_first.any() else None,
    }


def _ends(
    read: Reader, eos_ids: list[int], suppressed: np.ndarray | None, max_new_tokens: int | None
) -> dict[str, Any]:
    at_least, in_all = read.count("min_new_tokens", 0), read.count("min_length", 0)
    if at_least and in_all:
        read.problems.append(f"min_new_tokens={at_least} and min_length={in_all} say the same thing twice; give one")
    forced_bos, forced_eos = read.one_id("forced_bos_token_id"), read.ids("forced_eos_token_id")
    if forced_eos and max_new_tokens is None:
        read.problems.append("forced_eos_token_id needs to know max_new_tokens")
    never = np.flatnonzero(np.zeros(0) if suppressed is None else suppressed)
    for name, forced in (("forced_bos_token_id", forced_bos), ("forced_eos_token_id", forced_eos or None)):
        if forced is not None and np.isin(forced, never).all():
            read.problems.append(f"{name} {forced} is among suppress_tokens, which never come")
    decay = read.pair("exponential_decay_length_penalty")
    if decay is not None and not eos_ids:
        read.problems.append("exponential_decay_length_penalty needs an end of sequence: give eos_token_id")

    def tokens(n: int) -> np.int32:
        return np.int32(min(n, 2**31 - 1))

    return {
        "min_new_tokens": tokens(at_least) if at_least and eos_ids else None,
        "min_length": tokens(in_all) if in_all and eos_ids else None,
        "forced_bos": None if forced_bos is None else np.int32(forced_bos),
        "forced_eos": (np.asarray(forced_eos, np.int32), tokens((max_new_tokens or 1) - 1)) if forced_eos else None,
        "decay": None if decay is None else (tokens(decay[0]), np.float32(decay[1])),
    }


def _right_aligned(words: list[list[int]]) -> np.ndarray:
    width = max(map(len, words))
    return np.array([[-1] * (width - len(word)) + word for word in words], np.int32)
