"""Documents out of the pieces of a source: plain text, jsonl, gzipped jsonl, parquet, arrow.

A document comes back as text, or as the reason why it was left out; nothing is dropped without one.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from hlat.data.sources import InputFile, Piece
from hlat.errors import UserError, missing_extra
from hlat.storage.blocks import content, open_file

_ROWS_AT_ONCE = 1000


class Document(NamedTuple):
    """`text` of one document, or None and the `reason` it was left out. `name` says where it is from."""

    name: str
    text: str | None
    reason: str = ""


def read_pieces(files: Sequence[InputFile], pieces: Sequence[Piece], text_field: str) -> Iterator[Document]:
    """The documents of the pieces, in order. Raises UserError when a file cannot be read at all."""
    for piece in pieces:
        file = files[piece.file]
        try:
            if file.kind == "text":
                yield _text(file)
            elif file.kind == "jsonl":
                yield from _jsonl(file, piece, text_field)
            elif file.kind == "jsonl.gz":
                yield from _jsonl_gz(file, text_field)
            else:
                yield from _columnar(file, piece, text_field)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(
                f"cannot be read ({getattr(error, 'strerror', None) or error})",
                where=file.path,
                fix="repair or remove the file",
            ) from error


def _text(file: InputFile) -> Document:
    with open_file(file.path) as stream:
        return _decoded(file.name, stream.read())


def _decoded(name: str, raw: bytes) -> Document:
    if b"\0" in raw:
        return Document(name, None, "binary (holds NUL bytes)")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return Document(name, None, "not UTF-8")
    return Document(name, text) if text else Document(name, None, "empty")


def _jsonl(file: InputFile, piece: Piece, text_field: str) -> Iterator[Document]:
    """The lines that start within the piece's bytes, so that every line belongs to exactly one piece."""
    with open_file(file.path) as stream:
        position = piece.start
        if position:
            stream.seek(position - 1)
            position += len(stream.readline()) - 1
        while position < piece.stop:
            line = stream.readline()
            if not line:
                break
            yield from _record(f"{file.name}@{position}", line, text_field)
            position += len(line)


def _jsonl_gz(file: InputFile, text_field: str) -> Iterator[Document]:
    with open_file(file.path) as packed, gzip.open(packed, "rb") as stream:
        for number, line in enumerate(stream, 1):
            yield from _record(f"{file.name}:{number}", line, text_field)


def _record(name: str, line: bytes, text_field: str) -> Iterator[Document]:
    if not line.strip():
        return
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        yield Document(name, None, "not JSON")
        return
    yield _value(name, record.get(text_field) if isinstance(record, dict) else None, text_field)


def _value(name: str, value: Any, text_field: str) -> Document:
    if not isinstance(value, str):
        return Document(name, None, f"no text under '{text_field}'")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return Document(name, None, "not Unicode text (lone surrogate)")
    return Document(name, value) if value else Document(name, None, "empty")


def columnar_parts(file: InputFile, wanted: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, bytes) of the parts of a parquet file (row groups) or an arrow file (rows)."""
    if file.kind == "parquet":
        metadata = parquet_file(file).metadata
        for group in range(metadata.num_row_groups):
            yield group, group + 1, metadata.row_group(group).total_byte_size
        return
    first, end = file.start, arrow_table(file).num_rows if file.stop < 0 else file.stop
    step = max(1, (end - first) * wanted // max(file.size, 1))
    for start in range(first, end, step):
        stop = min(start + step, end)
        yield start, stop, file.size * (stop - start) // (end - first)


def _columnar(file: InputFile, piece: Piece, text_field: str) -> Iterator[Document]:
    for offset, column in _columns(file, piece, text_field):
        for start in range(0, len(column), _ROWS_AT_ONCE):
            for row, value in enumerate(column.slice(start, _ROWS_AT_ONCE).to_pylist(), offset + start):
                yield _value(f"{file.name}:{row}", value, text_field)


def _columns(file: InputFile, piece: Piece, text_field: str) -> Iterator[tuple[int, Any]]:
    """(first row number in the file, column) of the piece."""
    if file.kind == "parquet":
        parquet = parquet_file(file)
        _check_field(file, parquet.schema_arrow.names, text_field)
        first = sum(parquet.metadata.row_group(group).num_rows for group in range(piece.start))
        for group in range(piece.start, piece.stop):
            yield first, parquet.read_row_group(group, columns=[text_field]).column(0)
            first += parquet.metadata.row_group(group).num_rows
    else:
        table = arrow_table(file)
        _check_field(file, table.column_names, text_field)
        yield piece.start, table.column(text_field).slice(piece.start, piece.stop - piece.start)


def _check_field(file: InputFile, names: Sequence[str], text_field: str) -> None:
    if text_field not in names:
        raise UserError(
            f"no column '{text_field}'", where=file.path, fix=f"set text_field to one of: {', '.join(names)}"
        )


def parquet_file(file: InputFile) -> Any:
    """A `pyarrow.parquet.ParquetFile` over a memory map. Raises UserError."""
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise missing_extra("pyarrow", "data", f"reading '{os.path.basename(file.path)}'") from error
    import pyarrow

    try:
        return parquet.ParquetFile(pyarrow.BufferReader(content(file.path)))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"not a readable parquet file ({error})", where=file.path, fix="repair or remove the file"
        ) from error


def arrow_table(file: InputFile) -> Any:
    """The whole table over a memory map: nothing is copied until rows are read.

    Both IPC forms, file and stream.
    """
    try:
        import pyarrow
    except ImportError as error:
        raise missing_extra("pyarrow", "data", f"reading '{os.path.basename(file.path)}'") from error
    try:
        buffer = pyarrow.py_buffer(content(file.path))
        is_file = buffer[:6].to_pybytes() == b"ARROW1"
        return (pyarrow.ipc.open_file(buffer) if is_file else pyarrow.ipc.open_stream(buffer)).read_all()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"not a readable arrow file ({error})", where=file.path, fix="repair or remove the file"
        ) from error
