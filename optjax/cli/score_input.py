"""What ``optjax score`` is to score: arguments, lines of a file, JSON lines, or what is piped in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from optjax.cli.prompts import name_of, read_lines, read_numbered_lines, read_prompts, read_whole
from optjax.cli.terminal import UsageError, note

_FORMS = '{"text": …}, {"prompt": …, "continuation": …} or {"prompt": …, "continuations": […]}'


@dataclass(frozen=True)
class Item:
    """A text to score, all of it, or what comes after its prompt. ``question`` counts the prompts."""

    question: int
    prompt: str | None
    text: str


def read_items(words: Sequence[str], file: str | None, *, quiet: bool = False) -> list[Item]:
    """At least one. The continuations of one prompt stand side by side.

    Raises:
      UsageError: nothing to score, an empty continuation, continuations for a .jsonl file, which has its own.
      ValueError: a line that is none of the forms of a .jsonl file, or not UTF-8.
      OSError: the file cannot be read.
    """
    if file is not None and file.endswith(".jsonl"):
        if words:
            raise UsageError("a .jsonl file names its own continuations; leave those of the command line out")
        lines = read_numbered_lines(file, "JSON object")
        questions = [_of_json(line, f"{name_of(file)}, line {i}") for i, line in lines.items()]
    elif file is not None:
        questions = [(text, list(words)) for text in read_lines(file, "text")]
    else:
        [text] = read_prompts(words[:1], None, quiet=quiet)
        questions = [(text, list(words[1:]))]
    items = list(_items(questions))
    if any(not item.text for item in items if item.prompt is not None):
        raise UsageError("a continuation is empty: there is nothing to score")
    if not quiet:
        _note_missing_space(items)
    return items


def read_document(words: Sequence[str], file: str | None, *, quiet: bool = False) -> str:
    """One text as a whole.

    Raises:
      UsageError: several texts, a text and a file, or no text.
      ValueError, OSError: as `read_items`.
    """
    if len(words) > 1 or (words and file is not None):
        raise UsageError("--perplexity takes one text: a TEXT in quotes, or a --file")
    text = read_prompts(words, None, quiet=quiet)[0] if file is None else read_whole(file)
    if not text:
        raise UsageError(f"{name_of(file or 'the text')} is empty: there is nothing to score")
    return text


def _items(questions: list[tuple[str, list[str]]]) -> Iterator[Item]:
    for i, (text, continuations) in enumerate(questions):
        if not continuations:
            yield Item(i, None, text)
            continue
        # Tokens begin with a space and do not end with one.
        prompt = text.rstrip(" ")
        for continuation in continuations:
            yield Item(i, prompt, text[len(prompt) :] + continuation if continuation else "")


def _of_json(line: str, where: str) -> tuple[str, list[str]]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{where} is no JSON ({error}); expected {_FORMS}") from None
    match entry:
        case {"text": str(text)} if not {"prompt", "continuation", "continuations"} & set(entry):
            return text, []
        case {"prompt": str(prompt), "continuation": str(text)} if "continuations" not in entry:
            return prompt, [text]
        case {"prompt": str(prompt), "continuations": [_, *_] as texts} if _all_texts(list(texts), entry):
            return prompt, list(texts)
    raise ValueError(f"{where} is {line if len(line) < 60 else line[:60] + '…'}; expected {_FORMS}")


def _all_texts(texts: list[Any], entry: dict[str, Any]) -> bool:
    return all(isinstance(text, str) for text in texts) and not {"text", "continuation"} & set(entry)


def _note_missing_space(items: list[Item]) -> None:
    for item in items:
        if item.prompt and item.prompt[-1:].isalnum() and item.text[:1].isalnum():
            joined = f"{item.prompt[-12:]}{item.text[:12]}"
            note(f"no space is between a text and its continuation, which reads “{joined}”")
            return
