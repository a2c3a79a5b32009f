"""Beam search, beam sampling and diverse group beam search (Vijayakumar et al. 2016) as one compiled program.

No key or value is ever moved. A prompt is read once, and its columns of the cache serve all its beams; at every step
its n beams are n queries of one row, which write n columns more. A token's column stays where it is, whichever beams
come to descend from it: each beam carries the place of every one of its tokens, and attends to those columns alone.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from optjax.cache import Cache
from optjax.generation.aligned import right_aligned
from optjax.generation.draw import draw_several
from optjax.generation.finish import Finished, finish_beams, finish_group, finish_open
from optjax.generation.history import History, new_history
from optjax.generation.paths import NOTHING, Paths, best, join, no_paths, pick
from optjax.generation.prefix import before
from optjax.generation.processors import process
from optjax.generation.prompt import read_prompts
from optjax.generation.search import Beams
from optjax.generation.settings import Settings
from optjax.generation.stop_strings import find_stops
from optjax.heads import lm_logits
from optjax.manual import as_after
from optjax.model import Inputs, decoder
from optjax.params import Params, unstack_layers
from optjax.placed import constrain, platform


@partial(
    jax.tree_util.register_dataclass, data_fields=["cache", "history", "running", "finished", "scores"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class BeamState:
    """What stands between two steps, of B prompts with n beams each, in G groups.

    Attributes:
      cache: B rows: the prompts, then n columns for each token but the last.
      history: B · n rows, the tokens of each beam.
      running: ``[B, n]``, the beams.
      finished: of each group, ``[B, n / G]``.
      scores: ``[B · n, N, V]`` float32, the processed scores of all steps; None where not kept.
    """

    cache: Cache
    history: History
    running: Paths
    finished: tuple[Finished, ...]
    scores: jax.Array | None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["token", "logprob", "scores", "score", "beam_indices"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class Found:
    """The R best hypotheses of each prompt, ``[B · R, …]``.

    Attributes:
      token: ``[B · R, N]``, pad after the end.
      logprob: ``[B · R, N]`` float32; None where not kept.
      scores: ``[B · n, N, V]`` float32, as in `BeamState`.
      score: ``[B · R]`` float32, after the length penalty.
      beam_indices: ``[B · R, N]``, which of B · n rows each token was added to; -1 after the end.
    """

    token: jax.Array
    logprob: jax.Array | None
    scores: jax.Array | None
    score: jax.Array
    beam_indices: jax.Array


@partial(jax.jit, static_argnames="room")
def run_beams(
    params: Params,
    ids: jax.Array,
    mask: jax.Array,
    settings: Settings,
    key: jax.Array | None,
    max_new_tokens: jax.Array,
    *,
    room: int,
) -> tuple[Found, jax.Array]:
    """Up to ``max_new_tokens`` (traced, 1 to ``room``) for prompts ``[B, T]``, until no prompt's search goes on.

    Returns the ``num_return_sequences`` best hypotheses of each prompt, and the number of steps that were run.
    """
    if platform(params.placement) == "cpu":
        # There a slice of stacked weights is a copy: once here, rather than at every step.
        params = unstack_layers(params)
    state, logits = start_beams(params, ids, mask, settings, room)
    state = choose(settings, key, state, logits, max_new_tokens)

    def more(state: BeamState) -> jax.Array:
        is_open = jnp.stack([group.open.any() for group in state.finished])
        return (state.history.new < max_new_tokens) & is_open.any()

    def body(state: BeamState) -> BeamState:
        logits, cache = beam_logits(params, state, settings.attention_of_steps)
        return choose(settings, key, dataclasses.replace(state, cache=cache), logits, max_new_tokens)

    state = jax.lax.while_loop(more, body, as_after(body, state))
    found = _found(settings, state)
    # Whole on every device, so that every process can read them.
    found = jax.tree.map(lambda x: constrain(params.placement, x, *(None,) * x.ndim), found)
    return found, state.history.new


def start_beams(params: Params, ids, mask, settings: Settings, room: int) -> tuple[BeamState, jax.Array]:
    """Reads prompts ``[B, T]``, each once. Also the next token's logits ``[B · n, V]``, alike for a prompt's beams."""
    ids, mask = right_aligned(ids, mask)
    b = ids.shape[0]
    beams, n = _beams(settings), _beams(settings).num_beams
    with jax.named_scope("prefill"):
        hidden, cache = read_prompts(params, settings, ids, mask, n * room)
        logits = lm_logits(params, hidden[:, -1])
    ids, mask = right_aligned(*before(settings.prefix, ids, mask))
    ids, mask, logits = (jnp.repeat(x, n, axis=0) for x in (ids, mask, logits))
    history = new_history(ids, mask, room, params.config.vocab_size, settings)
    none = no_paths(b, n, room, settings.pad_id, settings.output_logprobs)
    # A group's beams are all one as yet: the first of them speaks for all.
    first = jnp.arange(n) % beams.group_size == 0
    running = dataclasses.replace(none, score=jnp.where(first, 0.0, none.score))
    group = Finished(
        jax.tree.map(lambda x: x[:, : beams.group_size], none),
        jnp.zeros((b, beams.group_size), bool),
        jnp.ones((b, 1), bool),
    )
    scores = jnp.zeros((b * n, room, logits.shape[-1]), jnp.float32) if settings.output_scores else None
    return BeamState(cache, history, running, (group,) * beams.groups, scores), logits


def beam_logits(params: Params, state: BeamState, attn_implementation: str) -> tuple[jax.Array, Cache]:
    """The next token's logits ``[B · n, V]`` of every beam, whose last token is written to the cache."""
    running, history = state.running, state.history
    b, n, room = running.tokens.shape
    last, prompt = history.new - 1, history.tokens.shape[1] - room
    with jax.named_scope("decode"):
        inputs = Inputs(
            ids=jax.lax.dynamic_index_in_dim(running.tokens, last, axis=2, keepdims=False),
            position_ids=(history.count - history.first - 1).reshape(b, n),
            visible=_visible(state.cache.mask, prompt, running.slots, last),
            cache=state.cache,
            attn_implementation=attn_implementation,
        )
        out = decoder(params, inputs)
        assert out.cache is not None  # the decoder returns one where it was given one
        return lm_logits(params, out.last_hidden_state).reshape(b * n, -1), out.cache


