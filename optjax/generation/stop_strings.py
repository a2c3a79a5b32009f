"""Stop strings, found as text wherever tokens begin and end.

All strings together make one automaton over bytes (Aho and Corasick 1975). What a token's bytes do to each of its
states is worked out before anything runs, so that in the loop a token is two look-ups, however long the strings. Most
tokens do the same: they share a class, and the table stays small. Bytes, not characters, as a token may hold a part of
one; UTF-8 makes that the same search.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@partial(jax.tree_util.register_dataclass, data_fields=["classes", "moves"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class StopTable:
    """What each token does to a search.

    Attributes:
      classes: ``[V]`` int32, the class of each id.
      moves: ``[N, C]`` int32, for state and class: twice the next state, and 1 more where a string was completed.
    """

    classes: Any
    moves: Any


def find_stops(table: StopTable, state: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The states ``[B]`` after one token ``[B]`` each, and whether ``[B]`` it completed a stop string."""
    move = jnp.asarray(table.moves)[state, jnp.asarray(table.classes)[token]]
    return move // 2, move % 2 == 1


def search_prompts(table: StopTable, ids: jax.Array, mask: jax.Array) -> jax.Array:
    """The states ``[B]`` after prompts ``[B, T]``: a stop string may begin there. What is complete there counts not."""
    # Every token holds a byte at least, and no state remembers more bytes than there are states.
    last = min(ids.shape[1], table.moves.shape[0])

    def step(state, column):
        token, real = column
        return jnp.where(real, find_stops(table, state, token)[0], state), None

    columns = ids[:, -last:].T, mask[:, -last:].T
    return jax.lax.scan(step, jnp.zeros_like(ids[:, 0], jnp.int32), columns)[0]


@lru_cache(maxsize=8)
def stop_table(strings: tuple[str, ...], tokenizer: Any, vocab_size: int) -> StopTable:
    """The table of ``strings`` for a tokenizer's tokens; an id that it does not have is no text.

    Raises:
      ValueError: a tokenizer that is not byte-level.
    """
    step, complete = _automaton(sorted({string.encode() for string in strings}))
    texts = token_bytes(tokenizer)
    ids = np.array([i for i in texts if i < vocab_size], np.int64)
    lengths = np.array([len(texts[i]) for i in ids])
    ids, lengths = ids[np.argsort(-lengths, kind="stable")], -np.sort(-lengths)
    padded = np.zeros((len(ids), lengths[0]), np.uint8)
    for row, i in enumerate(ids):
        padded[row, : lengths[row]] = np.frombuffer(texts[i], np.uint8)
    longer = [int((lengths > column).sum()) for column in range(lengths[0])]

    states = len(complete)
    moves = np.zeros((states, vocab_size), np.int32)
    classes = np.zeros(vocab_size, np.int64)
    for state in range(states):
        at, found = np.full(len(ids), state), np.zeros(len(ids), bool)
        for column, n in enumerate(longer):
            at[:n] = step[at[:n], padded[:n, column]]
            found[:n] |= complete[at[:n]]
        moves[state, ids] = 2 * at + found
        classes = np.unique(classes * 2 * states + moves[state], return_inverse=True)[1]
    _, first = np.unique(classes, return_index=True)
    # In sizes that other strings will share, so that they are the same program.
    table = np.zeros((_size(states), _size(len(first))), np.int32)
    table[:states, : len(first)] = moves[:, first]
    return StopTable(classes.astype(np.int32), table)


def token_bytes(tokenizer: Any) -> dict[int, bytes]:
    """The bytes that each token of a byte-level tokenizer stands for; a special token is its name."""
    from tokenizers.decoders import ByteLevel

    backend = getattr(tokenizer, "backend", None) or getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not isinstance(backend.decoder, ByteLevel):
        raise ValueError(f"stop_strings need a byte-level tokenizer, such as optjax.Tokenizer; {tokenizer!r} is none")
    known = _byte_of_character()
    texts = {}
    for token, i in backend.get_vocab(with_added_tokens=True).items():
        own = [known.get(character) for character in token]
        texts[i] = token.encode() if None in own else bytes(byte for byte in own if byte is not None)
    return {i: text for i, text in texts.items() if text}


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: a printable byte of Latin-1 is its own character, the others come from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _automaton(strings: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The states' next ones for each byte, ``[N, 256]``, and which of them complete a string ``[N]``."""
    children: list[dict[int, int]] = [{}]
    complete = [False]
    for string in strings:
        node = 0
        for byte in string:
            if byte not in children[node]:
                children[node][byte] = len(children)
                children.append({})
                complete.append(False)
            node = children[node][byte]
        complete[node] = True
    step = np.zeros((len(children), 256), np.int32)
    # A state's longest proper suffix that is a state too is done before it: it is shorter.
    suffix = [0] * len(children)
    queue = deque([0])
    while queue:
        node = queue.popleft()
        complete[node] |= complete[suffix[node]]
        step[node] = step[suffix[node]]
        for byte, child in children[node].items():
            suffix[child] = int(step[suffix[node], byte]) if node else 0
            step[node, byte] = child
            queue.append(child)
    return step, np.array(complete)


def _size(n: int) -> int:
    return max(16, 1 << (n - 1).bit_length())
