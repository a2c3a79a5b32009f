"""Questions in SQuAD's format, 1.1 and 2.0, and how answers are scored there: exact match and F1.

Rajpurkar et al. 2016, section 6.1; Rajpurkar et al. 2018 for questions without an answer.
"""

from __future__ import annotations

import dataclasses
import json
import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a context; ``answers`` are texts and the characters they start at, ``title`` is of the article.

    None is left where the file says that the question cannot be answered. ``labelled`` is false where it does not say.
    """

    id: str
    title: str
    question: str
    context: str
    answers: tuple[tuple[str, int], ...]
    labelled: bool = True


def read_squad(path: str | Path) -> list[Question]:
    """The questions of a file.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is not in SQuAD's format, an answer does not stand in its context, or an id is there twice.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
        questions = [
            _question(path, article.get("title") or f"article {i}", paragraph["context"], each)
            for i, article in enumerate(found["data"], 1)
            for paragraph in article["paragraphs"]
            for each in paragraph["qas"]
        ]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not in SQuAD's format, data > paragraphs > context and qas > id, question, answers > text, "
            f"answer_start: {type(error).__name__} {error}"
        ) from None
    twice = [id for id, count in Counter(q.id for q in questions).items() if count > 1]
    if twice:
        raise ValueError(f"{path} has the id {twice[0]!r} more than once")
    if not questions:
        raise ValueError(f"{path} has no questions")
    return questions


def _question(path: Path, title: str, context: str, fields: Mapping[str, Any]) -> Question:
    given = fields.get("answers") or []
    if fields.get("is_impossible"):
        given = []
    answers = []
    for each in given:
        text, start = each["text"], each["answer_start"]
        if context[start : start + len(text)] != text:
            # Some files count characters otherwise: the nearest place where it stands.
            places = [match.start() for match in re.finditer(re.escape(text), context)]
            if not text or not places:
                raise ValueError(f"{path}: the answer {text!r} of question {fields['id']!r} is not in its context")
            start = min(places, key=lambda place: abs(place - each["answer_start"]))
        answers.append((text, start))
    labelled = "answers" in fields or "is_impossible" in fields
    return Question(str(fields["id"]), title, fields["question"], context, tuple(answers), labelled)


def normalize(text: str) -> list[str]:
    """The words that count: in lower case, without punctuation and articles."""
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(?:a|an|the)\b", " ", kept).split()


def exact_match(predicted: str, answer: str) -> float:
    return float(normalize(predicted) == normalize(answer))


def f1(predicted: str, answer: str) -> float:
    """Of the bags of words; where one of them is empty, 1 if both are."""
    said, true = normalize(predicted), normalize(answer)
    if not said or not true:
        return float(said == true)
    shared = sum((Counter(said) & Counter(true)).values())
    return 2 * shared / (len(said) + len(true))


def squad_scores(questions: Sequence[Question], predicted: Mapping[str, str]) -> dict[str, float]:
    """``exact_match`` and ``f1`` in percent, each answer against the nearest of those given; over all questions, and,
    where some have no answer, over those with (``has_answer_…``) and without (``no_answer_…``) too.

    Args:
      predicted: a text for each id; ``""`` says that there is no answer. One that is missing counts as wrong.
    """
    each: list[tuple[bool, float, float]] = []
    for question in questions:
        # An answer of articles and punctuation only is none.
        answers = [text for text, _ in question.answers if normalize(text)] or [""]
        said = predicted.get(question.id)
        exact, shared = (max(s(said, a) if said is not None else 0.0 for a in answers) for s in (exact_match, f1))
        each.append((bool(question.answers), exact, shared))
    groups = {"": each}
    if not all(has for has, _, _ in each):
        groups |= {"has_answer_": [e for e in each if e[0]], "no_answer_": [e for e in each if not e[0]]}
    found = {}
    for name, group in groups.items():
        if group:
            found[f"{name}exact_match"] = 100 * sum(e for _, e, _ in group) / len(group)
            found[f"{name}f1"] = 100 * sum(f for _, _, f in group) / len(group)
    return found
