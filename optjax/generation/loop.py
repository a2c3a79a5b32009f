"""`generate`'s compiled program: prefill, then a while loop over a static cache. `stream` runs the same steps singly.

Shapes are static and come in buckets; how many tokens to make, and every number among the settings, is traced. So a
second prompt of the same bucket compiles nothing.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp

from optjax.cache import Cache, reorder_cache
from optjax.generation.aligned import right_aligned
from optjax.generation.contrastive import Ahead, look_ahead, new_context
from optjax.generation.decode import next_logits
from optjax.generation.draw import draw, most_probable
from optjax.generation.guidance import guide, twice, with_other_branch
from optjax.generation.history import History, new_history
from optjax.generation.prefix import before, states_before
from optjax.generation.processors import process
from optjax.generation.prompt import read_prompts
from optjax.generation.settings import Settings
from optjax.generation.stages import loop_in_stages, stages
from optjax.generation.stop_strings import find_stops
from optjax.heads import lm_logits
from optjax.params import Params, unstack_layers
from optjax.placed import constrain, platform


@partial(jax.tree_util.register_dataclass, data_fields=["token", "logprob", "scores"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Choice:
    """The token of one step, ``[B, …]``; or of all steps, ``[B, N, …]``.

    Attributes:
      token: ``[B]``; the pad id in a row that had ended.
      logprob: ``[B]`` float32, the token's log-probability under the processed scores, 0 in a row that had ended; None
        where not kept.
      scores: ``[B, V]`` float32, those scores; None where not kept.
    """

    token: jax.Array
    logprob: jax.Array | None
    scores: jax.Array | None


@partial(jax.tree_util.register_dataclass, data_fields=["cache", "history", "choice", "done", "ahead"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class State:
    """What stands between two tokens.

    Attributes:
      cache: the tokens before the last one; of contrastive search the last one as well.
      history: the tokens, the last one included.
      choice: the last one.
      done: ``[B]`` bool, rows that have ended.
      ahead: of contrastive search, else None.
    """

    cache: Cache
    history: History
    choice: Choice
    done: jax.Array
    ahead: Ahead | None = None


@partial(jax.jit, static_argnames="room")
def run_generate(
    params: Params,
    ids: jax.Array,
    mask: jax.Array,
    settings: Settings,
    key: jax.Array | None,
    max_new_tokens: jax.Array,
    *,
    room: int,
) -> tuple[Choice, jax.Array]:
    """Up to ``max_new_tokens`` (traced, 1 to ``room``) for prompts ``[B, T]``, until all rows have ended.

    Returns the choices of all steps, padded to ``room``, and the number of steps that were run.
    """
    if platform(params.placement) == "cpu":
        # There a slice of stacked weights is a copy: once here, rather than at every step.
        params = unstack_layers(params)
    width = 1 if settings.contrastive is None else settings.contrastive.candidates
    filled = ids.shape[1] + (0 if settings.prefix is None else settings.prefix.columns)
    sizes = stages(params, filled + width, filled + columns_for(settings, room))
    state = start(params, ids, mask, settings, key, room, sizes[0] - filled)

    def put(made, choice: Choice, step):
        return jax.tree.map(lambda steps, x: steps.at[:, step].set(x), made, choice)

    # A row that ends early is padded to the end; log-probabilities and scores are 0 there.
    blank = jax.tree.map(lambda x: jnp.zeros((x.shape[0], room, *x.shape[1:]), x.dtype), state.choice)
    blank = dataclasses.replace(blank, token=jnp.full_like(blank.token, settings.pad_id))

    def more(carry):
        step, state, _ = carry
        return (step < max_new_tokens) & ~state.done.all()

    def body(carry):
        step, state, made = carry
        state = advance(params, settings, key, state)
        return step + 1, state, put(made, state.choice, step)

    carry = jnp.int32(1), state, put(blank, state.choice, 0)
    steps, _, made = loop_in_stages(
        params,
        sizes,
        more,
        body,
        carry,
        cache_of=lambda carry: carry[1].cache,
        with_cache=lambda carry, cache: (carry[0], dataclasses.replace(carry[1], cache=cache), carry[2]),
        width=width,
    )
    # Whole on every device, so that every process can read them.
    made = jax.tree.map(lambda x: constrain(params.placement, x, *(None,) * x.ndim), made)
    # Contrastive search reads the last token, too.
    return made, steps + int(settings.contrastive is not None)


def columns_for(settings: Settings, room: int) -> int:
    """The columns that ``room`` tokens take; contrastive search writes its candidates after them."""
    return room + (settings.contrastive.candidates if settings.contrastive else 0)


def start(params: Params, ids, mask, settings: Settings, key, room: int, columns: int | None = None) -> State:
    """Reads prompts ``[B, T]`` and chooses the first token of each row.

    ``room`` tokens fit in all, or as many as go into ``columns`` until the cache is grown.
    """
    ids, mask = right_aligned(ids, mask)
    b = ids.shape[0]
    with jax.named_scope("prefill"):
        all_ids, all_mask = with_other_branch(settings.guidance, ids, mask)
        search = settings.contrastive
        columns = columns_for(settings, room) if columns is None else columns
        hidden, cache = read_prompts(params, settings, all_ids, all_mask, columns, keep=search is not None)
        logits = lm_logits(params, hidden[:, -1])
    ids, mask = right_aligned(*before(settings.prefix, ids, mask))
    if settings.num_return_sequences > 1:
        rows = jnp.repeat(jnp.arange(b), settings.num_return_sequences)
        of_branches = rows if settings.guidance is None else jnp.concatenate([rows, b + rows])
        cache, logits = reorder_cache(cache, of_branches), logits[of_branches]
        ids, mask = ids[rows], mask[rows]
    history = new_history(ids, mask, room, params.config.vocab_size, settings)
    done = jnp.zeros(ids.shape[0], bool)
    ahead = Ahead(logits, new_context(states_before(settings.prefix, hidden), room)) if search else None
    return _choose(params, settings, key, cache, history, done, logits, ahead)


def advance(params: Params, settings: Settings, key, state: State) -> State:
    """One more token for each row."""
    if state.ahead is not None:
        return _choose(params, settings, key, state.cache, state.history, state.done, state.ahead.logits, state.ahead)
    with jax.named_scope("decode"):
        token, active = (twice(settings.guidance, x) for x in (state.choice.token, ~state.done))
        logits, cache = next_logits(params, token, active, state.cache, settings.attention_of_steps)
    return _choose(params, settings, key, cache, state.history, state.done, logits)


def _choose(
    params: Params, settings: Settings, key, cache: Cache, history: History, done, logits, ahead: Ahead | None = None
) -> State:
    with jax.named_scope("choose"):
        scores = process(settings, history, guide(settings.guidance, logits))
        if settings.do_sample:
            # A key for each row and step: a draw does not depend on how many rows there are.
            rows = jnp.arange(scores.shape[0])
            keys = jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, history.new)))(rows)
            token = draw(keys, scores)
        elif settings.contrastive is not None and ahead is not None:
            how = settings.contrastive, cache, history, ahead.context, scores, settings.attention_of_steps
            token, cache, ahead = look_ahead(params, *how)
        else:
            token = most_probable(scores)
        token = jnp.where(done, settings.pad_id, token)
        logprob = None
        if settings.output_logprobs:
            picked = jnp.take_along_axis(jax.nn.log_softmax(scores, axis=-1), token[:, None], axis=1)[:, 0]
            logprob = jnp.where(done, 0.0, picked)
        history = history.append(token)
        ended = (token[:, None] == settings.eos_ids[None, :]).any(1)
        if settings.stop is not None and history.stop is not None:
            stop, found = find_stops(settings.stop, history.stop, token)
            history, ended = dataclasses.replace(history, stop=stop), ended | found
        choice = Choice(token, logprob, scores if settings.output_scores else None)
    return State(cache, history, choice, done | ended, ahead)
