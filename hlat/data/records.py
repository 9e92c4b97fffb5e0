"""Records, of which finetuning examples are made: rows of jsonl, parquet and arrow files, data sets, and the
two that need no download.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from hlat.data.columns import Unreadable, as_text
from hlat.data.formats import RECORDS, Form, form_of
from hlat.data.origins import FilePlaces, Place
from hlat.data.readers import json_records, table
from hlat.data.sources import InputFile, resolve_source
from hlat.data.stdlib import BUILTIN
from hlat.errors import UserError


class Record(NamedTuple):
    """`values` of one record by field, or None and the `reason` it cannot be used. `name` says where it is
    from, and `place` which line or row of which file that is; `fields` are the names of all its fields, also
    of those that were not asked for.
    """

    name: str
    values: dict[str, Any] | None
    reason: str = ""
    fields: tuple[str, ...] = ()
    place: Place | None = None


class Records:
    """The records of a source, which may be read more than once.

    Args:
        path: a file of JSON, parquet or arrow, or a folder of them.
        dataset: a built-in name (see `hlat.data.stdlib`), or a Hugging Face data set NAME[:CONFIG][@SPLIT].
        where: the key to name in errors.

    Attributes:
        other_files: reason -> how many files of the folder hold no records or were not taken, as far as it
            was read.

    Raises UserError when the source is missing or cannot be read.
    """

    def __init__(self, path: str | None, dataset: str | None, where: str) -> None:
        self._dataset, self._where = dataset, where
        self._source = None if dataset in BUILTIN else resolve_source(path=path, dataset=dataset, where=where)
        self.other_files = Counter[str]()

    def read(self, fields: Collection[str] | None = None) -> Iterator[Record]:
        """The records, in order.

        Args:
            fields: the columns to read of parquet and arrow files; None for all. A value of theirs that
                cannot be read leaves the record out; one of another column is None.

        Raises UserError when a file cannot be read, or there is none of records.
        """
        if self._source is None:
            for number, values in enumerate(BUILTIN[str(self._dataset)](), 1):
                yield Record(f"{self._dataset}:{number}", values, fields=tuple(values))
            return
        found, self.other_files = False, Counter(self._source.skipped)
        for number, file in enumerate(self._source.files):
            form = form_of(file.path, file.kind)
            if form.layout == "text":
                self.other_files[f"not a {RECORDS}"] += 1
                continue
            found, places = True, FilePlaces(self._source, number)
            columns = form.layout in ("parquet", "arrow")
            for record in _rows(file, form, fields) if columns else _values(file, form):
                yield record._replace(place=places.of(record.name))
        if not found:
            fix = f"give a {RECORDS}, or a folder of them"
            raise UserError(f"'{self._source.label}' holds no records", where=self._where, fix=fix)


def read_records(
    path: str | None, dataset: str | None, where: str, fields: Collection[str] | None = None
) -> Iterator[Record]:
    """The records of a source that is read once: the arguments of `Records` and of its `read`."""
    return Records(path, dataset, where).read(fields)


def _values(file: InputFile, form: Form) -> Iterator[Record]:
    for name, (_, value, reason, _) in json_records(file, form):
        if reason or not isinstance(value, dict):
            yield Record(name, None, reason or "not a JSON object")
        else:
            yield Record(name, value, fields=tuple(value))


def _rows(file: InputFile, form: Form, fields: Collection[str] | None) -> Iterator[Record]:
    columns = table(file, form)
    names = tuple(name for name in columns.names if name)
    for row, values in columns.records(fields):
        name = f"{file.name}:{row + 1}"
        values = {
            field: as_text(value) for field, value in values.items() if fields is None or field in fields
        }
        bad = [field for field, value in values.items() if isinstance(value, Unreadable)]
        if bad and fields is not None:
            yield Record(name, None, f"'{bad[0]}' {_reason(values[bad[0]])}", names)
        else:
            yield Record(name, values | dict.fromkeys(bad), fields=names)


def _reason(value: Unreadable) -> str:
    return f"is {value.reason}" if value.reason.startswith("not") else value.reason
