"""Records, of which finetuning examples are made: rows of jsonl, parquet and arrow files, data sets, and the
two that need no download.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from hlat.data.origins import FilePlaces, Place
from hlat.data.readers import arrow_table, parquet_file
from hlat.data.sources import InputFile, resolve_source
from hlat.data.stdlib import BUILTIN
from hlat.errors import UserError
from hlat.storage.blocks import open_file

_ROWS_AT_ONCE = 1000


class Record(NamedTuple):
    """`values` of one record by field, or None and the `reason` it cannot be used. `name` says where it is
    from, and `place` which line or row of which file that is.
    """

    name: str
    values: dict[str, Any] | None
    reason: str = ""
    place: Place | None = None


def read_records(path: str | None, dataset: str | None, where: str) -> Iterator[Record]:
    """The records of a source, in order.

    Args:
        path: a jsonl, parquet or arrow file, or a folder of them.
        dataset: a built-in name (see `hlat.data.stdlib`), or a Hugging Face data set NAME[:CONFIG][@SPLIT].
        where: the key to name in errors.

    Raises UserError when the source is missing, cannot be read or holds no file of records.
    """
    if dataset in BUILTIN:
        for number, values in enumerate(BUILTIN[dataset](), 1):
            yield Record(f"{dataset}:{number}", values)
        return
    source = resolve_source(path=path, dataset=dataset, where=where)
    files = [(number, file) for number, file in enumerate(source.files) if file.kind != "text"]
    if not files:
        raise UserError(
            f"'{source.label}' holds no records",
            where=where,
            fix="give a .jsonl, .jsonl.gz, .parquet or .arrow file, or a folder of them",
        )
    for number, file in files:
        places = FilePlaces(source, number)
        try:
            for record in _rows(file) if file.kind in ("parquet", "arrow") else _lines(file):
                yield record._replace(place=places.of(record.name))
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            fix = "repair or remove the file"
            raise UserError(f"cannot be read ({reason})", where=file.path, fix=fix) from error


def _lines(file: InputFile) -> Iterator[Record]:
    with open_file(file.path) as packed, gzip.open(packed) if file.kind == "jsonl.gz" else packed as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                yield _line(f"{file.name}:{number}", line)


def _line(name: str, line: bytes) -> Record:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return Record(name, None, "not JSON")
    return Record(name, values) if isinstance(values, dict) else Record(name, None, "not a JSON object")


def _rows(file: InputFile) -> Iterator[Record]:
    number = file.start
    for batch in _batches(file):
        for values in batch.to_pylist():
            number += 1
            yield Record(f"{file.name}:{number}", values)


def _batches(file: InputFile) -> Iterable[Any]:
    if file.kind == "parquet":
        return parquet_file(file).iter_batches(_ROWS_AT_ONCE)  # type: ignore[no-any-return]
    table = arrow_table(file)
    rows = table if file.stop < 0 else table.slice(file.start, file.stop - file.start)
    return rows.to_batches(_ROWS_AT_ONCE)  # type: ignore[no-any-return]
