"""The work of ``optjax score``: scores texts, and prints them as tables or JSON lines."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import numpy as np

import optjax
from optjax.cli import models, terminal
from optjax.cli.score_input import Item
from optjax.cli.score_tables import print_comparison, print_tokens
from optjax.cli.tokens import TokenNames

# Batches scored between one output and the next: texts of like length then meet in a batch.
BATCHES = 16


def write_scores(arguments: argparse.Namespace, items: list[Item]) -> None:
    """Prints what the arguments ask for of all texts.

    Raises:
      ValueError: a text longer than the model has positions.
    """
    model = models.load(arguments)
    names = TokenNames(model.tokenizer)
    if not arguments.quiet:
        terminal.note(model.title)
    rows = [_encode(model.tokenizer, item) for item in items]
    _check_lengths(arguments.model, model.params.config.max_position_embeddings, items, rows)
    scores = _scored(arguments, model.params, rows)
    pairs = zip(items, scores, strict=True)
    if arguments.jsonl:
        for item, score in pairs:
            terminal.write(json.dumps(as_dict(item, score, names), ensure_ascii=False) + "\n")
        return
    questions = items[-1].question + 1
    for question, group in groupby(pairs, key=lambda pair: pair[0].question):
        found = list(group)
        if questions > 1:
            terminal.write(f"==> {question + 1} of {questions} <==\n{found[0][0].prompt or ''}".rstrip("\n") + "\n")
        if len(found) == 1 or arguments.top_n:
            for item, score in found:
                print_tokens(item, score, names)
        if len(found) > 1:
            print_comparison(found)


def as_dict(item: Item, score: optjax.Score, names: TokenNames) -> dict[str, Any]:
    """A line of --jsonl; null where a token is the first, and nothing predicts it."""
    entry: dict[str, Any] = {} if item.prompt is None else {"prompt": item.prompt}
    entry |= {"text": item.text, "logprob": score.logprob, "perplexity": perplexity(score)}
    entry |= {"is_greedy": score.is_greedy, "ids": score.ids.tolist(), "tokens": [names[int(i)] for i in score.ids]}
    entry["token_logprobs"] = [None if math.isnan(x) else x for x in score.token_logprobs.tolist()]
    if score.top_ids is not None and score.top_logprobs is not None:
        entry["top_logprobs"] = [
            None
            if ids[0] < 0
            else [
                {"id": i, "token": names[i], "logprob": x} for i, x in zip(ids.tolist(), logprobs.tolist(), strict=True)
            ]
            for ids, logprobs in zip(score.top_ids, score.top_logprobs, strict=True)
        ]
    return entry


def perplexity(score: optjax.Score) -> float | None:
    """None where no token was predicted."""
    n = int((~np.isnan(score.token_logprobs)).sum())
    return math.exp(-score.logprob / n) if n else None


def _encode(tokenizer: optjax.Tokenizer, item: Item) -> tuple[list[int], list[int]]:
    """The ids that are read before, and those that are scored."""
    if item.prompt is None:
        return [], tokenizer.encode(item.text)
    return tokenizer.encode(item.prompt), tokenizer.encode(item.text, add_special_tokens=False)


def _check_lengths(name: str, limit: int, items: list[Item], rows: list[tuple[list[int], list[int]]]) -> None:
    for item, (before, ids) in zip(items, rows, strict=True):
        if len(before) + len(ids) > limit:
            text = (item.prompt or "") + item.text
            raise ValueError(
                f"{name} has {limit} positions, and the text {repr(text if len(text) < 40 else text[:40] + '…')} has "
                f"{len(before) + len(ids)} tokens; shorten it, or read it in windows with --perplexity"
            )
        if not ids:
            raise ValueError("a text has no tokens: there is nothing to score")


def _scored(
    arguments: argparse.Namespace, params: optjax.Params, rows: list[tuple[list[int], list[int]]]
) -> Iterator[optjax.Score]:
    step = BATCHES * arguments.batch_size
    for start in range(0, len(rows), step):
        if len(rows) > step and not arguments.quiet:
            terminal.status(f"{start} of {len(rows)} texts done")
        some = rows[start : start + step]
        scores = optjax.score(
            params,
            [before for before, _ in some],
            [ids for _, ids in some],
            top_logprobs=arguments.top_n or 0,
            batch_size=arguments.batch_size,
            attn_implementation=arguments.attn_implementation,
        )
        terminal.status("")
        yield from scores
