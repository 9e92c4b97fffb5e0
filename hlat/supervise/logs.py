"""Ranks' output: written on the machine's own disk, copied into the run folder and shown as it grows.

A rank whose output went straight to a full or hanging disk, or into a pipe that nobody empties, would fail or
hang with it. The copy holds no secret (`hlat.observe.redact`), whichever library printed it, and is bounded,
like what is left on the machine's own disk: the rank may write faster than anybody reads.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from hlat.observe.terminal import escaped
from hlat.supervise.aside import Aside, write_whole
from hlat.supervise.bounded import HEAD, TAIL, BoundedFile, note_of
from hlat.supervise.cleaner import Cleaner

_BLOCK = 1 << 20
_BEHIND = 32 << 20  # bytes that may wait to be copied; beyond, all but the newest are left out
_RELEASED = 4 << 20  # bytes that have been copied and still take room on this machine
_KEPT = 64 << 10  # what `tail` reads is never released
_POLL = 0.25
_SHOWN = 4 << 20  # bytes of a stream that are shown at once, and what is added each second
_SHOWN_PER_SECOND = 16 << 10
_RANK_FILE = re.compile(r"(?P<rank>\d+)/(?P<stream>stdout|stderr)\.log$")
_PUNCH_HOLE, _KEEP_SIZE = 2, 1  # linux/falloc.h

Show = Callable[[int, str, bytes], None]


class LogMirror:
    """Copies what torchrun writes below `source` to `target`/rank-<n>-<stream>.log; numbers of ranks on this
    machine count from `first`.

    Args:
        show: also given the number, the stream's name and what is new of it, at the end nothing.
    """

    def __init__(
        self, source: Path, target: Path, first: int = 0, show: Show = lambda rank, stream, data: None
    ) -> None:
        self.source, self.target, self.first = source, target, first
        self._show = show
        self._streams: dict[Path, _Stream] = {}
        self._ending = threading.Event()
        self._ended = threading.Event()

    def files(self) -> dict[Path, Path]:
        """Each rank's file here, and its place in the run folder."""
        found = {}
        for path in sorted(self.source.rglob("*.log")):
            match = _RANK_FILE.search(path.as_posix())
            if match:
                number = self.first + int(match["rank"])
                found[path] = self.target / f"rank-{number:05}-{match['stream']}.log"
        return found

    def start(self) -> None:
        """Copy in a thread of its own until `finish`: whoever watches the ranks waits for no disk."""
        threading.Thread(target=self._run, name="logs", daemon=True).start()

    def finish(self, seconds: float) -> bool:
        """Copy what is left, in the thread, for so many seconds. Returns whether all was copied."""
        self._ending.set()
        return self._ended.wait(seconds)

    def sync(self, last: bool = False) -> None:
        """Append the lines that are new, at the end (`last`) also one without an end. What the disk does not
        take now is tried again at the next call.
        """
        for path, copy in self.files().items():
            if path not in self._streams:
                match = _RANK_FILE.search(path.as_posix())
                rank, name = self.first + int(match["rank"]), match["stream"]  # type: ignore[index]
                self._streams[path] = _Stream(path, copy, partial(self._show, rank, name))
            with contextlib.suppress(OSError):
                self._streams[path].sync(last)

    def tail(self, size: int = 16384) -> str:
        """The end of every rank's output, stderr after stdout."""
        parts = []
        for path in self.files():
            with contextlib.suppress(OSError), path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - size))
                parts.append((path.name, file.read(size).decode(errors="replace")))
        return "\n".join(text for _, text in sorted(parts, key=lambda part: part[0] == "stderr.log"))

    def _run(self) -> None:
        while not self._ending.wait(_POLL):
            with contextlib.suppress(Exception):  # a defect here must not end what watches the ranks
                self.sync()
        with contextlib.suppress(Exception):
            self.sync(last=True)
        self._ended.set()


