"""SHA-256 of files, remembered: a second look at a folder of 100 GB reads none of it.

    $XDG_CACHE_HOME/hlat/digests/<key>    key: hash of a folder's path; the digests of the files in it

A digest is taken from there only where path, inode, size, modification time and change time are those it
was computed for; the change time cannot be set, so a file edited in place under its old modification time is
read again. One that changed within the last seconds is not remembered: another change could fall into the
same tick of the file system's clock. Every entry is replaced as a whole by a rename: of two processes that
write at once one's digests are lost, and computed again. One that is damaged, or cannot be written, counts as
not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from hlat.errors import UserError
from hlat.storage.user_cache import cache_root

SETTLED_SECONDS = 2.0  # the coarsest clock of a file system in use (FAT)
_BLOCK = 4 << 20
_SAVE_EVERY = 1 << 30  # bytes hashed: what a kill may lose

Mark = tuple[int, int, int, int]
"""Inode, size in bytes, modification and change time in ns."""


def file_digest(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes. Raises UserError: see `file_digests`."""
    return file_digests([path])[0]


def remembered(path: str | Path) -> str | None:
    """SHA-256 (hex) of a file that was read before and has not changed since; None: not known."""
    absolute = os.path.abspath(path)
    try:
        return _Memory(os.path.dirname(absolute)).known(absolute)
    except OSError:
        return None


def file_digests(
    paths: Iterable[str | Path], progress: Callable[[int], None] = lambda size: None
) -> list[str]:
    """SHA-256 (hex) of the bytes of each file.

    Args:
        paths: the files.
        progress: called with the bytes read since the last call; never for what is remembered.

    Raises UserError for a file that cannot be read, or that changes while it is read.
    """
    absolute = [os.path.abspath(path) for path in paths]
    folders: dict[str, list[str]] = {}
    for path in dict.fromkeys(absolute):
        folders.setdefault(os.path.dirname(path), []).append(path)
    found: dict[str, str] = {}
    for folder, inside in folders.items():
        with _Memory(folder) as memory:
            found |= {path: memory.digest(path, progress) for path in inside}
    return [found[path] for path in absolute]


class _Memory:
    """The remembered digests of the files in one folder."""

    def __init__(self, folder: str) -> None:
        name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]
        self._file = cache_root() / "digests" / name
        self._known = _load(self._file)
        self._new: dict[str, list[int | str]] = {}
        self._unsaved = 0

    def __enter__(self) -> _Memory:
        return self

    def __exit__(self, *_: object) -> None:
        self._save()

    def known(self, path: str) -> str | None:
        """The digest of a file in the folder, if it is remembered. Raises OSError."""
        found = self._known.get(_name(path))
        return str(found[4]) if found is not None and tuple(found[:4]) == _mark(os.stat(path)) else None

    def digest(self, path: str, progress: Callable[[int], None]) -> str:
        """The digest of a file in the folder, computed unless it is known."""
        name = _name(path)
        try:
            if (known := self.known(path)) is not None:
                return known
            value, mark = _read(path, progress)
        except OSError as error:
            what = f"cannot be read ({error.strerror or error})"
            raise UserError(what, where=path, fix="make it readable or remove it") from error
        if time.time() - max(mark[2:]) / 1e9 > SETTLED_SECONDS:
            self._new[name] = [*mark, value]
            self._unsaved += mark[1]
            if self._unsaved >= _SAVE_EVERY:
                self._save()
        return value

    def _save(self) -> None:
        """Add what is new to what others have written by now. A cache that cannot be written is no fault."""
        if not self._new:
            return
        self._known = {**_load(self._file), **self._new}
        self._new, self._unsaved = {}, 0
        body = json.dumps(self._known, sort_keys=True, separators=(",", ":"))
        with contextlib.suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=self._file.parent)
            try:
                with open(handle, "w", encoding="ascii") as stream:
                    stream.write(f"{_checksum(body)}\n{body}")
                os.replace(temporary, self._file)
            except OSError:
                os.unlink(temporary)
                raise


def _read(path: str, progress: Callable[[int], None]) -> tuple[str, Mark]:
    """SHA-256 of a file that stays what it is while it is read, and its mark. Raises OSError, UserError."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as file:
        mark = _mark(os.fstat(file.fileno()))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
            progress(count)
        after = _mark(os.fstat(file.fileno()))
    if not mark == after == _mark(os.stat(path)):
        fix = "start again when whatever writes it is done"
        raise UserError("changed while it was read", where=path, fix=fix)
    return digest.hexdigest(), mark


def _name(path: str) -> str:
    return os.path.basename(path).encode("utf-8", "surrogateescape").hex()


def _mark(found: os.stat_result) -> Mark:
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _load(file: Path) -> dict[str, list[int | str]]:
    """Name of a file (hex) -> its mark and digest; empty where there is nothing, or it is damaged."""
    try:
        checksum, _, body = file.read_text(encoding="ascii").partition("\n")
        known = json.loads(body) if _checksum(body) == checksum else {}
        return {name: entry for name, entry in known.items() if isinstance(entry, list) and len(entry) == 5}
    except (OSError, ValueError, AttributeError):
        return {}


def _checksum(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()
