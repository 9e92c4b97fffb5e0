"""A log file of bounded size: its beginning, a line that says how much is left out, its end."""

from __future__ import annotations

import contextlib
from pathlib import Path

HEAD, TAIL = 16 << 20, 16 << 20  # bytes


class BoundedFile:
    """Bytes are appended. Beyond `head` + 2 `tail` bytes what lies between the first `head` and the last
    `tail` of them is left out, in whole lines.

    Args:
        path: what is there already stays, and counts for nothing.
        head, tail: bytes.
    """

    def __init__(self, path: Path, head: int = HEAD, tail: int = TAIL) -> None:
        self.path, self.head, self.tail = path, head, tail
        self._base = self._end = _size(path)
        self._middle = 0  # where the line about what is left out begins; 0: nothing is
        self._after = 0  # and where it ends
        self._left_out = 0
        self._notes: list[tuple[int, int]] = []  # where a line says that bytes are missing, and how many

    def add(self, data: bytes, missing: int = 0) -> None:
        """Append; `missing` bytes were left out before these. Raises OSError, with nothing added, when the
        disk does not take them.
        """
        note = note_of(missing) if missing else b""
        if not (note or data):
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.truncate(self._end)  # half a block of a disk that was full
            file.write(note + data)
            file.flush()
        if missing:
            self._notes.append((self._end, missing))
        self._end += len(note) + len(data)
        if self._end - self._base > self.head + 2 * self.tail:
            with contextlib.suppress(OSError):  # then it is done at the next call
                self._leave_out()

    def _leave_out(self) -> None:
        with self.path.open("r+b") as file:
            if not self._middle:
                file.seek(self._base)
                self._middle = self._after = self._base + _lines_end(file.read(self.head))
            file.seek(self._end - self.tail)
            kept = file.read(self.tail)
            kept = kept[_line_begin(kept) :]
            first = self._end - len(kept)
            self._left_out += first - self._after + sum(n for at, n in self._notes if at < first)
            note = note_of(self._left_out)
            self._notes = [(at - first + self._middle + len(note), n) for at, n in self._notes if at >= first]
            file.seek(self._middle)
            file.write(note + kept)
            self._after = self._middle + len(note)
            self._end = self._after + len(kept)
            file.truncate(self._end)


class GrowingFile:
    """Bounds a file that another process appends to (opened so that each write goes to its end).

    Args:
        path: the file.
        base: bytes that were there before, which stay.
        head, tail: as of `BoundedFile`.
    """

    def __init__(self, path: Path, base: int, head: int = HEAD, tail: int = TAIL) -> None:
        self.path, self.base, self.head, self.tail = path, base, head, tail
        self._middle = self._after = self._left_out = 0

    def bound(self) -> None:
        """Leave the middle out if there is too much. What is written in this moment may be lost, too."""
        with contextlib.suppress(OSError), self.path.open("r+b") as file:
            size = file.seek(0, 2)
            if size - self.base <= self.head + 2 * self.tail:
                return
            if not self._middle:
                file.seek(self.base)
                self._middle = self._after = self.base + _lines_end(file.read(self.head))
            file.seek(size - self.tail)
            kept = file.read(self.tail)
            kept = kept[_line_begin(kept) :]
            self._left_out += size - len(kept) - self._after
            note = note_of(self._left_out)
            file.seek(self._middle)
            file.write(note + kept)
            file.truncate()
            self._after = self._middle + len(note)


def note_of(count: int) -> bytes:
    """The line in place of so many bytes."""
    return f"[hlat: {count:,} bytes of output left out here]\n".encode()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _lines_end(data: bytes) -> int:
    return data.rfind(b"\n") + 1 or len(data)


def _line_begin(data: bytes) -> int:
    at = data.find(b"\n", 0, -1)
    return at + 1 if at >= 0 else 0
