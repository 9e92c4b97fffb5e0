"""Which file and line each document of a tokenized folder came from.

    origins.json        the files by source; for each shard the pieces of files it was made of, and how many
                        lines of the file come before each
    train-00000.from    three little-endian uint64 for each run of documents: number of its first one in the
                        shard, the piece it is from, and its number there, counted from 1: the documents after
                        it in the run are the next lines (or rows) of that piece

A line without a document, one held out between two others, or the next file begins a run. So a thousand
million lines take some hundred megabytes, where the table of the documents takes 24 GB.

Folders of earlier versions have none of this; nor has a document that is no line, row or whole file.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hlat.data.formats import form_of, opened
from hlat.data.json_values import one_a_line
from hlat.data.readers import Document, read_pieces
from hlat.data.sources import InputFile, Piece, Source
from hlat.errors import UserError
from hlat.host import json_text

FILE, VERSION = "origins.json", 1
SUFFIX = ".from"
_CHUNK = 1 << 20
_COLUMNS = 3


def origin_files(manifest: dict[str, Any]) -> dict[str, str]:
    """Name and sha256 (hex) of the files of a tokenized folder that hold origins, as its manifest has them;
    empty for a folder of an earlier version.
    """
    shards = [shard for shards in manifest["shards"].values() for shard in shards]
    found = {
        f"{shard['file']}{SUFFIX}": str(shard["from_sha256"]) for shard in shards if "from_sha256" in shard
    }
    return found | ({FILE: str(manifest["origins_sha256"])} if "origins_sha256" in manifest else {})


def is_origin(name: str) -> bool:
    """Whether a file of a tokenized folder holds origins, by its name."""
    return name == FILE or name.endswith(SUFFIX)


class Place(NamedTuple):
    """Where a document is from: a file, and the line of it, counted from 1, or the row, counted from 0."""

    file: str
    line: int | None = None
    row: int | None = None

    def __str__(self) -> str:
        name = shown(self.file)
        if self.line is not None:
            return f"{name}:{self.line}"
        return name if self.row is None else f"{name} row {self.row}"


def shown(name: str) -> str:
    """A file's name for a terminal: what cannot be printed, or is no UTF-8, as an escape."""
    return "".join(letter if letter.isprintable() else _escaped(letter) for letter in name)


def _escaped(letter: str) -> str:
    if "\udc80" <= letter <= "\udcff":  # a byte that is no UTF-8
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode()


class FilePlaces:
    """The places of the records in one file of a source."""

    def __init__(self, source: Source, index: int) -> None:
        self._file, first = source.files[index], source.first_rows[index : index + 1]
        self._source = _named(replace(source, files=[self._file], first_rows=first))

    def of(self, name: str) -> Place:
        """The place of a record by the name that its reader gave it: the file's, a colon, a number from 1."""
        return _place(self._source, 0, _number(name, self._file))


def _by_rows(file: InputFile) -> bool:
    """Whether the records of a file are called by their number rather than by a line."""
    layout = file.kind.partition(".")[0]
    if layout != "json":
        return layout in ("parquet", "arrow")
    try:  # published sets call their JSON lines .json.gz
        with opened(file.path, form_of(file.path, file.kind).packing) as stream:
            return not one_a_line(stream)
    except UserError:
        return True  # that it cannot be read is told where it is read


class Places:
    """The places of the documents of one work unit, while it is read.

    Attributes:
        lines: line ends in each piece of a file of lines that is cut into several; 0 for others.
    """

    def __init__(self, files: Sequence[InputFile], pieces: Sequence[Piece], text_field: str) -> None:
        self._files, self._pieces, self._text_field = files, pieces, text_field
        self._found: list[tuple[int, int]] = []
        self.lines = [0] * len(pieces)

    def documents(self) -> Iterator[Document]:
        """The documents of the pieces, as `read_pieces` gives them."""
        for number, piece in enumerate(self._pieces):
            file = self._files[piece.file]
            whole = (piece.start, piece.stop) == (0, file.size) or file.kind in ("parquet", "arrow")
            with _LineEnds(file.path, piece.start) as ends:
                for document in read_pieces(self._files, [piece], self._text_field):
                    if document.text is not None:
                        self._found.append((number, _number(document.name, file, ends)))
                    yield document
                self.lines[number] = 0 if whole else ends.before(piece.stop)

    def take(self, count: int) -> list[tuple[int, int]]:
        """(piece, number) of the next so many documents that have text."""
        taken, self._found = self._found[:count], self._found[count:]
        return taken


def _number(name: str, file: InputFile, ends: _LineEnds | None = None) -> int:
    """The number, from 1, of a document in its file, or after `ends` began to count; 0 if it has none. Its
    name ends in `:NUMBER` (rows of columns count from 0) or `@POSITION`.
    """
    sign, digits = name[len(file.name) :][:1], name[len(file.name) + 1 :]
    if not digits.isdecimal():
        return 0 if sign else 1
    if sign == "@":
        return 0 if ends is None else ends.before(int(digits)) + 1
    return int(digits) + (ends is not None and file.kind in ("parquet", "arrow"))


