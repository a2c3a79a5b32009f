"""What a classifier learns: labels out of a table's columns, as numbers; which kind they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from optjax.config import PROBLEM_TYPES

from .table import Row

SINGLE, MULTI, REGRESSION = "single_label_classification", "multi_label_classification", "regression"


@dataclasses.dataclass(frozen=True)
class Labels:
    """The labels of a task.

    Attributes:
      problem_type: as of Hugging Face's config: single label, multi-label, or regression.
      names: of each output of the model; ``id2label`` in its config.
      columns: one column; several are the yes or no of a multi-label task, or the numbers of a regression.
      separator: between the labels of a cell of a multi-label task.
    """

    problem_type: str
    names: tuple[str, ...]
    columns: Sequence[str]
    separator: str = ","

    def encode(self, rows: Sequence[Row]) -> np.ndarray:
        """Int32 ``[B]``; float32 ``[B, N]`` of 0 and 1 for multi-label; float32 ``[B]`` or ``[B, N]`` for regression.

        Raises:
          ValueError: a row has no label, or one that is unknown.
        """
        if self.problem_type == REGRESSION:
            numbers = np.array([[_number(row, name) for name in self.columns] for row in rows], np.float32)
            return numbers[:, 0] if len(self.columns) == 1 else numbers
        if self.problem_type == SINGLE:
            return np.array([self._index(_one(row, self.columns[0]), row) for row in rows], np.int32)
        made = np.zeros((len(rows), len(self.names)), np.float32)
        for line, row in zip(made, rows, strict=True):
            if len(self.columns) > 1:
                for name in self.columns:
                    line[self._index(name, row)] = _yes(row, name)
            else:
                line[[self._index(label, row) for label in _several(row, self.columns[0], self.separator)]] = 1
        return made

    def given(self, rows: Sequence[Row]) -> bool:
        """Whether all rows have labels; one that is empty says nothing, or of several labels that none holds."""
        missing = (None,) if self.problem_type == MULTI else (None, "")
        return all(row.fields.get(name) not in missing for row in rows for name in self.columns)

    def _index(self, label: str, row: Row) -> int:
        if label not in self.names:
            raise ValueError(f"{row.where} has the label {label!r}, which is not one of {', '.join(self.names)}")
        return self.names.index(label)


def find_labels(
    rows: Sequence[Row], columns: Sequence[str], problem_type: str | None = None, separator: str | None = None
) -> Labels:
    """The labels of the rows, by what stands in them.

    Without a ``problem_type``: a separator, a list in a cell, or several columns of 0 and 1 are multi-label; numbers
    of which one is no whole number are regression; all else is a single label. Names are sorted, whole numbers by
    their value first.

    Raises:
      ValueError: unknown problem_type, a row without a label, several columns for a single label, or one label in all.
    """
    if problem_type not in (None, *PROBLEM_TYPES):
        raise ValueError(f"problem_type {problem_type!r} is not one of {', '.join(PROBLEM_TYPES)}")
    if not columns:
        raise ValueError("name a column of labels")
    none_is_possible = separator is not None or problem_type == MULTI  # an empty cell: none of the labels
    for row in rows:
        for name in columns:
            value = row.fields.get(name)
            if value is None or (value == "" and not none_is_possible):
                raise ValueError(f"{row.where} has no label: {name!r} is empty")
    kind = problem_type or _infer(rows, columns, separator)
    if kind == REGRESSION:
        return Labels(kind, tuple(columns), tuple(columns))
    if kind == SINGLE:
        if len(columns) > 1:
            raise ValueError(f"a single label stands in one column, not in {len(columns)}: {', '.join(columns)}")
        names = _sorted({_one(row, columns[0]) for row in rows})
        if len(names) < 2:
            raise ValueError(f"all {len(rows)} rows have one label, {', '.join(names)!r}; there is nothing to learn")
        return Labels(kind, names, tuple(columns))
    separator = separator or ","
    found = {label for row in rows for label in _several(row, columns[0], separator)} if len(columns) == 1 else columns
    names = tuple(columns) if len(columns) > 1 else _sorted(set(found))
    if not names:
        raise ValueError(f"no row has a label in {columns[0]!r}")
    return Labels(kind, names, tuple(columns), separator)


def _infer(rows: Sequence[Row], columns: Sequence[str], separator: str | None) -> str:
    cells = [row.fields[name] for row in rows for name in columns]
    if separator is not None or any(isinstance(cell, list) for cell in cells):
        return MULTI
    numbers = [_as_number(cell) for cell in cells]
    if all(number is not None for number in numbers):
        if len(columns) > 1:
            return MULTI if set(numbers) <= {0.0, 1.0} else REGRESSION
        return REGRESSION if any(not float(number or 0).is_integer() for number in numbers) else SINGLE
    return SINGLE


def _sorted(names: set[str]) -> tuple[str, ...]:
    try:
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    except ValueError:
        return tuple(sorted(names))


def _as_number(cell: Any) -> float | None:
    try:
        number = float(cell)
    except (TypeError, ValueError):
        return None
    return number if np.isfinite(number) else None


def _number(row: Row, name: str) -> float:
    found = _as_number(row.fields.get(name))
    if found is None:
        raise ValueError(f"{row.where}: {name!r} should be a number, not {row.fields.get(name)!r}")
    return found


def _one(row: Row, name: str) -> str:
    value = row.fields.get(name)
    if value in (None, "") or isinstance(value, list | dict):
        raise ValueError(f"{row.where}: {name!r} should be one label, not {value!r}")
    return str(value)


def _several(row: Row, name: str, separator: str) -> list[str]:
    value = row.fields.get(name)
    parts = value if isinstance(value, list) else str("" if value is None else value).split(separator)
    return [label for part in parts if (label := str(part).strip())]


def _yes(row: Row, name: str) -> float:
    found = _as_number(row.fields.get(name))
    if found not in (0.0, 1.0):
        raise ValueError(f"{row.where}: {name!r} should be 0 or 1, not {row.fields.get(name)!r}")
    return float(found or 0)


def as_before(labels: Labels, names: Sequence[str] | None) -> Labels:
    """Labels in the order of a model that has learned them already, and perhaps others: it goes on with its head.

    Raises:
      ValueError: the head is for more or fewer labels.
    """
    if names is None:
        return labels
    if labels.problem_type != REGRESSION and set(labels.names) <= set(names):
        return dataclasses.replace(labels, names=tuple(names))
    if len(labels.names) != len(names):
        raise ValueError(
            f"the model has learned {', '.join(names)}, the data has {', '.join(labels.names)}: give --new-head to "
            "learn these with a new head in place of the model's"
        )
    return labels
