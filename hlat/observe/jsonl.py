"""`metrics.jsonl`: one JSON object a line, appended in whole lines, readable after a crash at any byte.

Each process that trains begins with a row of kind `start`, and its rows name it (`by`). Such a row has a
number (`turn`), higher than those of all processes before: one of a lower number is from a process that was
stopped while it wrote, and comes too late. Rows that name another process than the last one that began were
written by one that had lost the folder: they do not count.
"""

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
from hlat.observe import durable
from hlat.observe.claim import UNCLAIMED, Claim

Row = dict[str, Any]
START = "start"  # kind of the row that each process begins with
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
    """The rows of a metrics file in file order; lines that are not a JSON object (torn) are passed over, and
    rows of a process that had lost the folder.

    Raises FileNotFoundError when the file is missing.
    """
    order = _Order()
    with path.open("rb") as file:
        for line in file:
            row = _decode(line)
            if row is not None and not order.is_late(row):
                yield row


class _Order:
    """Whose turn it is in a metrics file, row by row from its beginning."""

    def __init__(self) -> None:
        self._turn, self._by = 0, None

    def is_late(self, row: Row) -> bool:
        """Whether a process wrote the next row after another one had begun to train."""
        by = row.get("by")
        if row.get("kind") == START and _turn(row) >= self._turn:
            self._turn, self._by = _turn(row), by
        return by is not None and self._by is not None and by != self._by


def _turn(row: Row) -> int:
    turn = row.get("turn")
    return turn if isinstance(turn, int) else 0


def _last_turn(path: Path) -> int:
    """The number of the process that has begun last, as far as a file says; 0 where it does not."""
    with path.open("rb") as file:
        marks = [row for line in file if b'"start"' in line and (row := _decode(line)) is not None]
    return max((_turn(row) for row in marks if row.get("kind") == START), default=0)


def _allow() -> None:
    """No objection to a change of a file that nobody else has."""


def truncate_after(path: Path, step: int, confirm: Callable[[], None] = _allow) -> int:
    """Remove every row whose `step` is greater than `step`, torn lines, and rows of a process that had lost
    the folder; rows without a step stay, and those of kind `start`.

    Rows at the end are cut off in place, which a full disk allows; else the file is rewritten beside itself
    and renamed, so a crash leaves either the old or the new one.

    Args:
        path, step: the file, and the last step that stays.
        confirm: called at the last moment before the file is changed; what it raises leaves it as it is.

    Raises SaveFailed when the disk does not allow it.

    Returns:
        The number of lines removed; 0, without touching the file, when there is nothing to remove or no file.
    """
    return len(cut(path, lambda row: _is_after(row, step), confirm))


def move_after(path: Path, step: int, to: Path, confirm: Callable[[], None] = _allow) -> int:
    """`truncate_after` of a run that goes back to `step`: what is removed is first appended to the file `to`
    and on the disk there (a crash in between leaves it in both, a full disk loses it), and the records of
    earlier times the run went back stay.
    """

    def move(lines: list[bytes]) -> None:
        try:
            append(to, b"".join(line for line in lines if line.endswith(b"\n")))
        except SaveFailed as error:
            warnings.warn(error.line(), stacklevel=2)

    return len(cut(path, lambda row: _taken_back(row, step), confirm, move))


def _taken_back(row: Row, step: int) -> bool:
    return _is_after(row, step) and (row.get("kind"), row.get("policy")) != ("anomaly", "rewind")


