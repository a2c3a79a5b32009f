"""Documents in parquet and arrow files, read by pyarrow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .inputs import Slice


def pyarrow_for(path: Path | str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: pyarrow is needed to read it; pip install 'optjax[data]'") from None
    return pyarrow


def slices(path: Path, kind: str, text_field: str, size: int) -> Iterator[Slice]:
    """The row groups or record batches of a file, as few to a slice as make `size` bytes of text.

    Raises:
      ValueError: the file is damaged, or has no text in that field.
    """
    found = _row_groups(path, text_field) if kind == "parquet" else _batch_sizes(path, text_field)
    start = held = 0
    for number, bytes in enumerate(found):
        if held and held + bytes > size:
            yield Slice(str(path), kind, start, number, held)
            start, held = number, 0
        held += bytes
    if start < len(found):
        yield Slice(str(path), kind, start, len(found), held)


def read(part: Slice, text_field: str) -> Iterator[tuple[int, str | None]]:
    """(row, text) of a slice, rows counted from 1 over the whole file; None where it is null.

    Raises:
      ValueError: the file is damaged.
    """
    batches = _read_row_groups if part.kind == "parquet" else _read_batches
    pa = pyarrow_for(part.path)
    try:
        for row, column in batches(part, text_field):
            try:
                texts = column.cast(pa.large_string()).to_pylist()
            except UnicodeDecodeError as error:
                row += next(i for i, value in enumerate(column) if not _is_utf8(value))
                raise ValueError(f"{part.path}, row {row}: not UTF-8 ({error.reason})") from None
            yield from enumerate(texts, row)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{part.path}: damaged: {error}") from None


def _row_groups(path: Path, text_field: str) -> list[int]:
    pa = pyarrow_for(path)
    try:
        metadata = pa.parquet.read_metadata(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not a parquet file, or damaged: {error}") from None
    _check_field(path, metadata.schema.to_arrow_schema(), text_field)
    # Columns are counted by their leaves, and a leaf of another column may have the same name.
    column = next(i for i in range(metadata.num_columns) if metadata.schema.column(i).path == text_field)
    return [metadata.row_group(i).column(column).total_uncompressed_size for i in range(metadata.num_row_groups)]


def _read_row_groups(part: Slice, text_field: str) -> Iterator[tuple[int, Any]]:
    with pyarrow_for(part.path).parquet.ParquetFile(part.path) as file:
        row = 1 + sum(file.metadata.row_group(i).num_rows for i in range(part.start))
        for group in range(part.start, part.stop):
            for batch in file.iter_batches(1024, row_groups=[group], columns=[text_field]):
                yield row, batch.column(0)
                row += batch.num_rows


def _batch_sizes(path: Path, text_field: str) -> list[int]:
    pa = pyarrow_for(path)
    try:
        with pa.memory_map(str(path)) as source:
            batches = list(_batches(pa, source))
            if batches:
                _check_field(path, batches[0].schema, text_field)
            return [max(1, batch.column(text_field).nbytes) for batch in batches]
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: not an arrow file, or damaged: {error}") from None


def _read_batches(part: Slice, text_field: str) -> Iterator[tuple[int, Any]]:
    pa = pyarrow_for(part.path)
    row = 1
    with pa.memory_map(part.path) as source:
        for number, batch in enumerate(_batches(pa, source)):
            if number >= part.stop:
                break
            if number >= part.start:
                yield row, batch.column(text_field)
            row += batch.num_rows


def _batches(pa: Any, source: Any) -> Iterator[Any]:
    """Of either of arrow's formats: datasets are saved as streams, other programs write files. Nothing is copied."""
    if source.read(6) == b"ARROW1":
        file = pa.ipc.open_file(source)
        yield from map(file.get_batch, range(file.num_record_batches))
    else:
        source.seek(0)
        yield from pa.ipc.open_stream(source)


def _check_field(path: Path, schema: Any, text_field: str) -> None:
    pa = pyarrow_for(path)
    if text_field not in schema.names:
        raise ValueError(
            f"{path} has no column {text_field!r}, only {', '.join(schema.names)}; choose with --text-field"
        )
    kind = schema.field(text_field).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise ValueError(f"{path}: column {text_field!r} holds {kind}; expected strings")


def _is_utf8(value: Any) -> bool:
    try:
        value.as_py()
    except UnicodeDecodeError:
        return False
    return True
