"""SHA-256 of files, remembered: a second look at a folder of 100 GB reads none of it.

    $XDG_CACHE_HOME/hlat/digests/<key>    key: hash of a folder's path; the digests of the files in it
                                          (of those above a block also the digest by blocks)

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
from typing import NamedTuple

from hlat.errors import UserError
from hlat.host import json_text
from hlat.storage.blocks import BLOCK, Mark, changed, mark_of, tree_of
from hlat.storage.user_cache import cache_root

SETTLED_SECONDS = 2.0  # the coarsest clock of a file system in use (FAT)
_SAVE_EVERY = 1 << 30  # bytes hashed: what a kill may lose


class Digest(NamedTuple):
    """SHA-256 (hex) of a file's bytes, its size in bytes, and its digest by blocks (`blocks.tree_of`), all of
    the same look at it.
    """

    whole: str
    size: int
    tree: str


def file_digest(path: str | Path) -> str:
    """SHA-256 (hex) of a file's bytes. Raises UserError: see `file_digests`."""
    return file_digests([path])[0]


def remembered(path: str | Path) -> str | None:
    """SHA-256 (hex) of a file that was read before and has not changed since; None: not known."""
    absolute = os.path.abspath(path)
    try:
        known = _Memory(os.path.dirname(absolute)).known(absolute)
    except OSError:
        return None
    return None if known is None else known.whole


def file_digests(
    paths: Iterable[str | Path], progress: Callable[[int], None] = lambda size: None
) -> list[str]:
    """SHA-256 (hex) of the bytes of each file: see `looked_at`."""
    return [digest.whole for digest in looked_at(paths, progress)]


def looked_at(
    paths: Iterable[str | Path], progress: Callable[[int], None] = lambda size: None
) -> list[Digest]:
    """The digests of each file.

    Args:
        paths: the files.
        progress: called with the bytes read since the last call; never for what is remembered.

    Raises UserError for a file that cannot be read, or that changes while it is read.
    """
    found: dict[str, Digest] = {}
    absolute = [os.path.abspath(path) for path in paths]
    for folder, inside in _by_folder(absolute).items():
        with _Memory(folder) as memory:
            found |= {path: memory.digest(path, progress) for path in inside}
    return [found[path] for path in absolute]


def forget(paths: Iterable[str | Path]) -> None:
    """Remember nothing of these files: they have turned out not to be what was remembered, as after a write
    through a memory map, which leaves no time behind until the system gets to it.
    """
    for folder, inside in _by_folder([os.path.abspath(path) for path in paths]).items():
        with _Memory(folder) as memory:
            memory.forget(inside)


def _by_folder(paths: Iterable[str]) -> dict[str, list[str]]:
    folders: dict[str, list[str]] = {}
    for path in dict.fromkeys(paths):
        folders.setdefault(os.path.dirname(path), []).append(path)
    return folders


class _Memory:
    """The remembered digests of the files in one folder."""

    def __init__(self, folder: str) -> None:
        name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:32]
        self._file = cache_root() / "digests" / name
        self._known = _load(self._file)
        self._new: dict[str, list[int | str]] = {}
        self._gone: set[str] = set()
        self._unsaved = 0

    def __enter__(self) -> _Memory:
        return self

    def __exit__(self, *_: object) -> None:
        self._save()

    def known(self, path: str) -> Digest | None:
        """The digests of a file in the folder, if they are remembered. Raises OSError."""
        mark, found = mark_of(os.stat(path)), self._known.get(_key(path))
        if found is None or tuple(found[:4]) != mark or (len(found) < 6 and mark[1] > BLOCK):
            return None
        return Digest(str(found[4]), mark[1], str(found[-1]))

    def digest(self, path: str, progress: Callable[[int], None]) -> Digest:
        """The digests of a file in the folder, computed unless they are known."""
        name = _key(path)
        try:
            if (known := self.known(path)) is not None:
                return known
            value, mark = _read(path, progress)
        except OSError as error:
            what = f"cannot be read ({error.strerror or error})"
            raise UserError(what, where=path, fix="make it readable or remove it") from error
        if time.time() - max(mark[2:]) / 1e9 > SETTLED_SECONDS:
            self._new[name] = [*mark, value.whole, *([value.tree] if mark[1] > BLOCK else [])]
            self._unsaved += mark[1]
            if self._unsaved >= _SAVE_EVERY:
                self._save()
        return value

    def forget(self, paths: Iterable[str]) -> None:
        """Drop what is known of files in the folder."""
        self._gone |= {_key(path) for path in paths}

    def _save(self) -> None:
        """Add what is new to what others have written by now. A cache that cannot be written is no fault."""
        if not self._new and not self._gone:
            return
        kept = {name: entry for name, entry in _load(self._file).items() if name not in self._gone}
        self._known = kept | self._new
        self._new, self._gone, self._unsaved = {}, set(), 0
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


def _read(path: str, progress: Callable[[int], None]) -> tuple[Digest, Mark]:
    """The digests of a file that stays what it is while it is read, and its mark.

    Raises OSError, UserError.
    """
    whole, blocks = hashlib.sha256(), []
    with open(path, "rb", buffering=BLOCK) as file:
        mark = mark_of(os.fstat(file.fileno()))
        while block := file.read(BLOCK):
            whole.update(block)
            blocks.append(hashlib.sha256(block).hexdigest() if mark[1] > BLOCK else whole.hexdigest())
            progress(len(block))
        after = mark_of(os.fstat(file.fileno()))
    if not mark == after == mark_of(os.stat(path)):
        raise changed(path, "read")
    return Digest(whole.hexdigest(), mark[1], tree_of(blocks)), mark


def _key(path: str) -> str:
    """A file's name, as a key of JSON."""
    return os.fsencode(os.path.basename(path)).hex()


def _load(file: Path) -> dict[str, list[int | str]]:
    """Name of a file (hex) -> its mark and digest; empty where there is nothing, or it is damaged."""
    try:
        checksum, _, body = file.read_text(encoding="ascii").partition("\n")
        known = json_text.loads(body) if _checksum(body) == checksum else {}
        return {
            name: entry for name, entry in known.items() if isinstance(entry, list) and len(entry) in (5, 6)
        }
    except (OSError, ValueError, AttributeError):
        return {}


def _checksum(body: str) -> str:
    return hashlib.sha256(body.encode()).hexdigest()
