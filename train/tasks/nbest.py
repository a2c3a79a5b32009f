"""Answers out of the logits of starts and ends: the likeliest spans of all windows of a question."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from .spans import Window
from .squad import Question


@dataclasses.dataclass(frozen=True)
class Span:
    """A candidate: its text, the characters of the context where it starts and ends, and its two logits' sum.

    ``start == end == -1`` and an empty text for none.
    """

    text: str
    start: int
    end: int
    score: float


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a question is answered with, and the candidates, likeliest first, with their probabilities."""

    id: str
    text: str
    nbest: tuple[Span, ...]
    probabilities: tuple[float, ...]
    null_odds: float | None = None

    def record(self) -> dict[str, Any]:
        """For a file of JSON Lines."""
        each = zip(self.nbest, self.probabilities, strict=True)
        nbest = [dataclasses.asdict(span) | {"probability": p} for span, p in each]
        more = {} if self.null_odds is None else {"null_odds": self.null_odds}
        return {"id": self.id, "answer": self.text, **more, "nbest": nbest}


def answers(
    questions: Sequence[Question],
    windows: Sequence[Window],
    start_logits: Sequence[np.ndarray],
    end_logits: Sequence[np.ndarray],
    *,
    n_best_size: int = 20,
    max_answer_length: int = 30,
    with_null: bool = False,
    null_threshold: float = 0.0,
) -> list[Answer]:
    """An answer to each question.

    A span starts and ends in the context of one window, starts where that window sees most (`Window.central`), and has
    at most ``max_answer_length`` tokens.

    Args:
      windows: of `spans.windows`.
      start_logits, end_logits: of each window, ``[≥ T]``.
      with_null: some questions have no answer: it is ``""`` where the score of none, the least that a window gives to
        its first token, is by more than ``null_threshold`` above that of the best span.
    """
    of_question: list[list[int]] = [[] for _ in questions]
    for w, window in enumerate(windows):
        of_question[window.question].append(w)
    made = []
    for question, own in zip(questions, of_question, strict=True):
        spans, null = [], np.inf
        for w in own:
            n = len(windows[w].ids)
            start, end = (np.asarray(each[w], np.float64)[:n] for each in (start_logits, end_logits))
            spans += _spans(question, windows[w], start, end, n_best_size, max_answer_length)
            null = min(null, float(start[0] + end[0]))
        made.append(_answer(question, spans, null if with_null else None, n_best_size, null_threshold))
    return made


def _spans(question: Question, window: Window, start, end, n_best_size: int, longest: int) -> list[Span]:
    """The best ``n_best_size`` of one window: of all pairs of a start and an end that may be."""
    inside = window.offsets[:, 0] >= 0
    n = len(window.ids)
    far = np.arange(n)[None] - np.arange(n)[:, None]
    allowed = (inside & window.central)[:, None] & inside[None] & (far >= 0) & (far < longest)
    score = np.where(allowed, start[:, None] + end[None], -np.inf).reshape(-1)
    kept = min(n_best_size, int(allowed.sum()))
    best = np.argpartition(-score, kept - 1)[:kept] if kept else []
    made = []
    for place in best:
        first, last = divmod(int(place), n)
        begin, stop = int(window.offsets[first, 0]), int(window.offsets[last, 1])
        text = question.context[begin:stop]
        begin += len(text) - len(text.lstrip())
        made.append(Span(text.strip(), begin, begin + len(text.strip()), float(score[place])))
    return made


def _answer(question: Question, spans: list[Span], null: float | None, n_best_size: int, threshold: float) -> Answer:
    spans = sorted(spans, key=lambda span: -span.score)
    seen: dict[tuple[str, int], Span] = {}
    for span in spans:  # two windows, or a token of a blank, may give the same
        if span.text:
            seen.setdefault((span.text, span.start), span)
    best = list(seen.values())[:n_best_size]
    odds = None
    if null is not None:
        odds = null - best[0].score if best else None
        best = sorted([*best, Span("", -1, -1, null)], key=lambda span: -span.score)
    text = next((span.text for span in best if span.text), "")
    if odds is not None and odds > threshold:
        text = ""
    powers = np.exp([span.score - best[0].score for span in best]) if best else np.zeros(0)
    probabilities = powers / powers.sum() if best else powers
    return Answer(question.id, text, tuple(best), tuple(map(float, probabilities)), odds)
