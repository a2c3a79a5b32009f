"""Tokens beside a vocabulary, and marked ones in it: their ids, which are special, and how each is found in a text.

transformers writes them, for a tokenizer of ``vocab.json`` and ``merges.txt``, to ``added_tokens.json`` (ids), to
``added_tokens_decoder`` of ``tokenizer_config.json`` (all there is to say), and under their roles in the latter or in
``special_tokens_map.json``.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tokenizers

DECODER = "added_tokens_decoder"
_ROLES = tuple(f"{role}_token" for role in ("bos", "eos", "unk", "pad", "sep", "cls", "mask"))
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def add_tokens(
    backend: tokenizers.Tokenizer, ids: dict[str, Any], settings: dict[str, Any], names: dict[str, Any], where: Path
) -> set[str]:
    """Adds them to a tokenizer and returns their texts. What has a role but no id, in no file, is not added.

    Args:
      ids, settings, names: the contents of ``added_tokens.json``, ``tokenizer_config.json`` and
        ``special_tokens_map.json``.
      where: the files' folder, for errors.

    Raises:
      ValueError: a token cannot have the id that a file gives it, or is described by something else than transformers'
        fields.
    """
    numbered = {token: (id, {}) for token, id in ids.items()}
    numbered |= {entry["content"]: (id, entry) for id, entry in _decoder(settings, where)}
    named = {entry["content"]: entry for entry in _named(settings, names)}
    for token, (id, entry) in sorted(numbered.items(), key=lambda item: str(item[1][0]).zfill(20)):
        _add(backend, entry or named.get(token, {}), token, special=bool(entry.get("special")) or token in named)
        if backend.token_to_id(token) != id:
            there = backend.token_to_id(token)
            file = "tokenizer_config.json" if entry else "added_tokens.json"
            raise ValueError(f"{where / file} gives {token!r} id {id!r}; after vocab.json it is {there}")
    known = {token for token in named if token not in numbered and backend.token_to_id(token) is not None}
    for token in known:
        _add(backend, named[token], token, special=True)
    return {*numbered, *known}


def decoder_entry(state: dict[str, Any]) -> dict[str, Any]:
    """``added_tokens_decoder`` from the content of a ``tokenizer.json``."""
    return {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in state["added_tokens"]}


def _add(backend: tokenizers.Tokenizer, entry: dict[str, Any], token: str, special: bool) -> None:
    from tokenizers import AddedToken

    flags = {name: bool(entry[name]) for name in _FLAGS if name in entry}
    made = AddedToken(token, **({"normalized": not special} | flags))
    (backend.add_special_tokens if special else backend.add_tokens)([made])


def _decoder(settings: dict[str, Any], where: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    entries = settings.get(DECODER) or {}
    for id, entry in entries.items() if isinstance(entries, dict) else [("", None)]:
        if not id.isdecimal() or not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise ValueError(f"{where / 'tokenizer_config.json'} is damaged: {DECODER} should give ids their tokens")
        yield int(id), entry


def _named(settings: dict[str, Any], names: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Those with a role, and any other special ones."""
    for role in _ROLES:
        yield from _entries([settings.get(role) or names.get(role)])
    more = settings.get("additional_special_tokens") or names.get("additional_special_tokens")
    yield from _entries(more if isinstance(more, list) else [])


def _entries(tokens: list[Any]) -> Iterator[dict[str, Any]]:
    """Each a text or an object with its text."""
    for token in tokens:
        entry = token if isinstance(token, dict) else {"content": token}
        if isinstance(entry.get("content"), str) and entry["content"]:
            yield entry
