"""Questions and their contexts in windows that the model can read; where the answer lies in each.

A window is the tokenizer's pair of the question and a part of the context; neighbours share ``doc_stride`` tokens, so
that an answer is whole in one of them. A window without the answer, as one of a question that has none, points to its
first token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from optjax.tokenizer import Tokenizer

from .squad import Question


@dataclasses.dataclass(frozen=True, eq=False)
class Window:
    """Ids ``[T]`` of one window.

    Attributes:
      question: the index of its question.
      offsets: ``[T, 2]``, the characters of the context that a token stands for; -1 for what is no context.
      central: ``[T]``, whether no other window has more context on the scantier side of this token.
      start, end: the first and the last token of the answer; 0 and 0 where it is not here.
    """

    ids: np.ndarray
    question: int
    offsets: np.ndarray
    central: np.ndarray
    start: int = 0
    end: int = 0

    def example(self) -> dict[str, np.ndarray]:
        """As a row of a batch for training."""
        start, end = np.int32(self.start), np.int32(self.end)
        return {"input_ids": self.ids, "start_positions": np.asarray(start), "end_positions": np.asarray(end)}


def windows(
    questions: Sequence[Question],
    tokenizer: Tokenizer,
    max_length: int,
    doc_stride: int = 128,
    max_question_length: int = 64,
) -> list[Window]:
    """All windows of all questions, in their order.

    Raises:
      ValueError: no room for more than ``doc_stride`` tokens of context beside the longest question.
    """
    backend = tokenizer.backend
    added = backend.num_special_tokens_to_add(True)
    asked = backend.encode_batch([q.question.strip() for q in questions], add_special_tokens=False)
    made: list[Window] = []
    for i, (question, ids) in enumerate(zip(questions, asked, strict=True)):
        ids.truncate(max_question_length)
        room = max_length - added - len(ids)
        if room <= doc_stride:
            raise ValueError(
                f"question {question.id!r} of {len(ids)} tokens leaves {room} of --max-length {max_length} to its "
                f"context, which should be more than --doc-stride {doc_stride}"
            )
        context = backend.encode(question.context, add_special_tokens=False)
        context.truncate(room, stride=doc_stride)
        # Pairs of their overflowing parts are not wanted: what is cut off the question would be asked in its place.
        pairs = [backend.post_process(ids, part) for part in (context, *context.overflowing)]
        made += _with_central([_window(i, question, pair) for pair in pairs])
    return made


def _window(index: int, question: Question, encoded) -> Window:
    of_context = np.array([id == 1 for id in encoded.sequence_ids])
    offsets = np.where(of_context[:, None], np.array(encoded.offsets), -1).astype(np.int64)
    window = Window(np.array(encoded.ids, np.int32), index, offsets, of_context)
    if not question.answers:
        return window
    text, begin = question.answers[0]
    stop = begin + len(text)
    places = np.flatnonzero(of_context)
    if len(places) == 0 or offsets[places[0], 0] > begin or offsets[places[-1], 1] < stop:
        return window
    # A token may stand for the blank before a word too: the first that reaches into the answer, the last that begins
    # before its end.
    start = places[np.flatnonzero(offsets[places, 1] > begin)[0]]
    end = places[np.flatnonzero(offsets[places, 0] < stop)[-1]]
    return dataclasses.replace(window, start=int(start), end=int(end))


def _with_central(of_question: list[Window]) -> list[Window]:
    """The windows of one question with ``central`` set."""
    if len(of_question) == 1:
        return of_question
    best: dict[tuple[int, int], tuple[float, int]] = {}
    for w, window in enumerate(of_question):
        places = np.flatnonzero(window.central)
        for n, place in enumerate(places):
            # Of equals that with the longer window, then the first.
            score = min(n, len(places) - 1 - n) + 0.01 * len(places)
            key = tuple(window.offsets[place])
            if key not in best or score > best[key][0]:
                best[key] = score, w
    made = []
    for w, window in enumerate(of_question):
        central = np.zeros(len(window.ids), bool)
        for place in np.flatnonzero(window.central):
            central[place] = best[tuple(window.offsets[place])][1] == w
        made.append(dataclasses.replace(window, central=central))
    return made
