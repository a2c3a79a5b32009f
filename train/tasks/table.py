"""Rows of a CSV, TSV, JSON or JSON Lines file, each with the place it stands at; and rows into such files."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl")


@dataclasses.dataclass(frozen=True)
class Row:
    """The fields of one row, and where it stands: ``"train.csv, line 17"``."""

    fields: dict[str, Any]
    where: str

    def text(self, name: str) -> str:
        """The text of a field.

        Raises:
          ValueError: it is not there, or is no text.
        """
        value = self.fields.get(name)
        if value is None:
            raise ValueError(f"{self.where} has no {name!r}")
        if not isinstance(value, str):
            raise ValueError(f"{self.where}: {name!r} should be text, not {type(value).__name__}")
        return value


def read_rows(path: str | Path, columns: Iterable[str] = ()) -> list[Row]:
    """The rows of a file, by its suffix: ``.csv`` and ``.tsv`` with a header, ``.jsonl``, or ``.json`` with one list.

    Args:
      columns: names that the file should have. In JSON a row may still lack one.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: another suffix, a line that cannot be read, no rows, or a column that is not there.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} should end in one of {', '.join(SUFFIXES)}, which say how it is read")
    read = _separated if path.suffix in (".csv", ".tsv") else _objects
    try:
        rows = list(read(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error.reason} at byte {error.start}") from None
    if not rows:
        raise ValueError(f"{path} has no rows")
    known: dict[str, None] = {}
    for row in rows[:1] if path.suffix in (".csv", ".tsv") else rows:
        known |= dict.fromkeys(row.fields)
    missing = [name for name in columns if name not in known]
    if missing:
        raise ValueError(f"{path} has no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, known))}")
    return rows


def _separated(path: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, dialect="excel-tab" if path.suffix == ".tsv" else "excel", strict=True)
        try:
            for fields in reader:
                where = f"{path.name}, line {reader.line_num}"
                if None in fields:
                    raise ValueError(f"{where} has more cells than the header; is one not quoted?")
                yield Row(dict(fields), where)
        except csv.Error as error:
            raise ValueError(f"{path.name}, line {reader.line_num}: {error}") from None


def _objects(path: Path) -> Iterator[Row]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json":
        found = _parsed(text, path.name)
        if not isinstance(found, list):
            raise ValueError(f"{path.name} should hold one list of objects, not a {type(found).__name__}")
        each = [(f"{path.name}, row {i}", value) for i, value in enumerate(found, 1)]
    else:
        # Not splitlines: U+2028 and its like may stand in a string of JSON.
        lines = enumerate(text.split("\n"), 1)
        where = ((f"{path.name}, line {i}", line) for i, line in lines if line.strip())
        each = ((place, _parsed(line, place)) for place, line in where)
    for place, value in each:
        if not isinstance(value, dict):
            raise ValueError(f"{place} should be an object with the fields of a row, not a {type(value).__name__}")
        yield Row(value, place)


def _parsed(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes rows, which need not all have the same fields, by the suffix: ``.jsonl``, ``.csv`` or ``.tsv``.

    In a table a list or an object is written as JSON, and what is None or missing as nothing.
    """
    path, rows = Path(path), list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            return
        names = dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(file, list(names), dialect="excel-tab" if path.suffix == ".tsv" else "excel")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _cell(value) for name, value in row.items()})


def check_writable(path: str | Path) -> Path:
    """A path whose suffix says how rows are to be written.

    Raises:
      ValueError: it says nothing that can be written.
    """
    path = Path(path)
    if path.suffix not in (".jsonl", ".csv", ".tsv"):
        raise ValueError(f"{path} should end in .jsonl, .csv or .tsv, which say how it is written")
    return path


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
