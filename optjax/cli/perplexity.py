"""The work of ``optjax score --perplexity``: a text of any length, read in windows that slide or stand side by side."""

from __future__ import annotations

import argparse
import json
import math
import sys
from typing import NamedTuple

import optjax
from optjax.cli import models, terminal
from optjax.cli.terminal import UsageError


class Window(NamedTuple):
    """Tokens ``begin`` to ``end``, of which those from ``first`` on count; the others were counted before."""

    begin: int
    first: int
    end: int


def windows(tokens: int, max_length: int, stride: int) -> list[Window]:
    """Windows in which each of ``tokens`` but the very first counts once, after max_length - stride others at least.

    Each is ``max_length`` long, if there are as many tokens: the last one reads more before it, and counts fewer.
    """
    found = [Window(0, 1, min(max_length, tokens))]
    while (done := found[-1].end) < tokens:
        end = min(done + stride, tokens)
        found.append(Window(end - max_length, done, end))
    return found


def write_perplexity(arguments: argparse.Namespace, text: str) -> None:
    """Prints perplexity and bits per byte of ``text``.

    Raises:
      UsageError: windows longer than the model has positions, or a stride that leaves tokens out.
      ValueError: a text of a single token.
    """
    model = models.load(arguments)
    ids = model.tokenizer.encode(text)
    if len(ids) < 2:
        raise ValueError("the text has one token, and nothing predicts a first token; give a longer one")
    max_length, stride = _shape(arguments, model.params.config.max_position_embeddings)
    found = windows(len(ids), max_length, stride)
    if not arguments.quiet:
        terminal.note(model.title)
    total = _logprob(arguments, model.params, ids, found)
    n, size = len(ids) - 1, len(text.encode())
    figures = {
        "tokens": n,
        "bytes": size,
        "logprob": total,
        "perplexity": math.exp(-total / n),
        "bits_per_token": -total / math.log(2) / n,
        "bits_per_byte": -total / math.log(2) / size,
        "max_length": max_length,
        "stride": stride,
    }
    if arguments.jsonl:
        terminal.write(json.dumps(figures) + "\n")
        return
    terminal.write(
        f"perplexity {figures['perplexity']:,.4f}\n{figures['bits_per_byte']:.4f} bits per byte, "
        f"{figures['bits_per_token']:.4f} bits per token\n{n:,} tokens in {len(found):,} windows of {max_length} that "
        f"move on by {stride}; {size:,} bytes\n"
    )


def _shape(arguments: argparse.Namespace, positions: int) -> tuple[int, int]:
    max_length = positions if arguments.max_length is None else arguments.max_length
    if not 2 <= max_length <= positions:
        raise UsageError(
            f"--max-length should be from 2 to the {positions} positions of {arguments.model}, not {max_length}"
        )
    stride = max_length - 1 if arguments.stride is None else arguments.stride
    if stride >= max_length:
        raise UsageError(f"--stride should be below --max-length, here from 1 to {max_length - 1}, not {stride}")
    return max_length, stride


def _logprob(arguments: argparse.Namespace, params: optjax.Params, ids: list[int], found: list[Window]) -> float:
    from rich.console import Console
    from rich.progress import Progress

    step, total = arguments.batch_size, 0.0
    show = sys.stderr.isatty() and not arguments.quiet
    with Progress(console=Console(stderr=True), transient=True, disable=not show) as bar:
        task = bar.add_task("reading", total=len(ids) - 1)
        for start in range(0, len(found), step):
            some = found[start : start + step]
            scores = optjax.score(
                params,
                [ids[begin:first] for begin, first, _ in some],
                [ids[first:end] for _, first, end in some],
                batch_size=arguments.batch_size,
                attn_implementation=arguments.attn_implementation,
            )
            total += sum(score.logprob for score in scores)
            done = some[-1].end - 1
            bar.update(task, completed=done, description=f"perplexity {math.exp(-total / done):,.2f} so far")
    return total