class _LineEnds:
    """Counts the line ends in a file from a position on. Without the file, there are none."""

    def __init__(self, path: str, start: int) -> None:
        self._path, self._place, self._count = path, start, 0
        self._file: io.FileIO | None = None

    def __enter__(self) -> _LineEnds:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def before(self, position: int) -> int:
        """Line ends between the start and a position, which is not before that of an earlier call."""
        try:
            if self._file is None:
                self._file = io.FileIO(self._path)
                self._file.seek(self._place)
            while self._place < position and (part := self._file.read(min(position - self._place, _CHUNK))):
                self._count += part.count(b"\n")
                self._place += len(part)
        except OSError:
            pass  # that it has gone is told where it is read
        return self._count


class Writer:
    """Notes the documents of one shard in their order."""

    def __init__(self) -> None:
        self._runs: list[tuple[int, int, int]] = []
        self._count, self._next = 0, (-1, -1)

    def add(self, place: tuple[int, int]) -> None:
        """The next document is from (piece, number)."""
        piece, number = place
        if place != self._next:
            self._runs.append((self._count, piece, number))
        self._next = (piece, number + 1) if number else (-1, -1)
        self._count += 1

    def table(self) -> bytes:
        """The content of the shard's file of runs."""
        return np.array(self._runs, dtype="<u8").tobytes()


def describe(
    sources: Sequence[Source], units: Sequence[tuple[int, Sequence[Piece]]], lines: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """The content of origins.json.

    Args:
        units: source and pieces of each work unit, which is a shard of its number.
        lines: `Places.lines` of each.
    """
    before: dict[tuple[int, int], int] = {}
    shards = []
    for (source, pieces), ends in zip(units, lines, strict=True):
        found = []
        for piece, count in zip(pieces, ends, strict=True):
            file = (source, piece.file)
            found.append([piece.file, before.get(file, 0)])
            before[file] = before.get(file, 0) + count
        shards.append([source, found])
    return {"version": VERSION, "sources": [_named(source) for source in sources], "shards": shards}


def _named(source: Source) -> dict[str, Any]:
    files = [[file.name, _by_rows(file)] for file in source.files]
    if source.first_rows:  # rows of a data set: called by its name and their number in it
        return {"rows_of": source.label, "first": list(source.first_rows)}
    return {"root": source.root, "files": files}


def _place(source: dict[str, Any], file: int, number: int) -> Place:
    """The place of document `number`, from 1, in a file of a source that is described so; 0: not known."""
    if "rows_of" in source:
        return Place(source["rows_of"], row=source["first"][file] + number - 1)
    name, by_rows = source["files"][file]
    shown = os.path.join(source["root"], name)
    return Place(shown, row=number - 1) if number and by_rows else Place(shown, line=number or None)


class Origins:
    """The origins of the documents in a tokenized folder.

    Args:
        folder: the folder.
        named: the sources it was made of, where they are known better than the folder has them.

    Raises UserError for a damaged one.
    """

    def __init__(self, folder: Path, named: Sequence[Source] = ()) -> None:
        self._folder = folder
        try:
            content = json_text.loads((folder / FILE).read_bytes())
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']}")
            self._sources: list[Any] = [_named(source) for source in named] or list(content["sources"])
            self._shards = [(int(source), list(pieces)) for source, pieces in content["shards"]]
        except FileNotFoundError:
            self._sources, self._shards = [], []
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(folder, str(error)) from error
        self._runs = lru_cache(maxsize=16)(self._read_runs)

    @property
    def known(self) -> bool:
        """Whether the folder has them at all."""
        return bool(self._shards)

    def find(self, shard: str, document: int) -> Place | None:
        """The place of a document of a shard, such as `train-00000`; None where it is not known."""
        runs = self._runs(shard)
        if not self.known or not len(runs):
            return None
        run = int(np.searchsorted(runs[:, 0], document, side="right")) - 1
        first, piece, number = (int(value) for value in runs[run])
        try:
            source, pieces = self._shards[int(shard.rpartition("-")[2])]
            file, before = pieces[piece]
            return _place(self._sources[source], file, before + number + document - first if number else 0)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise _damaged(self._folder, f"{type(error).__name__}: {error}") from error

    def _read_runs(self, shard: str) -> np.ndarray:
        path = self._folder / f"{shard}{SUFFIX}"
        try:
            return np.fromfile(path, dtype="<u8").reshape(-1, _COLUMNS)
        except FileNotFoundError:
            return np.zeros((0, _COLUMNS), dtype="<u8")
        except (OSError, ValueError) as error:
            raise _damaged(self._folder, f"{path.name}: {error}") from error


def _damaged(folder: Path, reason: str) -> UserError:
    fix = "run `hlat data tokenize` again, with another --out; training needs none of it"
    return UserError(f"not origins that this version reads ({reason})", where=str(folder / FILE), fix=fix)
