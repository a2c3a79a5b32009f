"""Speculative decoding: several tokens are guessed cheaply, and one pass of the model says how many of them stand.

Leviathan et al. 2023, Chen et al. 2023. The guesses come from a smaller model, or from the row itself (prompt lookup).
Greedy: a guess stands where it is what the model would choose. Sampling: guess d, drawn from q, stands with probability
min(1, p(d) / q(d)), and the first that does not is replaced by a draw from the rest of p, max(0, p - q): what comes is
drawn from p. Processors and warpers make p and q alike.

Rows accept different numbers of guesses. Each row writes at columns of its own (`Cache.index` ``[B]``), and what did
not stand is written over, so that the caches hold no more than T + N + the guesses of one round.

The model's scores of several tokens in one pass are those of single steps but for rounding. Where its two best scores
lie closer than that, either may come, as with another batch size.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from optjax.cache import Cache, own_cache, reorder_cache
from optjax.generation.accept import accept_draws, accept_greedy
from optjax.generation.aligned import right_aligned
from optjax.generation.chunks import read
from optjax.generation.draw import draw, most_probable
from optjax.generation.history import History
from optjax.generation.loop import Choice, start
from optjax.generation.prefix import before
from optjax.generation.processors import process
from optjax.generation.prompt_lookup import look_up
from optjax.generation.settings import Settings
from optjax.generation.stop_strings import find_stops
from optjax.heads import lm_logits
from optjax.kernels.choice import good_columns
from optjax.manual import as_after
from optjax.model import Inputs, decoder
from optjax.params import Params, unstack_layers
from optjax.placed import constrain, platform


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "draft_cache", "history", "new", "last", "done", "made", "passes"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Progress:
    """What stands between two rounds.

    Attributes:
      cache: the model's; `at` says where each row goes on.
      draft_cache: the smaller model's, or None.
      history: the tokens, the last ones included; its ``count`` and ``new`` are those of the first token.
      new: ``[B]`` int32, tokens generated.
      last: ``[B]``, the last of them.
      done: ``[B]`` bool, rows that have ended.
      made: the choices of all steps ``[B, N, …]``, as in `run_generate`.
      passes: int32 scalar, passes of the model, the prompt's included.
    """

    cache: Cache
    draft_cache: Cache | None
    history: History
    new: jax.Array
    last: jax.Array
    done: jax.Array
    made: Choice
    passes: jax.Array


@partial(jax.jit, static_argnames="room")
def run_speculative(
    params: Params, ids, mask, settings: Settings, key, max_new_tokens: jax.Array, *, room: int
) -> tuple[Choice, jax.Array]:
    """`run_generate` in rounds: the choices of all steps, padded to ``room``, and the number of passes."""
    params, settings = _unstacked(params, settings)
    state = begin(params, ids, mask, settings, key, max_new_tokens, room=room)

    def body(state: Progress) -> Progress:
        return advance_round(params, settings, key, max_new_tokens, state)

    state = jax.lax.while_loop(lambda state: ~state.done.all(), body, as_after(body, state))
    made = jax.tree.map(lambda x: constrain(params.placement, x, *(None,) * x.ndim), state.made)
    return made, state.passes


def begin(params: Params, ids, mask, settings: Settings, key, max_new_tokens, *, room: int) -> Progress:
    """Reads prompts ``[B, T]`` and chooses the first token of each row."""
    spec = settings.speculation
    assert spec is not None
    columns = room + spec.width + 1
    state = start(params, ids, mask, settings, key, columns)
    draft_cache = None
    if spec.assistant is not None:
        with jax.named_scope("prefill_assistant"):
            # It has not read the prefix.
            ids, mask = right_aligned(*before(settings.prefix, *right_aligned(ids, mask)))
            b, t = ids.shape
            columns = good_columns(spec.assistant.placement, t + columns, settings.attention_of_steps)
            empty = own_cache(spec.assistant, b, columns, settings.cache_dtype)
            how = {"keep": False, "attn_implementation": settings.attn_implementation, "no_past": True}
            _, draft_cache = read(spec.assistant, ids, mask, empty, settings.prefill_chunk_size, **how)
            if settings.num_return_sequences > 1:
                draft_cache = reorder_cache(draft_cache, jnp.repeat(jnp.arange(b), settings.num_return_sequences))
    made = jax.tree.map(lambda x: jnp.zeros((x.shape[0], room, *x.shape[1:]), x.dtype), state.choice)
    made = dataclasses.replace(made, token=jnp.full_like(made.token, settings.pad_id))
    made = jax.tree.map(lambda steps, x: steps.at[:, 0].set(x), made, state.choice)
    ones = jnp.ones_like(state.choice.token)
    done = state.done | (max_new_tokens <= 1)
    out = Progress(state.cache, draft_cache, state.history, ones, state.choice.token, done, made, jnp.int32(1))
    # From here on with a column for each row.
    caches = at(out.cache, out, 1), None if draft_cache is None else at(draft_cache, out, 2)
    return dataclasses.replace(out, cache=caches[0], draft_cache=caches[1])


def advance_round(params: Params, settings: Settings, key, max_new_tokens, state: Progress) -> Progress:
    """Guesses, one pass over them, and what of them stands: between 1 and γ + 1 more tokens for each row."""
    spec = settings.speculation
    assert spec is not None
    b = state.new.shape[0]
    keys = None
    if settings.do_sample:
        # A key for each row and round: draws do not depend on how many rows there are.
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, state.passes)))(jnp.arange(b))
        keys = jax.vmap(partial(jax.random.split, num=3))(keys)
    with jax.named_scope("draft"):
        if spec.assistant is None:
            guesses = _lookup(settings, state)
            q, draft_cache = None, None
        else:
            guesses, q, draft_cache = _draft(settings, state, None if keys is None else keys[:, 0])
        state = dataclasses.replace(state, draft_cache=draft_cache)
    with jax.named_scope("verify"):
        window = jnp.concatenate([state.last[:, None], guesses], axis=1)
        logits, cache = _pass(params, settings, window, ~state.done, at(state.cache, state, 1))
        state = dataclasses.replace(state, cache=cache, passes=state.passes + 1)
    with jax.named_scope("accept"):
        history = _with_guesses(state, guesses)
        scores = _process_each(settings, state, history, guesses, logits)
        if keys is None:
            tokens, stand = accept_greedy(scores, guesses)
        else:
            tokens, stand = accept_draws(keys[:, 1], keys[:, 2], scores, guesses, q)
        return _keep(settings, max_new_tokens, state, history, tokens, stand, scores)


def at(cache: Cache, state: Progress, back: int) -> Cache:
    """The cache as if it held all tokens of each row but the last ``back``."""
    t, prompt = _prompt(state.history)
    index = t + state.new - back
    index = index[0] if index.shape[0] == 1 else index
    return dataclasses.replace(cache, index=index, lengths=prompt + state.new - back)


def _prompt(history: History) -> tuple[jax.Array, jax.Array]:
    """The columns of the prompts, and their lengths ``[B]``."""
    t = history.count - history.new
    return t, t - history.first


def _pass(
    params: Params, settings: Settings, ids: jax.Array, active: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """Logits ``[B, T, V]`` of ids ``[B, T]``."""
    mask = jnp.broadcast_to(active[:, None], ids.shape)
    out = decoder(params, Inputs(ids=ids, mask=mask, cache=cache, attn_implementation=settings.attention_of_steps))
    assert out.cache is not None
    return lm_logits(params, out.last_hidden_state), out.cache


def _lookup(settings: Settings, state: Progress) -> jax.Array:
    spec, history = settings.speculation, state.history
    assert spec is not None
    t, _ = _prompt(history)
    return look_up(history.tokens, history.first, t + state.new, width=spec.width, max_ngram=spec.max_ngram)


def _draft(settings: Settings, state: Progress, keys: Any):
    """Guesses ``[B, γ]`` of the smaller model, their distributions ``[B, γ, V]`` (None if greedy), and its cache."""
    spec = settings.speculation
    assert spec is not None and spec.assistant is not None and state.draft_cache is not None
    assistant, active, rows = spec.assistant, ~state.done, jnp.arange(state.new.shape[0])
    t, _ = _prompt(state.history)

    def choose(history: History, logits: jax.Array, step):
        scores = _process_rows(settings, history, t, state.new + step, logits)
        if keys is None:
            token, q = most_probable(scores), None
        else:
            token = draw(jax.vmap(jax.random.fold_in, (0, None))(keys, step), scores)
            q = jax.nn.softmax(scores, axis=-1)
        tokens = history.tokens.at[rows, t + state.new + step].set(token)
        seen = None if history.seen is None else history.seen.at[rows, token].set(True)
        return dataclasses.replace(history, tokens=tokens, seen=seen), token, q

    # The last two tokens: if all guesses stood, the last guess is not in the cache yet.
    before = jnp.take_along_axis(state.history.tokens, (t + state.new - 2)[:, None], axis=1)
    window = jnp.concatenate([before, state.last[:, None]], axis=1)
    logits, cache = _pass(assistant, settings, window, active, at(state.draft_cache, state, 2))
    history, token, q = choose(state.history, logits[:, -1], jnp.int32(0))

    def step(carry, i):
        history, cache, token = carry
        logits, cache = _pass(assistant, settings, token[:, None], active, cache)
        history, token, q = choose(history, logits[:, -1], i)
        return (history, cache, token), (token, q)

    others = jnp.arange(1, spec.width)
    (_, cache, _), rest = jax.lax.scan(step, (history, cache, token), others)
    guesses, q = jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]).swapaxes(0, 1), (token, q), rest)
    return guesses, q, cache


def _with_guesses(state: Progress, guesses: jax.Array) -> History:
    """The history with guesses ``[B, γ]`` after each row's tokens."""
    t, _ = _prompt(state.history)
    rows, steps = jnp.arange(guesses.shape[0])[:, None], jnp.arange(guesses.shape[1])
    tokens = state.history.tokens.at[rows, t + state.new[:, None] + steps].set(guesses)
    return dataclasses.replace(state.history, tokens=tokens)


