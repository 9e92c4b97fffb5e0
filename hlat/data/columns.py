"""Columns of parquet and arrow files: only those that are needed, and no value that is not what it says.

Arrow checks neither that text is UTF-8 nor, in its own files, that what points into a buffer stays inside it.
Both are checked here before a value is made; one that cannot be made is `Unreadable`, and ends nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from hlat.errors import UserError, missing_extra
from hlat.storage.blocks import content

_ROWS_AT_ONCE = 1000
_SHOWN, _LONGEST_TYPE = 20, 60  # names of columns, characters of a type in a message
_FAILURES = (ValueError, TypeError, ArithmeticError, LookupError, NotImplementedError, ImportError)
# What pyarrow raises for a value that Python cannot hold: a date beyond the year 9999, an unknown time zone,
# nanoseconds without pandas.


class Unreadable(NamedTuple):
    """In place of a value that cannot be read: the `reason`."""

    reason: str


class Part(NamedTuple):
    """Consecutive rows: number of the first one in the file, from 0; names and Arrow arrays of columns."""

    first: int
    columns: dict[str, Any]


class Table:
    """A parquet or arrow file, opened over a memory map.

    Args:
        path: the file.
        layout: `parquet` or `arrow` (file or stream).
        start, stop: of an arrow file, the rows start <= i < stop that are meant; -1: to its end.

    Raises UserError if it is not readable, or names a column in something else than UTF-8 (parquet).
    """

    def __init__(self, path: str, layout: str, start: int = 0, stop: int = -1) -> None:
        try:
            import pyarrow
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise missing_extra("pyarrow", "data", f"reading '{os.path.basename(path)}'") from error
        self._arrow, self.path, self.layout = pyarrow, path, layout
        self._start, self._rows = start, None if stop < 0 else stop - start
        with self._readable():
            self._buffer = pyarrow.py_buffer(content(path))
            if layout == "parquet":
                self._parquet = parquet.ParquetFile(pyarrow.BufferReader(self._buffer))
                schema = self._parquet.schema_arrow
            else:
                schema = self._ipc(None).schema
            self._fields = [schema.field(number) for number in range(len(schema))]
        self.names = [_name(field) for field in self._fields]

    def parts(self, wanted: int, size: int) -> Iterator[tuple[int, int, int]]:
        """(start, stop, bytes) of parts of the file: row groups of parquet; or rows of an arrow file of
        `size` bytes, about `wanted` bytes each.
        """
        if self.layout == "parquet":
            metadata = self._parquet.metadata
            for group in range(metadata.num_row_groups):
                yield group, group + 1, metadata.row_group(group).total_byte_size
            return
        with self._readable():
            rows = self._read_arrow([0] if self.names else None).num_rows  # of one column, which is enough
        step = max(1, rows * wanted // max(size, 1))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield start, stop, size * (stop - start) // rows

    def texts(self, field: str, start: int, stop: int) -> Iterator[tuple[int, Any]]:
        """(row, text) of rows in the parts start <= i < stop: None where there is none, or `Unreadable`.

        Args:
            field: a column; `a.b` is the field b of the struct a unless there is a column of that whole name.

        Raises UserError for a field that is not there or holds no text.
        """
        steps, _ = self._find(field)
        for part in self._parts([steps[0]], start, stop, leaf=field):
            array = part.columns[steps[0]]
            with self._readable():
                for step in steps[1:]:
                    array = self._inside(array, step)
            for row, value in enumerate(self.values(array), part.first):
                yield row, as_text(value)

    def records(self, fields: Collection[str] | None) -> Iterator[tuple[int, dict[str, Any]]]:
        """(row, values by column) of all rows: of the columns `fields` that there are, or of all."""
        names = [name for name in dict.fromkeys(self.names) if name and (fields is None or name in fields)]
        for name in names:
            self._once(name)
        if not any(self.names):
            return
        for part in self._parts(names, 0, None):
            columns = {name: self.values(array) for name, array in part.columns.items()}
            for place in range(len(next(iter(columns.values())))):
                yield part.first + place, {name: values[place] for name, values in columns.items()}

    def values(self, array: Any) -> list[Any]:
        """Python values of an Arrow array, `Unreadable` among them."""
        if isinstance(array, self._arrow.ExtensionArray):
            array = array.storage
        try:
            array.validate(full=True)
            return array.to_pylist()  # type: ignore[no-any-return]
        except _FAILURES:
            pass  # one value spoils it: look at each
        if isinstance(array, self._arrow.DictionaryArray):
            known = self.values(array.dictionary)
            return [_picked(known, place) for place in self.values(array.indices)]
        try:
            array = array.view(
                _without_text(self._arrow, array.type)
            )  # a cast would follow what points astray
            array.validate(full=True)
        except _FAILURES as error:
            return [Unreadable(f"cannot be read ({error})")] * len(array)
        return [_value(array, place) for place in range(len(array))]

    def text_fields(self) -> list[str]:
        """The columns that hold text, and fields of structs that do, as `texts` takes them."""
        found: list[str] = []
        for name, field in zip(self.names, self._fields, strict=True):
            found += _text_fields(self._arrow, name, field.type) if name else []
        return found

    def _find(self, field: str) -> tuple[list[str], Any]:
        """The steps to a field that holds text, and its type. Raises UserError."""
        steps, rest, found = [field], "", self._named(field)
        if found is None:
            head, _, rest = field.partition(".")
            steps, found = [head], self._named(head) if rest else None
        while rest and found is not None and self._arrow.types.is_struct(found):
            inside = {_name(child): child.type for child in _children(found)}
            head, rest = (rest, "") if rest in inside else (rest.partition(".")[0], rest.partition(".")[2])
            steps, found = [*steps, head], inside.get(head)
        self._once(steps[0])
        if rest or found is None:
            raise self._no_text(f"no column '{field}'")
        if not _is_text(self._arrow, found):
            raise self._no_text(f"column '{field}' holds {_short(str(found))}, not text")
        return steps, found

    def _no_text(self, what: str) -> UserError:
        pairs = zip(self.names, self._fields, strict=True)
        columns = [f"{name or '(not UTF-8)'} ({_short(str(field.type))})" for name, field in pairs]
        names = self.text_fields()
        fix = f"set text_field to one of: {_some(names)}" if names else "no column holds text"
        what = f"{what}; the columns are: {_some(columns) or 'none'}"
        return UserError(what, where=self.path, fix=fix)

    def _named(self, name: str) -> Any:
        return self._fields[self.names.index(name)].type if name in self.names else None

    def _once(self, name: str) -> None:
        if self.names.count(name) > 1:
            what = f"there are {self.names.count(name)} columns '{name}'"
            raise UserError(what, where=self.path, fix="rename all but one")

    def _inside(self, array: Any, name: str) -> Any:
        import pyarrow.compute as compute

        number = next(n for n, child in enumerate(_children(array.type)) if _name(child) == name)
        return compute.struct_field(array, [number])

    def _parts(self, names: list[str], start: int, stop: int | None, leaf: str = "") -> Iterator[Part]:
        """The rows of the parts, some at a time, with the named columns."""
        if not names:
            names = [name for name in self.names if name][:1]  # no column is asked for, but rows are counted
        read = self._parquet_parts if self.layout == "parquet" else self._arrow_parts
        batches = read(names, start, stop, leaf)
        while True:
            with self._readable():
                first, batch = next(batches, (0, None))
                if batch is None:
                    return
                batch.validate()
                found = [_name(batch.schema.field(number)) for number in range(batch.num_columns)]
                part = Part(first, {name: batch.column(found.index(name)) for name in names})
            yield part

    def _parquet_parts(
        self, names: list[str], start: int, stop: int | None, leaf: str
    ) -> Iterator[tuple[int, Any]]:
        metadata = self._parquet.metadata
        counts = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        columns = [leaf] if leaf and leaf not in self.names else names  # of a struct one field is read
        for group in range(start, len(counts) if stop is None else stop):
            first = sum(counts[:group])
            for batch in self._parquet.iter_batches(_ROWS_AT_ONCE, row_groups=[group], columns=columns):
                yield first, batch
                first += batch.num_rows

    def _arrow_parts(
        self, names: list[str], start: int, stop: int | None, leaf: str
    ) -> Iterator[tuple[int, Any]]:
        table = self._read_arrow([self.names.index(name) for name in names])
        rows = table.slice(start, None if stop is None else stop - start)
        for batch in rows.to_batches(_ROWS_AT_ONCE):
            yield start, batch
            start += batch.num_rows

    def _read_arrow(self, columns: list[int] | None) -> Any:
        return self._ipc(columns).read_all().slice(self._start, self._rows)

    def _ipc(self, columns: list[int] | None) -> Any:
        """A reader of the columns, by number. Nothing is copied, unless it is compressed."""
        options = self._arrow.ipc.IpcReadOptions(included_fields=columns)
        is_file = self._buffer.slice(0, min(6, self._buffer.size)).to_pybytes() == b"ARROW1"
        open_any = self._arrow.ipc.open_file if is_file else self._arrow.ipc.open_stream
        return open_any(self._arrow.BufferReader(self._buffer), options=options)

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except UnicodeDecodeError as error:
            fix = "rename the column"
            raise UserError("the name of a column is not UTF-8", where=self.path, fix=fix) from error
        except (self._arrow.ArrowException, OSError, *_FAILURES) as error:
            what = f"not a readable {self.layout} file ({str(error) or type(error).__name__})"
            raise UserError(what, where=self.path, fix="repair or remove the file") from error


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + ", …" * (len(names) > _SHOWN)


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST_TYPE else f"{text[:_LONGEST_TYPE]}…"


def as_text(value: Any) -> Any:
    """The text of bytes that are UTF-8, else `Unreadable`; any other value as it is."""
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        return Unreadable("not UTF-8")


def _name(field: Any) -> str:
    """A column's name; empty for one that is not UTF-8, which nobody can ask for."""
    try:
        return str(field.name)
    except UnicodeDecodeError:
        return ""


