"""Reading the ids of a shard while a run trains on it, whatever happens to the file meanwhile.

The file is read, not mapped: a page of a map that the file no longer has ends the process (SIGBUS), a read
that comes back short does not. A file that another one has replaced stays open and is what it was. One that
was written to is compared with its hash before anything more is taken from it; a new time alone (`touch`
against the purge of a scratch disk) changes nothing.
"""

from __future__ import annotations

import hashlib
import os
import resource
import threading
import weakref
from pathlib import Path

import numpy as np

from hlat.errors import UserError

_RESTORE = "restore the file, then start again: the run goes on from its newest checkpoint"
_share_lock = threading.Lock()
_kept_open: set[int] = set()  # at most a quarter of the files that this process may open


def _close(file: int) -> None:
    _kept_open.discard(file)
    os.close(file)


class TokenFile:
    """The ids of one shard.

    Args:
        path: the `.bin` file.
        dtype: of the ids.
        count: number of ids, as the manifest says.
        sha256: of the file, as the manifest says (hex).
    """

    def __init__(self, path: Path, dtype: np.dtype, count: int, sha256: str) -> None:
        self.path, self._dtype, self._count, self._sha256 = path, dtype, count, sha256
        self._file: int | None = None
        self._mark: tuple[int, int] | None = None  # size and time of the last change, as known to be right

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, wanted: slice) -> np.ndarray:
        """Ids, in the shard's own dtype, of a slice without a step. Raises UserError when the file is not
        what it was."""
        start, stop, step = wanted.indices(self._count)
        if step != 1:
            raise ValueError("ids are read in order")
        count = max(0, stop - start)
        size = count * self._dtype.itemsize
        try:
            file, own = self._open()
            try:
                self._check(file)
                content = _read(file, size, start * self._dtype.itemsize)
            finally:
                if own:
                    os.close(file)
        except OSError as error:
            what = f"token shard cannot be read ({error.strerror or error})"
            raise UserError(what, where=str(self.path), fix=_RESTORE) from error
        if len(content) < size:
            raise self._changed("is shorter than it was")
        return np.frombuffer(content, dtype=self._dtype)

    def _open(self) -> tuple[int, bool]:
        """The open file, and whether it is to be closed after use."""
        if self._file is not None:
            return self._file, False
        file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        with _share_lock:
            if self._file is None and len(_kept_open) < resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4:
                self._file = file
                _kept_open.add(file)
                weakref.finalize(self, _close, file)
                return file, False
        return file, True

    def expect(self, found: os.stat_result) -> None:
        """From now on a file that differs in size or time is compared with its hash."""
        self._mark = (found.st_size, found.st_mtime_ns)

    def _check(self, file: int) -> None:
        found = os.fstat(file)
        mark = (found.st_size, found.st_mtime_ns)
        if mark == self._mark:
            return
        if found.st_size != self._count * self._dtype.itemsize:
            raise self._changed(
                f"has {found.st_size:,} bytes instead of {self._count * self._dtype.itemsize:,}"
            )
        if self._mark is not None:
            with open(os.dup(file), "rb") as stream:
                stream.seek(0)
                if hashlib.file_digest(stream, "sha256").hexdigest() != self._sha256:
                    raise self._changed("holds something else than it did")
        self._mark = mark

    def _changed(self, what: str) -> UserError:
        return UserError(
            f"token shard changed while a run reads it: it {what}", where=str(self.path), fix=_RESTORE
        )


def _read(file: int, size: int, at: int) -> bytes:
    """`size` bytes from `at`, fewer only at the end of the file."""
    parts = []
    while size and (part := os.pread(file, size, at)):
        parts.append(part)
        size, at = size - len(part), at + len(part)
    return b"".join(parts)
