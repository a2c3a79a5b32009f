"""How good a classifier or a regression is. The same numbers as scikit-learn's and SciPy's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .labels import MULTI, REGRESSION, SINGLE

BETTER = {SINGLE: ("accuracy", "max"), MULTI: ("f1_micro", "max"), REGRESSION: ("mse", "min")}


def predictions(problem_type: str, logits: np.ndarray) -> np.ndarray:
    """What logits ``[B, N]`` say: the likeliest label ``[B]``, the labels likelier than not ``[B, N]``, or numbers."""
    if problem_type == SINGLE:
        return logits.argmax(1)
    if problem_type == MULTI:
        return (logits > 0).astype(np.int32)
    return logits[:, 0] if logits.shape[1] == 1 else logits


def probabilities(problem_type: str, logits: np.ndarray) -> np.ndarray:
    """Of each label: ``[B, N]``, by softmax, or by sigmoid where several may hold; numbers stay as they are."""
    if problem_type == REGRESSION:
        return logits
    if problem_type == MULTI:
        return 0.5 * (1 + np.tanh(0.5 * logits))
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def scores(problem_type: str, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The figures of a whole set.

    ``accuracy`` (of several labels: all of them right), ``f1_macro`` and ``f1_micro``; of numbers ``mse``, and for one
    column ``pearson`` and ``spearman`` (0 where one side is constant). F1 is averaged over the labels that occur,
    predicted or true; that of a label which is never right is 0.
    """
    if problem_type == REGRESSION:
        found = {"mse": float(np.mean(np.square(predicted.astype(np.float64) - labels)))}
        if labels.ndim == 1:
            found |= {"pearson": _pearson(predicted, labels), "spearman": _pearson(_ranks(predicted), _ranks(labels))}
        return found
    right = predicted == labels
    count = _counts(problem_type, predicted, labels)
    occurs = count.sum(0) > 0 if problem_type == SINGLE else np.ones(count.shape[1], bool)
    f1 = _f1(*count)
    return {
        "accuracy": float(np.mean(right if right.ndim == 1 else right.all(1))),
        "f1_macro": float(f1[occurs].mean()),
        "f1_micro": float(_f1(*count.sum(1))),
    }


def per_label(
    problem_type: str, predicted: np.ndarray, labels: np.ndarray, names: Sequence[str]
) -> list[dict[str, Any]]:
    """``label``, ``precision``, ``recall``, ``f1`` and ``support`` of each label; nothing for a regression."""
    if problem_type == REGRESSION:
        return []
    count = _counts(problem_type, predicted, labels, len(names))
    true, false, missed = count
    columns = (_share(true, true + false), _share(true, true + missed), _f1(*count), true + missed)
    return [
        {"label": name, "precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
        for name, p, r, f, s in zip(names, *columns, strict=True)
    ]


def _counts(problem_type: str, predicted: np.ndarray, labels: np.ndarray, classes: int | None = None) -> np.ndarray:
    """``[3, N]``: of each label how often it is rightly said, wrongly said, and missed."""
    if problem_type == SINGLE:
        classes = classes or int(max(predicted.max(), labels.max())) + 1
        predicted, labels = (np.eye(classes, dtype=np.int64)[each] for each in (predicted, labels))
    said, held = predicted.astype(bool), labels.astype(bool)
    return np.stack([(said & held).sum(0), (said & ~held).sum(0), (~said & held).sum(0)])


def _f1(true: Any, false: Any, missed: Any) -> Any:
    return _share(2 * true, 2 * true + false + missed)


def _share(part: Any, whole: Any) -> Any:
    """0 of 0 is 0."""
    return np.where(whole > 0, part / np.maximum(whole, 1), 0.0)


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    a, b = (each.astype(np.float64) - each.mean(dtype=np.float64) for each in (a, b))
    scale = np.sqrt(np.square(a).sum() * np.square(b).sum())
    return float((a * b).sum() / scale) if scale > 0 else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """From 1 on; equals share the mean of theirs."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place]