def _children(kind: Any) -> list[Any]:
    return [kind.field(number) for number in range(kind.num_fields)]


def _tests(arrow: Any, *names: str) -> list[Callable[[Any], bool]]:
    known = (getattr(arrow.types, f"is_{name}", None) for name in names)
    return [test for test in known if test]


def _is_text(arrow: Any, kind: Any) -> bool:
    """Whether values of an Arrow type are text, or bytes that may be."""
    if isinstance(kind, arrow.BaseExtensionType):
        kind = kind.storage_type
    if arrow.types.is_dictionary(kind):
        kind = kind.value_type
    return _is_string(arrow, kind) or any(
        test(kind) for test in _tests(arrow, "binary", "large_binary", "binary_view", "fixed_size_binary")
    )


def _is_string(arrow: Any, kind: Any) -> bool:
    return any(test(kind) for test in _tests(arrow, "string", "large_string", "string_view"))


def _text_fields(arrow: Any, name: str, kind: Any) -> list[str]:
    if _is_text(arrow, kind):
        return [name]
    if not arrow.types.is_struct(kind):
        return []
    inside = [(_name(child), child.type) for child in _children(kind)]
    return [path for child, of in inside if child for path in _text_fields(arrow, f"{name}.{child}", of)]


def _without_text(arrow: Any, kind: Any) -> Any:
    """The type with bytes in place of text, at every depth."""
    if _is_string(arrow, kind):
        if arrow.types.is_string(kind):
            return arrow.binary()
        return arrow.large_binary() if arrow.types.is_large_string(kind) else arrow.binary_view()
    if arrow.types.is_struct(kind):
        children = [child.with_type(_without_text(arrow, child.type)) for child in _children(kind)]
        return arrow.struct(children)
    if arrow.types.is_list(kind) or arrow.types.is_large_list(kind):
        make = arrow.list_ if arrow.types.is_list(kind) else arrow.large_list
        return make(kind.value_field.with_type(_without_text(arrow, kind.value_type)))
    return kind


def _picked(known: list[Any], place: Any) -> Any:
    """The value that an index of a dictionary stands for."""
    if place is None or isinstance(place, Unreadable):
        return place
    return known[place] if 0 <= place < len(known) else Unreadable("cannot be read (it points to no value)")


def _value(array: Any, place: int) -> Any:
    try:
        return _decoded(array[place].as_py())
    except UnicodeDecodeError:
        return Unreadable("not UTF-8")
    except _FAILURES as error:
        return Unreadable(f"cannot be read ({error})")


def _decoded(value: Any) -> Any:
    """The value with text in place of bytes. Raises UnicodeDecodeError."""
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    if isinstance(value, dict):
        return {name: _decoded(item) for name, item in value.items()}
    return value