def _process_rows(settings: Settings, history: History, t, new: jax.Array, scores: jax.Array) -> jax.Array:
    """`process` of rows that hold ``new`` ``[B]`` tokens each: one row at a time, as it takes one number for all."""

    def one(history: History, new, scores):
        history = jax.tree.map(lambda x: x[None], history)
        return process(settings, dataclasses.replace(history, count=t + new, new=new), scores[None])[0]

    rows = dataclasses.replace(history, count=new, new=new, stop=None)
    return jax.vmap(one)(rows, new, scores)


def _process_each(settings: Settings, state: Progress, history: History, guesses, logits) -> jax.Array:
    """The processed scores ``[B, γ + 1, V]`` after the last token and after each guess."""
    t, _ = _prompt(state.history)
    n = logits.shape[1]
    seen = None
    if history.seen is not None:
        said = jax.nn.one_hot(guesses, logits.shape[-1], dtype=jnp.int32).cumsum(1) > 0
        seen = jnp.concatenate([history.seen[:, None], history.seen[:, None] | said], axis=1)

    def one(i, seen, scores):
        return _process_rows(settings, dataclasses.replace(history, seen=seen), t, state.new + i, scores)

    return jax.vmap(one, in_axes=(0, None if seen is None else 1, 1), out_axes=1)(jnp.arange(n), seen, logits)


