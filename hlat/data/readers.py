"""Documents out of the pieces of a source: plain text, JSON and columns, compressed or not.

A document comes back as text, or as the reason why it was left out; nothing is dropped without one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from hlat.data.columns import Table, Unreadable
from hlat.data.formats import BOM, HEAD_BYTES, Form, container, form_of, opened
from hlat.data.json_values import LONGEST, Value, lines_of, lookup, parsed, text_fields, values_of
from hlat.data.losses import EMPTY
from hlat.data.sources import InputFile, Piece

_SHOWN = 20  # fields in a message


class Document(NamedTuple):
    """`text` of one document, or None and the `reason` it was left out. `name` says where it is from.

    `size` is the bytes that were left out where that is more than one record; `fields` what holds text in a
    record that has none where it was looked for.
    """

    name: str
    text: str | None
    reason: str = ""
    size: int = 0
    fields: str = ""


def read_pieces(files: Sequence[InputFile], pieces: Sequence[Piece], text_field: str) -> Iterator[Document]:
    """The documents of the pieces, in order. Raises UserError when a file cannot be read at all."""
    for piece in pieces:
        file = files[piece.file]
        form = form_of(file.path, file.kind)
        if form.layout in ("parquet", "arrow"):
            yield from _columnar(file, form, piece, text_field)
        elif form.layout == "text":
            yield _text(file, form)
        else:
            for name, value in json_records(file, form, piece):
                yield _document(name, value, text_field)


def pieces_of(file: InputFile, wanted: int) -> Iterator[tuple[int, int, int]]:
    """(start, stop, bytes) of the parts into which a file is cut, of about `wanted` bytes: bytes of a file of
    lines, row groups of parquet, rows of arrow; any other file is whole. Raises UserError.
    """
    form = form_of(file.path, file.kind)
    if form.layout in ("parquet", "arrow"):
        yield from table(file, form).parts(wanted, file.size)
        return
    step = wanted if form == Form("jsonl", "") else file.size
    for start in range(0, file.size, step):
        stop = min(start + step, file.size)
        yield start, stop, stop - start


def table(file: InputFile, form: Form) -> Table:
    """The columns of a parquet or arrow file. Raises UserError."""
    return Table(file.path, form.layout, file.start, file.stop)


def json_records(file: InputFile, form: Form, piece: Piece | None = None) -> Iterator[tuple[str, Value]]:
    """(name, value) of the JSON values in a file, or in a piece of it. Raises UserError."""
    with opened(file.path, form.packing) as stream:
        if form == Form("jsonl", "") and piece is not None:
            yield from _lines_of_piece(file, stream, piece)
        else:
            for value in values_of(stream, form.layout):
                yield f"{file.name}:{value.place}", value


def no_text(value: Any, field: str) -> str:
    """Why a value of a field is no text."""
    if value is None:
        return f"no text under '{field}'"
    if isinstance(value, Unreadable):
        return value.reason
    kinds = {list: "a list", dict: "an object", bool: "true or false", int: "a number", float: "a number"}
    return f"'{field}' holds {kinds.get(type(value), type(value).__name__)}, not text"


def _lines_of_piece(file: InputFile, stream: Any, piece: Piece) -> Iterator[tuple[str, Value]]:
    """The lines that start within the piece's bytes, so that every line belongs to exactly one piece."""
    position = piece.start
    what = container(stream.read(HEAD_BYTES))
    if what:
        if not position:
            yield file.name, Value(1, None, what, file.size)
        return
    stream.seek(max(position - 1, 0))
    if position:
        position += next((size for size, _ in lines_of(stream)), 1) - 1
    for size, line in lines_of(stream, piece.stop - position):
        if line is None:
            yield f"{file.name}@{position}", Value(position, None, "too long", size)
        elif line.strip():
            yield f"{file.name}@{position}", Value(position, *parsed(line), 0)
        position += size


def _text(file: InputFile, form: Form) -> Document:
    with opened(file.path, form.packing) as stream:
        raw = stream.read(LONGEST + 1) if form.packing else stream.read()
    if form.packing and len(raw) > LONGEST:
        return Document(file.name, None, "too long", file.size)
    what = container(raw[:HEAD_BYTES])
    if not what and b"\0" in raw:
        what = "binary (holds NUL bytes)"
    if what:
        return Document(file.name, None, what, len(raw))
    try:
        text = raw.removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError:
        return Document(file.name, None, "not UTF-8", len(raw))
    return Document(file.name, text) if text else Document(file.name, None, EMPTY)


def _document(name: str, value: Value, text_field: str) -> Document:
    if value.reason:
        return Document(name, None, value.reason, value.size)
    if not isinstance(value.value, dict):
        return Document(name, None, "not a JSON object")
    text = lookup(value.value, text_field)
    if not isinstance(text, str):
        fields = text_fields(value.value)
        shown = ", ".join(fields[:_SHOWN]) + ", …" * (len(fields) > _SHOWN)
        return Document(name, None, no_text(text, text_field), 0, shown)
    return _checked(name, text)


def _checked(name: str, text: str) -> Document:
    if not text:
        return Document(name, None, EMPTY)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return Document(name, None, "not Unicode text (lone surrogate)")
    return Document(name, text)


def _columnar(file: InputFile, form: Form, piece: Piece, text_field: str) -> Iterator[Document]:
    first = int(file.kind != form.layout)  # where the name does not tell of rows, they count as lines do
    for row, value in table(file, form).texts(text_field, piece.start, piece.stop):
        name = f"{file.name}:{row + first}"
        if isinstance(value, str):
            yield _checked(name, value)
        else:
            yield Document(name, None, no_text(value, text_field))