def cut(
    path: Path,
    goes: Callable[[Row], bool],
    confirm: Callable[[], None],
    before: Callable[[list[bytes]], None] = lambda lines: None,
) -> list[bytes]:
    """Remove torn lines, late rows and the rows that go, after `before` was given them; returns them."""
    if not path.is_file():  # a device has no end to read to
        return []
    order = _Order()
    kept: list[bytes] = []
    removed: list[bytes] = []
    at_the_end = True
    with path.open("rb") as file:
        for line in file:
            row = _decode(line)
            gone = row is None or order.is_late(row) or goes(row)
            (removed if gone else kept).append(line)
            at_the_end = at_the_end and (gone or not removed)
    if not removed:
        return removed
    confirm()  # reading took its time: who was stopped meanwhile would cut off its successor's rows
    before(removed)
    try:
        if at_the_end:  # also where the disk has no room for a second file
            confirm()
            os.truncate(path, sum(map(len, kept)))
        else:
            replace_file(path, b"".join(kept), confirm)
    except OSError as error:
        raise _write_error(path, error) from error
    return removed


def append(path: Path, lines: bytes) -> None:
    """Add whole lines to a file; they are on the disk when this returns. A last line that a crash tore is cut
    off first.

    Raises SaveFailed, with nothing added, when it cannot be written.
    """
    try:
        file, new = durable.open_to_append(path)
        try:
            _end_line(file)
            durable.add(file, lines)
        finally:
            os.close(file)
        if new:
            durable.sync_folder(path.parent)
    except OSError as error:
        raise _write_error(path, error) from error


def _end_line(file: int) -> None:
    """Let an open file end with a whole line. A last one without its end is cut off, or ended if it is a row:
    editors leave out the last end of line.
    """
    end = size = os.fstat(file).st_size
    while end:  # read backwards: the torn line may be longer than one block
        start = max(0, end - 65536)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end == size:
        return
    if _decode(os.pread(file, size - end, end) + b"\n") is not None:
        durable.write_all(file, b"\n")
    else:
        os.ftruncate(file, end)


def replace_file(path: Path, content: bytes, confirm: Callable[[], None] = _allow) -> None:
    """Write a whole file so that a reader, or a crash, meets either the old content or the new. `confirm` is
    called at the last moment; what it raises leaves the old one.
    """
    temporary = durable.beside(path)
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        confirm()
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    durable.sync_folder(path.parent)