def _keep(settings: Settings, max_new_tokens, state: Progress, history: History, tokens, stand, scores) -> Progress:
    """Appends the first ``stand`` + 1 of ``tokens`` ``[B, γ + 1]`` to each row, up to its end."""
    t, _ = _prompt(history)
    steps = jnp.arange(tokens.shape[1])
    ends = (tokens[:, :, None] == settings.eos_ids).any(-1) | (state.new[:, None] + steps + 1 >= max_new_tokens)
    stop = history.stop
    searches = None
    if settings.stop is not None and stop is not None:
        table = settings.stop

        def search(state, token):
            state, found = find_stops(table, state, token)
            return state, (state, found)

        _, (searches, found) = jax.lax.scan(search, stop, tokens.T)
        ends |= found.T
    ended_before = jnp.cumsum(ends, axis=1) > ends.astype(jnp.int32)
    kept = ~state.done[:, None] & (steps <= stand[:, None]) & ~ended_before
    count = kept.sum(1, dtype=jnp.int32)
    rows = jnp.arange(tokens.shape[0])
    last_kept = jnp.maximum(count - 1, 0)

    def append(made: jax.Array, values: jax.Array, begin) -> jax.Array:
        column = jnp.where(kept, begin + state.new[:, None] + steps, made.shape[1])
        return made.at[rows[:, None], column].set(values, mode="drop")

    logprob = None
    if settings.output_logprobs:
        logprob = jnp.take_along_axis(jax.nn.log_softmax(scores, axis=-1), tokens[:, :, None], axis=2)[:, :, 0]
    choices = Choice(tokens, logprob, scores if settings.output_scores else None)
    seen = history.seen
    if seen is not None:
        seen = seen.at[rows[:, None], jnp.where(kept, tokens, seen.shape[1])].set(True, mode="drop")
    if searches is not None and stop is not None:
        stop = jnp.where(count > 0, searches[last_kept, rows], stop)
    return dataclasses.replace(
        state,
        history=dataclasses.replace(history, tokens=append(history.tokens, tokens, t), seen=seen, stop=stop),
        new=state.new + count,
        last=jnp.where(count > 0, tokens[rows, last_kept], state.last),
        done=state.done | (kept & ends).any(1),
        made=jax.tree.map(lambda made, values: append(made, values, 0), state.made, choices),
    )


def _unstacked(params: Params, settings: Settings) -> tuple[Params, Settings]:
    """On CPU, where a slice of stacked weights is a copy: once, rather than at every step."""
    spec = settings.speculation
    if platform(params.placement) != "cpu" or spec is None:
        return params, settings
    if spec.assistant is not None:
        spec = dataclasses.replace(spec, assistant=unstack_layers(spec.assistant))
    return unstack_layers(params), dataclasses.replace(settings, speculation=spec)