def _visible(mask: jax.Array, prompt: int, slots: jax.Array, last: jax.Array) -> jax.Array:
    """The columns ``[B, n, S]`` that each beam attends to, by the places of its tokens, of which the last is written.

    Of the columns after those of the prompt, by the cache's ``mask``, the one at ``step * n + place`` holds the token
    of that step that stood at that place; where it stood is what the next token was added to. None are beyond.
    """
    b, n, room = slots.shape
    place, step = jnp.arange(n), jnp.arange(room)
    held = jnp.where(step == last, place[:, None], jnp.roll(slots, -1, axis=2))
    own = (held[..., None] == place) & (step <= last)[:, None]
    of_prompt = jnp.broadcast_to(mask[:, None, :prompt], (b, n, prompt))
    beyond = jnp.zeros((b, n, mask.shape[1] - prompt - room * n), bool)
    return jnp.concatenate([of_prompt, own.reshape(b, n, room * n), beyond], axis=2)


def choose(settings: Settings, key, state: BeamState, logits: jax.Array, longest: jax.Array) -> BeamState:
    """One more token for each beam, by the logits ``[B · n, V]``."""
    beams, history, step = _beams(settings), state.history, state.history.new
    b, n, _ = state.running.tokens.shape
    size, v = beams.group_size, logits.shape[-1]
    with jax.named_scope("choose"):
        logprobs = jax.nn.log_softmax(logits, axis=-1)
        chosen: list[Paths] = []
        all_finished, all_processed = [], []
        for group, finished in enumerate(state.finished):
            places = slice(group * size, (group + 1) * size)
            its_history, its_logprobs = history, logprobs
            if beams.groups > 1:
                rows = (jnp.arange(b)[:, None] * n + jnp.arange(n)[places]).reshape(-1)
                its_history, its_logprobs = history.pick(rows), logprobs[rows]
                said = [paths.tokens[:, :, step] for paths in chosen]
                its_logprobs = _diverse(beams, its_logprobs, said)
            processed = process(settings, its_history, its_logprobs).reshape(b, size, v)
            running = jax.tree.map(lambda x, places=places: x[:, places], state.running)
            made, ends = _candidates(settings, key, running, its_history.stop, processed, step, group * size)
            score = made.score + jnp.where(ends, NOTHING, 0.0)
            going = pick(dataclasses.replace(made, score=score), best(size, score))
            if beams.groups == 1:
                finished = finish_beams(beams, finished, made, ends, going, step + 1, longest)
            else:
                # A group that is done says pads, as in transformers; the groups after it keep away from them.
                pads = going.tokens.at[:, :, step].set(settings.pad_id)
                going = dataclasses.replace(going, tokens=jnp.where(finished.open[..., None], going.tokens, pads))
                finished = finish_group(beams, finished, made, ends, step + 1, longest)
            chosen.append(going)
            all_finished.append(finished)
            all_processed.append(processed)
        running = join(*chosen)
        parents = (jnp.arange(b)[:, None] * n + running.slots[:, :, step]).reshape(-1)
        token = running.tokens[:, :, step].reshape(-1)
        history = history.pick(parents).append(token)
        if settings.stop is not None and history.stop is not None:
            history = dataclasses.replace(history, stop=find_stops(settings.stop, history.stop, token)[0])
        scores = state.scores
        if scores is not None:
            scores = scores.at[:, step].set(join(*all_processed).reshape(b * n, v))
    return BeamState(state.cache, history, running, tuple(all_finished), scores)


