"""`metrics.jsonl`: one JSON object a line, appended in whole lines, readable after a crash at any byte."""

from __future__ import annotations

import contextlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hlat.errors import SaveFailed

Row = dict[str, Any]
MOST_WAITING = 256 << 20  # bytes of rows kept in memory while the file cannot be written


def finite(value: Any) -> Any:
    """The value with every NaN and infinity, at any depth, replaced by None: JSON has no word for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def encode(row: Mapping[str, Any]) -> bytes:
    """The row as one line. Floats keep every digit (Python's repr), so reading gives the same bits."""
    return json.dumps(finite(row), allow_nan=False, separators=(",", ":")).encode() + b"\n"


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a metrics file in file order; lines that are not a JSON object (torn) are passed over.

    Raises FileNotFoundError when the file is missing.
    """
    with path.open("rb") as file:
        for line in file:
            row = _decode(line)
            if row is not None:
                yield row


def truncate_after(path: Path, step: int) -> int:
    """Remove every row whose `step` is greater than `step`, and torn lines; rows without a step stay.

    Rows at the end are cut off in place, which a full disk allows; else the file is rewritten beside itself
    and renamed, so a crash leaves either the old or the new one.

    Raises SaveFailed when the disk does not allow it.

    Returns:
        The number of lines removed; 0, without touching the file, when there is nothing to remove or no file.
    """
    return len(_cut(path, lambda row: _is_after(row, step)))


def move_after(path: Path, step: int, to: Path) -> int:
    """`truncate_after` of a run that goes back to `step`: what is removed is first appended to the file `to`
    (a crash in between leaves it in both, a full disk loses it), and the records of earlier times the run
    went back stay.
    """

    def move(lines: list[bytes]) -> None:
        try:
            append(to, b"".join(line for line in lines if line.endswith(b"\n")))
        except SaveFailed as error:
            warnings.warn(error.line(), stacklevel=2)

    return len(_cut(path, lambda row: _taken_back(row, step), move))


def _taken_back(row: Row, step: int) -> bool:
    return _is_after(row, step) and (row.get("kind"), row.get("policy")) != ("anomaly", "rewind")


def _cut(
    path: Path, goes: Callable[[Row], bool], before: Callable[[list[bytes]], None] = lambda lines: None
) -> list[bytes]:
    """Remove torn lines and the rows that go, after `before` was given them; returns them."""
    if not path.exists():
        return []
    kept: list[bytes] = []
    removed: list[bytes] = []
    at_the_end = True
    with path.open("rb") as file:
        for line in file:
            row = _decode(line)
            gone = row is None or goes(row)
            (removed if gone else kept).append(line)
            at_the_end = at_the_end and (gone or not removed)
    if not removed:
        return removed
    before(removed)
    try:
        if at_the_end:  # also where the disk has no room for a second file
            os.truncate(path, sum(map(len, kept)))
        else:
            replace_file(path, b"".join(kept))
    except OSError as error:
        raise _write_error(path, error) from error
    return removed


def append(path: Path, lines: bytes) -> None:
    """Add whole lines to a file. Raises UserError when it cannot be written."""
    try:
        with path.open("ab") as file:
            file.write(lines)
    except OSError as error:
        raise _write_error(path, error) from error


def replace_file(path: Path, content: bytes) -> None:
    """Write a whole file so that a reader, or a crash, meets either the old content or the new."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


class MetricsFile:
    """Appends rows to `metrics.jsonl`. Rows wait in memory until `flush`, which writes them with one call.

    Opening cuts off a last line that a crash tore. A write that fails part-way (full disk) is undone, so the
    file never holds half a row; its rows stay in memory and are written, in order, once there is room.

    Attributes:
        trouble: why rows are waiting; None when all that were flushed are in the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trouble: OSError | None = None
        self._waiting: list[bytes] = []
        self._whole: int | None = None  # size to go back to, where undoing half a write has failed
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        except OSError as error:
            raise _write_error(path, error) from error
        self._cut_torn_line()

    def row(self, row: Mapping[str, Any]) -> None:
        """Queue one row."""
        self._waiting.append(encode(row))

    def flush(self) -> None:
        """Append the queued rows, or keep them and set `trouble`. Raises SaveFailed when too many wait."""
        if not self._waiting:
            return
        block = memoryview(b"".join(self._waiting))
        size = len(block)
        try:
            self._append(block)
        except OSError as error:
            if self.trouble is None:
                what = f"{_write_error(self.path, error).line()}; rows wait in memory until it can be written"
                warnings.warn(what, stacklevel=2)
            self.trouble = error
            if size > MOST_WAITING:
                raise _write_error(self.path, error) from error
            return
        self._waiting.clear()
        self.trouble = None

    def _append(self, block: memoryview) -> None:
        if self._whole is not None:
            os.ftruncate(self._file, self._whole)
        self._whole = os.fstat(self._file).st_size
        try:
            while block:
                block = block[os.write(self._file, block) :]
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._whole)
                self._whole = None
            raise
        self._whole = None

    def take_back(self, step: int, to: Path) -> None:
        """The run goes back to `step`: move the rows after it to the file `to`. See `move_after`."""
        self.flush()
        waiting = [(line, _decode(line)) for line in self._waiting]
        self._waiting = [line for line, row in waiting if row is not None and not _taken_back(row, step)]
        if not self._waiting:
            self.trouble = None
        move_after(self.path, step, to)
        os.close(self._file)  # the file may be another one now
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        self._whole = None

    def close(self) -> None:
        """Flush and close; calling it again does nothing. Raises SaveFailed when rows are lost with it."""
        if self._file < 0:
            return
        try:
            self.flush()
            if self.trouble is not None:
                raise _write_error(self.path, self.trouble) from self.trouble
        finally:
            os.close(self._file)
            self._file = -1

    def _cut_torn_line(self) -> None:
        size = os.fstat(self._file).st_size
        end = size
        while end:  # read backwards: the torn line may be longer than one block
            start = max(0, end - 65536)
            newline = os.pread(self._file, end - start, start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        if end != size:
            os.ftruncate(self._file, end)


def _decode(line: bytes) -> Row | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _is_after(row: Row, step: int) -> bool:
    number = row.get("step")
    return isinstance(number, (int, float)) and number > step


def _write_error(path: Path, error: OSError) -> SaveFailed:
    return SaveFailed(
        f"cannot write metrics ({error.strerror})", where=str(path), fix="free disk space or make it writable"
    )
