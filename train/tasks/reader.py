"""A model that answers questions from contexts: its batches, its logits, its answers, and their scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax

from optjax import Params, Tokenizer, question_answering

from .inference import over_examples
from .nbest import Answer, answers
from .spans import Window, windows
from .squad import Question, squad_scores
from .texts import collate
from .watch import Watch, nobody


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """How questions become batches, and logits answers.

    Attributes:
      longest, doc_stride, max_question_length: of `spans.windows`.
      n_best_size, max_answer_length, null_threshold: of `nbest.answers`.
      pad_id: to fill batches with.
      batch_size: of evaluation and prediction.
    """

    tokenizer: Tokenizer
    longest: int
    doc_stride: int
    max_question_length: int
    n_best_size: int
    max_answer_length: int
    null_threshold: float
    pad_id: int
    batch_size: int

    @property
    def collate(self):
        return partial(collate, pad_id=self.pad_id, longest=self.longest)

    def windows(self, questions: Sequence[Question]) -> list[Window]:
        """As `spans.windows`."""
        return windows(questions, self.tokenizer, self.longest, self.doc_stride, self.max_question_length)

    def answers(
        self,
        params: Params,
        questions: Sequence[Question],
        windows: Sequence[Window],
        with_null: bool,
        watch: Watch = nobody,
    ) -> list[Answer]:
        """An answer to each question, by what the model gives to its windows."""
        examples: list[dict[str, Any]] = [{"input_ids": window.ids} for window in windows]
        found = over_examples(_logits, params, examples, self.collate, self.batch_size, watch)
        starts, ends = zip(*found, strict=True)
        return answers(
            questions,
            windows,
            starts,
            ends,
            n_best_size=self.n_best_size,
            max_answer_length=self.max_answer_length,
            with_null=with_null,
            null_threshold=self.null_threshold,
        )


def score(questions: Sequence[Question], found: Sequence[Answer]) -> dict[str, float]:
    """As `squad_scores`."""
    return squad_scores(questions, {answer.id: answer.text for answer in found})


def has_unanswerable(questions: Sequence[Question]) -> bool:
    """Whether some are said to have no answer, as in SQuAD 2.0."""
    return any(question.labelled and not question.answers for question in questions)


def _logits(params: Params, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    out = question_answering(params, batch["input_ids"], attention_mask=batch["attention_mask"])
    return out.start_logits, out.end_logits
