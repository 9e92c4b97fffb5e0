"""TensorBoard's event files of a run: each step's numbers once, whatever happens to the run or to the files.

Records and messages are those of the package `tensorboard`; which file they go to is decided here, because
its own writer keeps what a run that starts over has already written, and ends when its file is taken away.
A reader goes through the files of a folder in the order of their names and never back, and it does not look
again at bytes it has read. So points that a run takes back are cut out of the files, for who reads them
later, and a record that says so begins a new file, whose name comes after all others, for who has read them.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
import socket
import struct
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from hlat.errors import FolderLost, missing_extra
from hlat.observe.claim import UNCLAIMED, Claim

_NAME = "events.out.tfevents"
_SECONDS = re.compile(rf"{re.escape(_NAME)}\.(\d{{10}})\.")
_VERSION = "brain.Event:2"  # of the file format; with it readers heed the record that a run begins anew
_HEAD, _AROUND = struct.Struct("<Q"), 16  # a record is length, its checksum, data, their checksum
_MOST_WAITING = 50_000  # rows kept in memory while no file can be written, some hundred bytes each


class EventFiles:
    """The event files in a folder, the newest of which is written.

    Args:
        folder: made when it is missing; nothing else writes there.
        after_step: points after it are cut out first.
        claim: asked before anything is cut or written.

    Rows wait in memory until `flush`, and longer while nothing can be written; when too many wait, the oldest
    are lost. A file that is not as it was left (deleted, replaced, cut) gets a successor.

    Raises UserError when the extra `track` is not installed.
    """

    def __init__(self, folder: Path, after_step: int = 0, claim: Claim = UNCLAIMED) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError as error:
            raise missing_extra("tensorboard", "track", "log.tensorboard") from error
        self._event, self._summary, self._session = event_pb2.Event, summary_pb2.Summary, event_pb2.SessionLog
        self._writer: Any = RecordWriter
        self.folder, self._claim = folder, claim
        self.path: Path | None = None  # of the file that is written
        self._file, self._size = -1, 0
        self._last = 0  # the seconds in the newest name so far
        self._starts_after: int | None = None  # what the next file is to say: points after it are void
        self._waiting: deque[tuple[int, bytes]] = deque(maxlen=_MOST_WAITING)
        self._in_trouble = False
        self.rewind(after_step)

    def rewind(self, step: int) -> None:
        """Take back the points after `step`, those that wait too; what follows goes to a new file."""
        self._waiting = deque((w for w in self._waiting if w[0] <= step), maxlen=_MOST_WAITING)
        self._leave()
        try:
            self._claim.confirm()
            self._starts_after = step if self._find_last() else None
            for path in self._files():
                self._cut(path, step)
            self._write(b"")
        except OSError as error:
            self._complain(error)

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Queue the points of a row."""
        points = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        if points:
            event = self._event(wall_time=time.time(), step=step, summary=self._summary(value=points))
            self._waiting.append((step, self._record(event)))

    def flush(self) -> None:
        """Write what waits, or keep it."""
        if not self._waiting:
            return
        try:
            self._write(b"".join(record for _, record in self._waiting))
        except OSError as error:
            self._complain(error)
            return
        self._waiting.clear()
        self._in_trouble = False

    def close(self) -> None:
        """Flush and close; calling it again does nothing. What a process that has lost the folder would still
        write is dropped: whoever holds it writes those steps.
        """
        try:
            self.flush()
        except FolderLost:
            self._waiting.clear()
        finally:
            self._leave()

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob(f"{_NAME}.*"))

    def _find_last(self) -> int:
        """The seconds in the newest name there is or was; 0 without one."""
        found = [int(match[1]) for path in self._files() if (match := _SECONDS.match(path.name))]
        return max([self._last, *found])

    def _open(self) -> None:
        """Begin a file whose name comes after all others, whatever the clock says."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._last = max(int(time.time()), self._find_last() + 1)
        name = f"{_NAME}.{self._last:010}.{socket.gethostname()}.{os.getpid()}.0"
        self.path, self._size = self.folder / name, 0
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def _first_records(self) -> bytes:
        events = [self._event(wall_time=time.time(), file_version=_VERSION)]
        if self._starts_after is not None:
            log = self._session(status=self._session.START)
            events.append(self._event(wall_time=time.time(), step=self._starts_after + 1, session_log=log))
        return b"".join(map(self._record, events))

    def _write(self, records: bytes) -> None:
        """Append to the file, or to a new one. All of it, or nothing; raises OSError."""
        self._claim.confirm()
        if not self._is_as_left():
            self._leave()
            self._open()
            self._claim.confirm()  # again: what a new file says is about all before it, a successor's too
        block = records if self._size else self._first_records() + records
        rest = memoryview(block)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            try:
                os.ftruncate(self._file, self._size)
            except OSError:
                self._leave()  # half a record stays: a reader goes on with the next file
            raise
        self._size += len(block)
        self._starts_after = None

    def _is_as_left(self) -> bool:
        """Whether the file at the path is the one that is open, as long as it was left."""
        if self._file < 0 or self.path is None:
            return False
        own = os.fstat(self._file)
        try:
            there = self.path.stat()
        except OSError:
            return False
        return (there.st_dev, there.st_ino, there.st_size) == (own.st_dev, own.st_ino, self._size)

    def _leave(self) -> None:
        if self._file >= 0:
            with contextlib.suppress(OSError):
                os.close(self._file)
        self._file, self.path = -1, None

    def _complain(self, error: OSError) -> None:
        """Say it once until it works again."""
        if not self._in_trouble:
            self._in_trouble = True
            what = f"cannot write TensorBoard's files ({error.strerror or error}); rows wait until it works"
            warnings.warn(f"{self.folder}: {what}", stacklevel=3)

    def _record(self, event: Any) -> bytes:
        buffer = io.BytesIO()
        self._writer(buffer).write(event.SerializeToString())
        return buffer.getvalue()

    def _cut(self, path: Path, step: int) -> None:
        """Remove the points after `step` and a torn end: in place where they are all at the end, else by a
        new file under the old name. The file stays even without a point: a reader would stop where it is
        missed.
        """
        keep: list[tuple[int, int]] = [(0, 0)]  # from, to: what stays, in as few runs as there are
        with path.open("rb") as file:
            for start, end, event in self._events(file):
                if event.step > step:
                    continue
                if keep[-1][1] == start:
                    keep[-1] = (keep[-1][0], end)
                else:
                    keep.append((start, end))
        if len(keep) > 1:
            _copy_parts(path, keep, self._claim.confirm)
        elif keep[0][1] < path.stat().st_size:
            self._claim.confirm()  # again: reading took its time, and a successor may write there by now
            os.truncate(path, keep[0][1])

    def _events(self, file: IO[bytes]) -> Iterator[tuple[int, int, Any]]:
        """Where each whole record begins and ends, and its event; ends at a torn or damaged one."""
        start = 0
        while len(head := file.read(_HEAD.size + 4)) == _HEAD.size + 4:
            (length,) = _HEAD.unpack(head[: _HEAD.size])
            end = start + length + _AROUND
            if end > os.fstat(file.fileno()).st_size:
                return
            try:
                event = self._event.FromString(file.read(length + 4)[:length])
            except Exception:  # protobuf's implementations each have an error of their own
                return
            yield start, end, event
            start = end


def _copy_parts(path: Path, parts: list[tuple[int, int]], confirm: Callable[[], None]) -> None:
    """Replace a file by parts of it, unless `confirm` raises at the last moment. No reader takes the copy for
    an event file meanwhile.
    """
    partial = path.with_name(f".rewritten-{secrets.token_hex(6)}")
    try:
        with path.open("rb") as source, partial.open("xb") as target:
            for start, end in parts:
                source.seek(start)
                while start < end:
                    target.write(block := source.read(min(end - start, 1 << 20)))
                    start += len(block)
        confirm()
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
