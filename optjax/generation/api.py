"""`generate` and `stream`: checks and buckets on the outside, compiled programs inside."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from optjax.cache import Cache
from optjax.config import OPTConfig
from optjax.generation.beam import Found, run_beams
from optjax.generation.buckets import bucket, pad_to_bucket
from optjax.generation.contrastive import Ahead
from optjax.generation.history import History
from optjax.generation.loop import Choice, State, advance, run_generate, start
from optjax.generation.options import Options
from optjax.generation.prefix import check_prefix
from optjax.generation.processors import check_own_processors
from optjax.generation.reader import scalar
from optjax.generation.settings import Settings, as_settings
from optjax.generation.speculative import Progress, advance_round, begin, run_speculative
from optjax.kernels.choice import attention_kind, told
from optjax.params import Params, as_key
from optjax.placed import constrain
from optjax.validate import as_ids, as_mask, check_params, check_rows_not_empty, is_concrete


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["sequences", "logprobs", "scores", "passes", "sequences_scores", "beam_indices"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class GenerateOutput:
    """What `generate` returns with ``return_dict_in_generate``.

    Attributes:
      sequences: ``[B, T + N]``, prompts and new tokens, pad after the end of a row.
      logprobs: ``[B, N]`` float32, each new token's log-probability under the scores it was chosen by (transformers'
        ``compute_transition_scores(normalize_logits=True)``); 0 after the end of a row.
      scores: ``[B, N, V]`` float32, the processed scores of each step, if ``output_scores``; 0 past the last step.
      passes: int32 scalar, passes of the model that it took, the prompt's included: one a token, or fewer where tokens
        are guessed (``assistant_model``, ``prompt_lookup_num_tokens``).

    B counts the rows of ``sequences``. Of beam search, with n = num_beams, the following differ or are not None:

    Attributes:
      logprobs: what each token added to its hypothesis' score (transformers' ``compute_transition_scores``).
      scores: ``[prompts · n, N, V]``, those of every beam.
      sequences_scores: ``[B]`` float32, the sum of ``logprobs`` over the number of new tokens to the power of
        length_penalty; the best hypothesis of a prompt comes first.
      beam_indices: ``[B, N]`` int32, the row of ``scores`` that each token comes from; -1 after the end of a row.
    """

    sequences: jax.Array
    logprobs: jax.Array | None
    scores: jax.Array | None = None
    passes: jax.Array | None = None
    sequences_scores: jax.Array | None = None
    beam_indices: jax.Array | None = None


def generate(
    params: Params,
    ids: Any,
    attention_mask: Any = None,
    *,
    max_new_tokens: int,
    key: jax.Array | None = None,
    return_dict_in_generate: bool = False,
    **options: Unpack[Options],
) -> Any:
    """Continues prompts, as one compiled program.

    Args:
      params: with the ``causal_lm`` head. Unstacked layers decode fastest; see `unstack_layers`.
      ids: ``[B, T]`` prompts, padded anywhere.
      attention_mask: ``[B, T]`` bool or int; all ones by default.
      max_new_tokens: N, at least 1; the loop ends early when every row has ended.
      key: PRNG key; needed when ``do_sample``. A row's draws depend on its index, not on the other rows.
      return_dict_in_generate: return a `GenerateOutput`.
      **options: those of `optjax.generation.Options`.

    Returns:
      ``[B · num_return_sequences, T + N]`` int32: ids as given, then the new tokens, pad after the end of a row.

    Raises:
      ValueError: before anything is compiled: ids or mask that do not fit, options unknown or impossible, a row whose
        real tokens and max_new_tokens exceed max_position_embeddings, sampling without a key.
    """
    return_dict = bool(return_dict_in_generate)
    if options.get("output_scores") and not return_dict:
        raise ValueError("output_scores needs return_dict_in_generate=True")
    ids, mask, settings, key = _check(params, ids, attention_mask, max_new_tokens, key, options)
    settings = dataclasses.replace(settings, output_logprobs=return_dict)
    run_ids, run_mask = pad_to_bucket(ids, mask)
    n = int(max_new_tokens)
    run = run_speculative if settings.speculation else run_beams if settings.beams else run_generate
    made, passes = run(params, run_ids, run_mask, settings, key, np.int32(n), room=bucket(n))
    host: Any
    if is_concrete(made, ids):
        # On the host: a slice of another length on the device would be another program, and so would jnp.asarray.
        host = jax.device_get(made)
        join, array = np.concatenate, jax.device_put
    else:
        host, join, array = made, jnp.concatenate, jnp.asarray
    prompts = ids.repeat(settings.num_return_sequences, axis=0)
    sequences = array(join([prompts, host.token[:, :n]], axis=1))
    if not return_dict:
        return sequences
    logprobs, scores = (None if x is None else array(x[:, :n]) for x in (host.logprob, host.scores))
    if not isinstance(host, Found):
        return GenerateOutput(sequences, logprobs, scores, passes)
    return GenerateOutput(sequences, logprobs, scores, passes, array(host.score), array(host.beam_indices[:, :n]))


def stream(
    params: Params,
    ids: Any,
    attention_mask: Any = None,
    *,
    max_new_tokens: int,
    key: jax.Array | None = None,
    **options: Unpack[Options],
) -> Iterator[np.ndarray]:
    """`generate`, token by token: yields ``[B]`` int32 ids as they come, the same ids that `generate` gives.

    Ends after max_new_tokens, or when every row has ended; a row that ended earlier yields the pad id. The arguments
    are those of `generate`, and are checked at the call, before the first token is asked for.

    Raises:
      ValueError: as `generate`; or in somebody's ``jit``, where nothing can be yielded.
    """
    if not is_concrete(params, ids, attention_mask):
        raise ValueError("stream yields ids as they come and cannot run inside jit; use generate there")
    if options.get("output_scores"):
        raise ValueError("stream yields ids only; output_scores is for generate")
    ids, mask, settings, key = _check(params, ids, attention_mask, max_new_tokens, key, options)
    if settings.beams is not None:
        raise ValueError("stream yields each token for good, and beam search knows none until its end; use generate")
    run_ids, run_mask = pad_to_bucket(ids, mask)
    if settings.speculation is not None:
        return _stream_rounds(params, run_ids, run_mask, jax.device_put(settings), key, int(max_new_tokens))
    return _stream(params, run_ids, run_mask, jax.device_put(settings), key, int(max_new_tokens))


def _stream(params: Params, ids, mask, settings: Settings, key, max_new_tokens: int) -> Iterator[np.ndarray]:
    state = _start(params, ids, mask, settings, key, room=bucket(max_new_tokens))
    for _ in range(max_new_tokens - 1):
        token, done = state.choice.token, state.done
        # The next step is under way while this token is read.
        state = _advance(params, settings, key, (state.cache, state.history, state.ahead), state.choice, done)
        yield np.asarray(token)
        if np.asarray(done).all():
            return
    yield np.asarray(state.choice.token)


def _stream_rounds(params: Params, ids, mask, settings: Settings, key, max_new_tokens: int) -> Iterator[np.ndarray]:
    """Of rounds that make several tokens, and not the same number in each row: those that all rows have."""
    limit, yielded = np.int32(max_new_tokens), 0
    state = _begin(params, ids, mask, settings, key, limit, room=bucket(max_new_tokens))
    while True:
        new, done, tokens = (np.asarray(x) for x in (state.new, state.done, state.made.token))
        for step in range(yielded, int(new.max() if done.all() else new[~done].min())):
            yield tokens[:, step]
            yielded += 1
        if done.all():
            return
        state = _advance_round(params, settings, key, limit, state)


@partial(jax.jit, static_argnames="room")
def _begin(params: Params, ids, mask, settings: Settings, key, limit, *, room: int) -> Progress:
    return _whole(params, begin(params, ids, mask, settings, key, limit, room=room))


@partial(jax.jit, donate_argnums=4)
def _advance_round(params: Params, settings: Settings, key, limit, state: Progress) -> Progress:
    return _whole(params, advance_round(params, settings, key, limit, state))


def _whole(params: Params, state: Progress) -> Progress:
    """What `_stream_rounds` reads, whole on every device."""
    new, done = (constrain(params.placement, x, None) for x in (state.new, state.done))
    token = constrain(params.placement, state.made.token, None, None)
    made = dataclasses.replace(state.made, token=token)
    return dataclasses.replace(state, new=new, done=done, made=made)


@partial(jax.jit, static_argnames="room")
def _start(params: Params, ids, mask, settings: Settings, key, *, room: int) -> State:
    return _readable(params, start(params, ids, mask, settings, key, room))


@partial(jax.jit, donate_argnums=3)
def _advance(
    params: Params, settings: Settings, key, held: tuple[Cache, History, Ahead | None], choice: Choice, done
) -> State:
    cache, history, ahead = held
    return _readable(params, advance(params, settings, key, State(cache, history, choice, done, ahead)))


def _readable(params: Params, state: State) -> State:
    """The token, and which rows have ended, whole on every device: each process reads them."""
    token, done = (constrain(params.placement, x, None) for x in (state.choice.token, state.done))
    return dataclasses.replace(state, choice=dataclasses.replace(state.choice, token=token), done=done)


def _check(params: Params, ids: Any, attention_mask: Any, max_new_tokens: Any, key: Any, options: Any):
    """The arguments of `generate`, made uniform; or a ValueError."""
    config = check_params(params, ("causal_lm",)).config
    ids = as_ids(ids, config.vocab_size)
    max_new_tokens = scalar(max_new_tokens)
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens should be an integer of at least 1, not {max_new_tokens!r}")
    mask = np.ones(ids.shape, bool) if attention_mask is None else as_mask(attention_mask, ids.shape)
    ids, mask = (np.asarray(x) if is_concrete(x) else x for x in (ids, mask))
    check_rows_not_empty(mask)
    # How many tokens are real is not known while tracing a mask; one at least.
    lengths = mask.sum(1) if is_concrete(mask) else np.ones(len(mask), int)
    prefix = options.get("prefix")
    if prefix is not None:
        lengths = lengths + check_prefix(params, prefix, len(mask))
    longest, with_prefix = int(lengths.max()), "" if prefix is None else ", its prefix included,"
    limit = config.max_position_embeddings
    assistant = options.get("assistant_model")
    whose = ""
    if isinstance(assistant, Params) and assistant.config.max_position_embeddings < limit:
        limit, whose = assistant.config.max_position_embeddings, "the assistant_model's "
    if longest + max_new_tokens > limit:
        raise ValueError(
            f"a prompt of {longest} tokens{with_prefix} and max_new_tokens = {max_new_tokens} make "
            f"{longest + max_new_tokens}, more than {whose}max_position_embeddings = {limit}; shorten the prompt or "
            f"ask for at most {max(limit - longest, 0)}"
        )
    settings = as_settings(config, options, int(max_new_tokens))
    if settings.guidance is not None and options.get("negative_prompt_ids") is not None:
        negative = _negative_prompts(config, ids.shape[0], int(max_new_tokens), options)
        settings = dataclasses.replace(settings, guidance=dataclasses.replace(settings.guidance, **negative))
    every = [each for each in (params, assistant) if isinstance(each, Params)]
    if any(told(each, settings.attn_implementation) == "eager" for each in every):
        settings = dataclasses.replace(settings, attn_implementation="eager")
    rows, t = ids.shape[0] * (1 if settings.guidance is None else 2), bucket(ids.shape[1])
    chunks = settings.prefill_chunk_size is not None and settings.prefill_chunk_size < t
    for reader in [params] if not isinstance(assistant, Params) else [params, assistant]:
        attention_kind(
            reader,
            rows,
            t,
            cache=chunks or (prefix is not None and reader is params),
            cache_dtype=settings.cache_dtype if prefix is None or reader is not params else prefix.cache.dtype,
            attn_implementation=settings.attn_implementation,
        )
    columns = bucket(ids.shape[1]) + bucket(int(max_new_tokens)) + (0 if prefix is None else prefix.columns)
    check_own_processors(settings, ids.shape[0], columns, config.vocab_size)
    if not settings.do_sample:
        key = None
    elif key is None:
        raise ValueError("do_sample=True needs a key, such as key=jax.random.key(0)")
    else:
        key = as_key(key)
    return ids, mask, settings, key


def _negative_prompts(config: OPTConfig, rows: int, max_new_tokens: int, options: Any) -> dict[str, Any]:
    """``ids`` and ``mask`` of the other branch of guidance, in a bucketed length; or a ValueError."""
    name = "negative_prompt_ids"
    ids, mask = as_ids(options[name], config.vocab_size, name), options.get("negative_prompt_attention_mask")
    mask = (
        np.ones(ids.shape, bool)
        if mask is None
        else as_mask(mask, (ids.shape[0], ids.shape[1]), "negative_prompt_attention_mask")
    )
    if ids.shape[0] != rows:
        raise ValueError(f"{name} should have a row for each of the {rows} prompts, got shape {ids.shape}")
    check_rows_not_empty(mask, name="negative_prompt_attention_mask")
    longest = int(np.asarray(mask).sum(1).max()) if is_concrete(mask) else 1
    if longest + max_new_tokens > config.max_position_embeddings:
        raise ValueError(
            f"a negative prompt of {longest} tokens and max_new_tokens = {max_new_tokens} make "
            f"{longest + max_new_tokens}, more than max_position_embeddings = {config.max_position_embeddings}"
        )
    ids, mask = (np.asarray(x) if is_concrete(x) else x for x in (ids, mask))
    ids, mask = pad_to_bucket(ids, mask)
    return {"ids": ids, "mask": mask}