def _candidates(
    settings: Settings, key, running: Paths, stop: Any, processed: jax.Array, step: jax.Array, first: int
) -> tuple[Paths, jax.Array]:
    """Continuations ``[B, C]`` of beams ``[B, n]`` by processed scores ``[B, n, V]``, and which of them end.

    They are enough for n that do not end: the best ones, from the best down, or draws without replacement, in the order
    they were drawn. ``first`` is the place of the first of these beams, ``stop`` how far each is in a stop string.
    """
    b, n, v = processed.shape
    count = settings.candidates * n
    processed = processed.reshape(b, n * v)
    score = (running.score[:, :, None] + processed.reshape(b, n, v)).reshape(b, n * v)
    if settings.do_sample:
        # A key for each prompt and step: a draw does not depend on how many prompts there are.
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.fold_in(key, step)))(jnp.arange(b))
        score, index = draw_several(keys, score, count)
    else:
        score, index = jax.lax.top_k(score, count)
    parent, token = index // v, index % v
    ends = (token[..., None] == settings.eos_ids).any(-1)
    if settings.stop is not None:
        where = jnp.take_along_axis(stop.reshape(b, n), parent, axis=1)
        ends |= find_stops(settings.stop, where.reshape(-1), token.reshape(-1))[1].reshape(token.shape)
    if _beams(settings).groups > 1 and settings.eos_ids.size:
        # As transformers has it there: whichever id ends a hypothesis, the first of them is written.
        token = jnp.where(ends, settings.eos_ids[0], token)
    logprob = jnp.take_along_axis(processed, index, axis=1)
    return running.extend(parent, parent + first, token, logprob, score, step), ends


def _diverse(beams: Beams, logprobs: jax.Array, said: list[jax.Array]) -> jax.Array:
    """Log-probabilities ``[B · n, V]`` less a penalty for each beam of the groups before that says a token now."""
    for tokens in said:
        b, n = tokens.shape
        times = jnp.zeros((b, logprobs.shape[1]), jnp.float32).at[jnp.arange(b)[:, None], tokens].add(1.0)
        logprobs = logprobs - beams.diversity_penalty * jnp.repeat(times, n, axis=0)
    return logprobs


def _found(settings: Settings, state: BeamState) -> Found:
    beams, finished = _beams(settings), state.finished
    if beams.groups > 1:
        its_own = range(0, beams.num_beams, beams.group_size)
        running = [jax.tree.map(lambda x, i=i: x[:, i : i + beams.group_size], state.running) for i in its_own]
        length = state.history.new
        finished = [finish_open(beams, *both, length) for both in zip(finished, running, strict=True)]
    paths = join(*(group.paths for group in finished))
    paths = pick(paths, best(settings.num_return_sequences, paths.score))
    rows = jnp.arange(paths.slots.shape[0])[:, None, None] * beams.num_beams
    paths = dataclasses.replace(paths, slots=jnp.where(paths.slots < 0, -1, paths.slots + rows))
    paths = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), paths)
    return Found(paths.tokens, paths.logprobs, state.scores, paths.score, paths.slots)


def _beams(settings: Settings) -> Beams:
    assert settings.beams is not None  # the settings of beam search
    return settings.beams