class MetricsFile:
    """Appends rows to `metrics.jsonl`. Rows wait in memory until `flush`, which writes them with one call to
    the file that is at the path then: it may have been edited, rotated or removed since.

    Opening cuts off a last line that a crash tore. A write that fails part-way (full disk) is undone, so the
    file never holds half a row; its rows stay in memory and are written, in order, once there is room.

    Args:
        path: of the file.
        claim: asked before rows are written; its name stands in them.
        step: from which the run continues.
        warn: receives a line about a file that somebody else has changed.

    Attributes:
        trouble: why rows are waiting; None when all that were flushed are in the file.
    """

    def __init__(
        self,
        path: Path,
        claim: Claim = UNCLAIMED,
        step: int = 0,
        warn: Callable[[str], None] = lambda line: warnings.warn(line, stacklevel=2),
    ) -> None:
        self.path, self._claim, self._step, self._warn = path, claim, step, warn
        self.trouble: OSError | None = None
        self._waiting: list[bytes] = []
        self._whole: int | None = None  # size to go back to, where undoing half a write has failed
        self._first = bool(claim.name)  # no row of this process is there yet
        self._started = not claim.name  # whether the file says that this process writes now
        self._turn = 0
        self._unsynced = self._closed = False
        self._known = (0, 0, 0)  # which file it was, and its size, when this process left it
        try:
            with self._opened(look=False) as file:
                _end_line(file)
            if claim.name:
                self._turn = max(claim.turn, 1 + (_last_turn(path) if path.is_file() else 0))
        except OSError as error:
            raise _write_error(path, error) from error

    def row(self, row: Mapping[str, Any]) -> None:
        """Queue one row."""
        self._waiting.append(encode({**row, "by": self._claim.name} if self._claim.name else row))

    def flush(self) -> None:
        """Append the queued rows, or keep them and set `trouble`.

        Raises:
            SaveFailed: too many wait.
            FolderLost: another process has taken the folder; nothing was written.
        """
        if not self._waiting:
            return
        block = b"".join(self._waiting)
        try:
            self._claim.confirm()
            self._append(block)
        except OSError as error:
            if self.trouble is None:
                what = f"{_write_error(self.path, error).line()}; rows wait in memory until it can be written"
                warnings.warn(what, stacklevel=2)
            self.trouble = error
            if len(block) > MOST_WAITING:
                raise _write_error(self.path, error) from error
            return
        self._waiting.clear()
        self.trouble = None

    def sync(self) -> OSError | None:
        """Flush, and wait until all rows are on the disk. Returns why they are not, or None."""
        self.flush()
        if self.trouble is not None or not self._unsynced:
            return self.trouble
        try:
            with self._opened() as file:
                durable.sync(file)
        except OSError as error:
            return error
        self._unsynced = False
        return None

    def _append(self, block: bytes) -> None:
        if self._first:
            self._drop_late()
        with self._opened() as file:
            if not self._started:
                begin = {"kind": START, "step": self._step, "turn": self._turn, "by": self._claim.name}
                block = encode(begin) + block
            self._whole = os.fstat(file).st_size
            try:
                durable.write_all(file, block)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(file, self._whole)
                    self._whole = None
                raise
            self._whole, self._first, self._started, self._unsynced = None, False, True, True

    @contextlib.contextmanager
    def _opened(self, look: bool = True) -> Iterator[int]:
        """The file at the path; `look` whether it is as this process left it."""
        file, new = durable.open_to_append(self.path)
        try:
            if look:
                self._meet(file, new)
            yield file
        finally:
            self._known = durable.identity(file)
            os.close(file)
        if new:
            durable.sync_folder(self.path.parent)

    def _meet(self, file: int, new: bool) -> None:
        """Take over a file that somebody else has changed: it has to say again who writes now."""
        found, whole = durable.identity(file), self._whole
        if whole is not None or found != self._known:
            self._claim.confirm()  # again: it may be a successor that writes there
        if whole is not None and found[:2] == self._known[:2] and found[2] >= whole:
            os.ftruncate(file, whole)
        elif found != self._known:
            self._started = not self._claim.name
            _end_line(file)
            how = "was removed" if new else "was replaced or edited"
            self._warn(f"{self.path} {how} while the run trains; further rows go to the file of that name")
        self._whole = None

    def _drop_late(self) -> None:
        """Before the first row: a process that had lost the folder may have added rows after those beyond the
        step from which this one continues were removed.
        """
        try:
            truncate_after(self.path, self._step, self._claim.confirm)
        except SaveFailed as error:
            raise error.__cause__ or error from None
        with contextlib.suppress(FileNotFoundError), self.path.open("rb") as file:
            self._known = durable.identity(file.fileno())

    def take_back(self, step: int, to: Path) -> None:
        """The run goes back to `step`: move the rows after it to the file `to`. See `move_after`."""
        self.flush()
        self._claim.confirm()
        waiting = [(line, _decode(line)) for line in self._waiting]
        self._waiting = [line for line, row in waiting if row is not None and not _taken_back(row, step)]
        if not self._waiting:
            self.trouble = None
        move_after(self.path, step, to, self._claim.confirm)
        self._whole = None
        with contextlib.suppress(OSError), self._opened(look=False):
            pass

    def close(self) -> None:
        """Flush and close; calling it again does nothing. Raises what `flush` raises, and SaveFailed when
        rows are lost with it.
        """
        if self._closed:
            return
        self._closed = True
        self.flush()
        if self.trouble is not None:
            self._claim.check_place()
            raise _write_error(self.path, self.trouble) from self.trouble


def _decode(line: bytes) -> Row | None:
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _is_after(row: Row, step: int) -> bool:
    number = row.get("step")
    return isinstance(number, (int, float)) and number > step and row.get("kind") != START


def _write_error(path: Path, error: OSError) -> SaveFailed:
    return SaveFailed(
        f"cannot write metrics ({error.strerror})", where=str(path), fix="free disk space or make it writable"
    )
