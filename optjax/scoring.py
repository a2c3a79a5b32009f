"""How probable texts are: log-probabilities of continuations, or of every token of a text, with the alternatives."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optjax.cache import own_cache
from optjax.generation.buckets import bucket
from optjax.generation.chunks import as_chunk_size, read
from optjax.generation.draw import most_probable
from optjax.generation.prefix import Prefix, abstract_cache, check_prefix, continued
from optjax.heads import lm_logits
from optjax.kernels.choice import attention_kind, told
from optjax.model import Inputs, decoder
from optjax.params import Params
from optjax.placed import constrain
from optjax.validate import as_count, as_ids, check_params, is_concrete

# Columns whose logits exist at a time: those of a whole text would take more memory than a small model. Buckets are
# multiples of it.
_BLOCK = 16


@dataclasses.dataclass(frozen=True)
class Score:
    """What `score` says of one text.

    Attributes:
      ids: ``[n]`` int32, the tokens looked at: those of the continuation, or all.
      token_logprobs: ``[n]`` float32, each one's natural log-probability after all before it; none is positive. NaN for
        the first token of a text, which nothing predicts, unless there is a prefix.
      logprob: their sum, NaN left out.
      is_greedy: whether each (but such a first one) is the most probable token: greedy decoding would say the same.
      top_ids, top_logprobs: ``[n, top_logprobs]``, the most probable tokens in each one's place, best first; -1 and NaN
        for the first token of a text. None where not asked for.
    """

    ids: np.ndarray
    token_logprobs: np.ndarray
    logprob: float
    is_greedy: bool
    top_ids: np.ndarray | None = None
    top_logprobs: np.ndarray | None = None


def score(
    params: Params,
    prompts: Sequence[Any],
    continuations: Sequence[Any] | None = None,
    *,
    top_logprobs: int = 0,
    batch_size: int = 8,
    prefix: Prefix | None = None,
    prefill_chunk_size: int | None = None,
    attn_implementation: str = "auto",
) -> list[Score]:
    """The log-probabilities of texts, or of continuations of prompts: an API's ``echo`` with ``logprobs``.

    Texts are sorted by length and computed in batches whose shapes come in buckets: another call with the same buckets
    compiles nothing. Logits are never held for a whole text.

    Args:
      params: with the ``causal_lm`` head.
      prompts: lists of ids, of any lengths; with a BOS where the model was trained with one (`Tokenizer.encode`).
      continuations: lists of ids, at least one each, one list for each prompt, which may then be empty. Encode them
        with ``add_special_tokens=False``, and with the space that begins a word. Without them all of ``prompts`` is
        scored.
      top_logprobs: how many alternatives to give for each token.
      batch_size: most texts computed at once.
      prefix: from `read_prefix`, one row: what all texts begin with, such as the examples of a few-shot prompt. It is
        not read again, and the first token of a text has a log-probability after it.
      prefill_chunk_size: read texts so many tokens at a time, at most: for long ones, in little memory.
      attn_implementation: ``"eager"``, ``"flash"`` or ``"auto"``, as of `forward`.

    Returns:
      A `Score` for each prompt, in order.

    Raises:
      ValueError: ids outside the vocabulary, an empty text, more tokens than max_position_embeddings, as many prompts
        as continuations do not come; all before anything is compiled. Inside ``jit``, where lists have no lengths yet.
    """
    config = check_params(params, ("causal_lm",)).config
    begun, ended = _listed(prompts), [] if continuations is None else _listed(continuations)
    if not is_concrete(params, begun, ended):
        raise ValueError("score works on lists of ids on the host and cannot run inside jit; use causal_lm there")
    top = as_count("top_logprobs", top_logprobs, 0, config.vocab_size)
    batch_size = as_count("batch_size", batch_size, 1)
    rows = [_as_row(row, config.vocab_size, f"prompts[{i}]", continuations is not None) for i, row in begun]
    begins = [0] * len(rows)
    if continuations is not None:
        ends = [_as_row(row, config.vocab_size, f"continuations[{i}]") for i, row in ended]
        if len(ends) != len(rows):
            raise ValueError(f"there are {len(rows)} prompts and {len(ends)} continuations; give one for each")
        begins = [len(row) for row in rows]
        rows = [np.concatenate(pair) for pair in zip(rows, ends, strict=True)]
    chunk_size, before = as_chunk_size(prefill_chunk_size), 0
    if prefix is not None:
        [before] = check_prefix(params, prefix, 1)
    longest = max(map(len, rows), default=0)
    if longest + before > config.max_position_embeddings:
        i = next(i for i, row in enumerate(rows) if len(row) == longest)
        has = f"{longest} tokens" if prefix is None else f"{longest} tokens after a prefix of {before}"
        raise ValueError(f"text {i} has {has}, more than max_position_embeddings = {config.max_position_embeddings}")

    columns = bucket(max(longest, 1))
    queries = columns if chunk_size is None else min(chunk_size, columns)
    past: Any = queries < columns
    if prefix is not None:
        past = abstract_cache(params, prefix, batch_size, columns)
    attention_kind(params, batch_size, queries, cache=past, attn_implementation=attn_implementation)
    how = told(params, attn_implementation)

    scores: dict[int, Score] = {}
    order = sorted(range(len(rows)), key=lambda i: (bucket(len(rows[i])), len(rows[i]) - begins[i]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        chosen = [rows[i] for i in batch], [begins[i] for i in batch]
        found = _batch(params, *chosen, batch_size, prefix, how, top=top, chunk_size=chunk_size)
        scores.update(zip(batch, found, strict=True))
    return [scores[i] for i in range(len(rows))]


def _batch(
    params: Params,
    rows: list[np.ndarray],
    begins: list[int],
    batch_size: int,
    prefix: Prefix | None,
    kind: str,
    **static: Any,
) -> list[Score]:
    size = min(batch_size, 1 << (len(rows) - 1).bit_length())
    # Padded on the left, so that what is asked for stands in the last columns.
    ids = np.zeros((size, bucket(max(map(len, rows)))), np.int32)
    mask = np.zeros(ids.shape, bool)
    mask[len(rows) :, -1] = True
    for i, row in enumerate(rows):
        ids[i, -len(row) :], mask[i, -len(row) :] = row, True
    window = min(bucket(max(len(row) - begin for row, begin in zip(rows, begins, strict=True))), ids.shape[1])
    host = jax.device_get(_score(params, ids, mask, prefix, window=window, kind=kind, **static))
    out = []
    for i, (row, begin) in enumerate(zip(rows, begins, strict=True)):
        n = len(row) - begin
        logprobs, best, *alternatives = (np.array(x[i, -n:]) for x in host)
        unpredicted = begin == 0 and prefix is None
        known = slice(1, None) if unpredicted else slice(None)
        if unpredicted:
            logprobs[0] = np.nan
            for x, none in zip(alternatives, (-1, np.nan), strict=False):
                x[0] = none
        total, greedy = float(logprobs[known].sum(dtype=np.float64)), bool((best == row[begin:])[known].all())
        out.append(Score(row[begin:], logprobs, total, greedy, *alternatives))
    return out


@partial(jax.jit, static_argnames=("window", "top", "chunk_size", "kind"))
def _score(
    params: Params,
    ids: jax.Array,
    mask: jax.Array,
    prefix: Prefix | None = None,
    *,
    window: int,
    top: int,
    chunk_size: int | None = None,
    kind: str = "eager",
) -> tuple[jax.Array, ...]:
    """Of the last ``window`` tokens of rows ``[B, T]``: log-probability and the best id in each one's place.

    Both ``[B, window]``; and the ``top`` best ids and their log-probabilities ``[B, window, top]``, if any.
    """
    b, t = ids.shape
    if prefix is not None:
        x, _ = read(params, ids, mask, continued(params, prefix, b, t), chunk_size, attn_implementation=kind)
    elif chunk_size is not None and chunk_size < t:
        x, _ = read(params, ids, mask, own_cache(params, b, t), chunk_size, attn_implementation=kind)
    else:
        x = decoder(params, Inputs(ids=ids, mask=mask, attn_implementation=kind)).last_hidden_state
    # What stands in column c is predicted in column c - 1; before a row's first token there is nothing, or the prefix.
    x = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))[:, :t]
    if prefix is not None:
        first = jnp.arange(t) == jnp.argmax(mask, axis=1)[:, None]
        x = jnp.where(first[:, :, None], prefix.hidden[:, -1:].astype(x.dtype), x)
    x = x[:, t - window :]
    blocks = x.reshape(b, window // _BLOCK, _BLOCK, -1).swapaxes(0, 1)
    targets = ids[:, t - window :].reshape(b, window // _BLOCK, _BLOCK).swapaxes(0, 1)

    def block(each):
        x, targets = each
        logits = lm_logits(params, x)
        log_p = jax.nn.log_softmax(logits, axis=-1)
        found = [jnp.take_along_axis(log_p, targets[:, :, None], axis=2)[:, :, 0]]
        found += [most_probable(logits.reshape(b * _BLOCK, -1)).reshape(b, _BLOCK)]
        if top:
            values, indices = jax.lax.top_k(log_p, top)
            found += [indices.astype(jnp.int32), values]
        return tuple(found)

    found = jax.lax.map(block, (blocks, targets))
    found = tuple(y.swapaxes(0, 1).reshape(b, window, *y.shape[3:]) for y in found)
    # Whole on every device, so that every process can read them.
    return tuple(constrain(params.placement, y, *(None,) * y.ndim) for y in found)


def _listed(rows: Any) -> list[tuple[int, Any]]:
    if isinstance(rows, str | bytes) or not hasattr(rows, "__iter__"):
        raise ValueError(f"expected a list of lists of ids, got {type(rows).__name__}; encode texts with a Tokenizer")
    return list(enumerate(rows))


def _as_row(row: Any, vocab_size: int, name: str, may_be_empty: bool = False) -> np.ndarray:
    try:
        dimensions = np.ndim(row)
    except ValueError:  # rows of rows of different lengths
        dimensions = 2
    if isinstance(row, str | bytes) or dimensions != 1:
        got = reprlib.repr(row) if isinstance(row, str | bytes | list | tuple) else f"shape {np.shape(row)}"
        raise ValueError(f"{name} should be a list of ids, got {got}")
    if len(row) == 0:
        if may_be_empty:
            return np.zeros(0, np.int32)
        raise ValueError(f"{name} is empty: there is nothing to score")
    return np.asarray(as_ids(np.asarray(row)[None], vocab_size, name))[0]