class _Stream:
    """One file of a rank: how far it is copied, and how far it has been released."""

    def __init__(self, path: Path, copy: Path, show: Callable[[bytes], None]) -> None:
        self.path, self.copy, self._show = path, BoundedFile(copy), show
        self._cleaner = Cleaner()
        self._read = self._released = 0
        self._waiting: list[tuple[int, bytes]] = []  # bytes left out, then these: not on the run's disk yet

    def sync(self, last: bool) -> None:
        with self.path.open("rb") as file:
            while True:
                self._catch_up(os.fstat(file.fileno()).st_size)
                self._write()
                file.seek(self._read)
                block = file.read(_BLOCK)
                self._read += len(block)
                ends = len(block) < _BLOCK
                self._waiting.append((0, self._cleaner.feed(block, last=last and ends)))
                self._release()
                if ends:
                    break
        self._write()
        if last:
            self._show(b"")

    def _write(self) -> None:
        """Raises OSError when the disk does not take it; then it waits."""
        while self._waiting:
            missing, data = self._waiting[0]
            self.copy.add(data, missing)
            del self._waiting[0]
            if data or missing:
                self._show((note_of(missing) if missing else b"") + data)

    def _catch_up(self, size: int) -> None:
        """Leave out what is too much, once the beginning is kept."""
        if size - self._read <= _BEHIND or (self._read < HEAD and not self._waiting):
            return
        missing = size - _BLOCK - self._read + self._cleaner.held
        before = self._cleaner.skip()
        if self._waiting and not before and not self._waiting[-1][1]:  # the disk is full for long
            missing += self._waiting.pop()[0]
        self._waiting += [(0, before), (missing, b"")] if before else [(missing, b"")]
        self._read = size - _BLOCK
        self._release()

    def _release(self) -> None:
        """Give the room of what has been read back to this machine's disk."""
        end = (self._read - _KEPT) & ~4095
        if end - self._released > _RELEASED and _punch(self.path, self._released, end - self._released):
            self._released = end


def _punch(path: Path, start: int, size: int) -> bool:
    """Take the blocks of a part of a file away; it reads as zeros then. False where that is not possible."""
    if sys.platform != "linux":
        return False
    try:
        handle = os.open(path, os.O_WRONLY)
    except OSError:
        return False
    try:
        call = ctypes.CDLL(None, use_errno=True).fallocate64
        call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
        return bool(call(handle, _PUNCH_HOLE | _KEEP_SIZE, start, size) == 0)
    except (OSError, AttributeError):
        return False
    finally:
        os.close(handle)


class Shown:
    """Shows the ranks' output on this process's own stdout and stderr, each line after `[rank] `. Whatever
    comes faster than it may be shown is left out there, and said to be; the copies have more.
    """

    def __init__(self) -> None:
        self._aside = {"stdout": Aside("stdout"), "stderr": Aside("stderr")}
        self._room: dict[tuple[int, str], tuple[float, float]] = {}  # bytes, and when that was so
        self._rest: dict[tuple[int, str], bytes] = {}
        self._left_out: dict[tuple[int, str], int] = {}

    def __call__(self, rank: int, stream: str, data: bytes) -> None:
        key = rank, stream
        whole = self._rest.pop(key, b"") + data
        end = max(whole.rfind(b"\n"), whole.rfind(b"\r")) + 1 if data else len(whole)
        if whole[end:]:
            self._rest[key] = whole[end:][-_BLOCK:]
        if not (whole := whole[:end]) and not (self._left_out.get(key) and not data):
            return
        now = time.monotonic()
        room, then = self._room.get(key, (float(_SHOWN), now))
        room = min(float(_SHOWN), room + (now - then) * _SHOWN_PER_SECOND)
        fits = len(whole) <= room
        self._room[key] = (room - len(whole) if fits else room), now
        if not fits or not self._aside[stream].do(lambda: self._print(key, whole)):
            self._left_out[key] = self._left_out.get(key, 0) + len(whole)

    def finish(self, seconds: float) -> None:
        """Wait until all has been shown."""
        end = time.monotonic() + seconds
        for aside in self._aside.values():
            aside.wait(max(0.0, end - time.monotonic()))

    def _print(self, key: tuple[int, str], data: bytes) -> None:
        rank, stream = key
        lines = data.decode(errors="backslashreplace").splitlines()
        if missing := self._left_out.pop(key, 0):
            lines.insert(0, f"[hlat: {missing:,} bytes are not shown here: see the log of rank {rank}]")
        text = "".join(f"[{rank}] {escaped(line)}\n" for line in lines if line)
        write_whole(sys.stdout if stream == "stdout" else sys.stderr, text)


__all__ = ["HEAD", "TAIL", "LogMirror", "Shown"]
