"""What `generate` can be told, with Hugging Face's names and meanings; `settings.py` checks it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from optjax.generation.prefix import Prefix
    from optjax.params import Params


class Options(TypedDict, total=False):
    """The keyword options of `generate` and `stream` (transformers' GenerationConfig has the same).

    Attributes:
      do_sample: draw each token; otherwise the most probable one is taken, and the sampling options do nothing.
      temperature: divides the scores before sampling; above 0. 1 by default.
      top_k: sample among the k most probable (ties with the k-th included); 0 or None for all. 50 by default.
      top_p: sample from the smallest set of most probable tokens whose mass reaches top_p. Off by default.
      min_p: leave out tokens less probable than min_p × the most probable one. Off by default.
      typical_p: locally typical sampling (Meister et al. 2022) with this mass. Off by default.
      epsilon_cutoff: leave out tokens less probable than this (Hewitt et al. 2022). 0 is off.
      eta_cutoff: leave out tokens less probable than this and than a bound that falls with the entropy (Hewitt et al.
        2022). 0 is off.
      renormalize_logits: make the scores log-probabilities, after all else.
      repetition_penalty: divides positive and multiplies negative scores of every token that the row holds already
        (Keskar et al. 2019). Above 0; 1 is off.
      no_repeat_ngram_size: no n-gram of this size comes twice in a row's prompt and continuation. 0 is off.
      encoder_repetition_penalty: above 1 favours the tokens of the prompt, below 1 avoids them: the inverse of
        repetition_penalty, for the prompt alone. Above 0; 1 is off.
      encoder_no_repeat_ngram_size: no n-gram of this size that the prompt holds comes in the continuation. 0 is off.
      min_new_tokens: no end-of-sequence token before this many.
      min_length: no end-of-sequence token before a row holds this many real tokens, its prompt included.
      bad_words_ids: token sequences that may not be completed. A sequence that is just an end-of-sequence id is left
        out, as in transformers; use ``eos_token_id=[]`` or ``suppress_tokens`` for that.
      sequence_bias: ``{(id, …): bias}``, or pairs ``[[id, …], bias]``: what is added to the score of the last id where
        the row ends in those before it. -inf forbids.
      forced_bos_token_id: the first new id in a row whose prompt is a single token.
      forced_eos_token_id: the id, or one of those, that comes last where max_new_tokens is reached.
      begin_suppress_tokens: ids that do not come first (after a forced_bos_token_id: second).
      exponential_decay_length_penalty: ``(start, factor)``: after ``start`` new tokens the scores of the ends of
        sequence grow by factor^(tokens since) - 1 times their size.
      remove_invalid_values: NaN among the model's scores becomes 0, and ±inf (what was forbidden so far, too) the
        largest and least finite number.
      logits_processor: a pure function ``(ids, scores) -> scores`` of one's own, or several, which stand after all
        others and before those of sampling. ``ids`` ``[B, S]`` int32 are a row's prompt and new tokens, the last one at
        ``ids[:, -1]`` and the pad id before the first; S is the same at every step. ``scores`` are ``[B, V]`` float32.
        It is traced into the compiled loop: define it once, as another function object is another program. It may be
        called with the rows one by one, B = 1.
      suppress_tokens: ids that never come, such as those a tokenizer does not have (Hugging Face #18268).
      eos_token_id: one id, several, or ``[]`` for none; the config's by default.
      pad_token_id: what follows the end of a row; the config's by default.
      stop_strings: one text or several: a row ends with the token that completes one, wherever tokens begin and end,
        also one that began in the prompt. Needs ``tokenizer``. The last token may hold more text than the string.
      tokenizer: the `Tokenizer` of the ids, for stop_strings.
      assistant_model: the params of a smaller model with the same vocabulary, which guesses some tokens ahead
        (speculative decoding, Leviathan et al. 2023): the greedy ids or the distribution stay what they are, but for
        rounding, in fewer passes of the model.
      num_assistant_tokens: how many tokens it guesses at a time. 5 by default.
      prompt_lookup_num_tokens: guess so many tokens by what followed the row's last n-gram before (Saxena 2023); for
        texts that repeat parts of their prompts. No smaller model is needed.
      max_matching_ngram_size: the longest n-gram that is looked for. 2 by default.
      guidance_scale: classifier-free guidance (Sanchez et al. 2023): scores are pushed by this factor away from those
        after the negative prompt. 1 is off.
      negative_prompt_ids, negative_prompt_attention_mask: ``[B, T']``, a negative prompt for each row; by default the
        prompt's last token alone.
      num_return_sequences: samples a prompt, or of beam search its best hypotheses, at most num_beams. The prompt is
        computed once. Above 1 needs do_sample or num_beams.
      output_scores: keep the processed scores of every step; `generate` only.
      num_beams: beam search that follows this many continuations of a prompt; with do_sample beam sampling, which draws
        them. 1 is off. `generate` only.
      length_penalty: hypotheses are compared by their sum of log-probabilities over their length to this power; above 0
        favours long ones. 1 by default.
      early_stopping: True ends a prompt's search when num_beams hypotheses are complete, False when no better one is
        to be expected, ``"never"`` when none is possible. False by default.
      num_beam_groups: the beams search in groups of equal size, each kept away from what those before it say (diverse
        beam search, Vijayakumar et al. 2016). 1 is off. Of several end-of-sequence ids the first is then written.
      diversity_penalty: of groups: taken from a token's log-probability for each beam of the groups before that says it
        at the same step.
      cache_dtype: of the keys and values that are kept; ``"int8"`` (with a scale for each head of each token) takes
        about half of bfloat16's memory. By default the params', or that of the prefix; on one CPU at
        least float32, in which 16 bits are read faster, and take twice as much.
      prefill_chunk_size: read prompts so many columns at a time, at most: what a long one takes beside its keys and
        values is then that of a chunk. All at once by default.
      prefix: from `read_prefix`: what stands before the prompts, all of them or each one, and need not be read again.
        ``ids`` are what follows it. Score processors and stop strings see it as part of the prompts, and an
        assistant_model, which has not read it, reads it with them; a negative prompt stands alone.
      attn_implementation: how prompts are read: ``"eager"``, ``"flash"`` or ``"auto"`` (the default), as of `forward`.
        Later tokens are with ``"eager"``, too, and as ``"auto"`` has it else.
      penalty_alpha: contrastive search (Su et al. 2022): of the top_k most probable tokens, 2 at least, the one with
        the most of (1 - penalty_alpha) × its probability - penalty_alpha × its likeness to what the row holds. 0 is
        off.
    """

    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    epsilon_cutoff: float
    eta_cutoff: float
    renormalize_logits: bool
    repetition_penalty: float
    no_repeat_ngram_size: int
    encoder_repetition_penalty: float
    encoder_no_repeat_ngram_size: int
    min_new_tokens: int
    min_length: int
    bad_words_ids: Sequence[Sequence[int]] | None
    sequence_bias: Mapping[tuple[int, ...], float] | Sequence[Any] | None
    forced_bos_token_id: int | None
    forced_eos_token_id: int | Sequence[int] | None
    begin_suppress_tokens: Sequence[int] | None
    exponential_decay_length_penalty: tuple[int, float] | None
    remove_invalid_values: bool
    logits_processor: Callable[..., Any] | Sequence[Callable[..., Any]] | None
    suppress_tokens: Sequence[int] | None
    eos_token_id: int | Sequence[int] | None
    pad_token_id: int | None
    stop_strings: str | Sequence[str] | None
    tokenizer: Any
    assistant_model: Params
    num_assistant_tokens: int
    prompt_lookup_num_tokens: int
    max_matching_ngram_size: int
    guidance_scale: float
    negative_prompt_ids: Any
    negative_prompt_attention_mask: Any
    num_return_sequences: int
    output_scores: bool
    num_beams: int
    length_penalty: float
    early_stopping: bool | str
    num_beam_groups: int
    diversity_penalty: float
    cache_dtype: Any
    prefill_chunk_size: int | None
    prefix: Prefix | None
    penalty_alpha: float | None
    attn_implementation: str
