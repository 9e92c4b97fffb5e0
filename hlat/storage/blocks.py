"""Files read in blocks whose digests are kept, so that what was parsed can be compared with what was meant.

A file may change while it is read, and change back. Its digest before and after then says nothing of what
was read; the digests of the very bytes that a reader was given do. Readers of one file may be several, each
with a part of it: the digest of a file is made of those of its blocks (`tree_of`).

Readers open files with `open_file` and `content`, and need know nothing of who keeps the digests
(`watching`). A large file that is mapped into memory cannot be watched byte by byte: there the times of its
changes, which cannot be set, say that it stayed the same from before it was mapped until its blocks are read.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, BinaryIO

from hlat.errors import UserError

BLOCK = 1 << 20
_BUFFER = 1 << 16
MAPPED_ABOVE = 8 << 20  # bytes: below, a file could be changed and changed back within a tick of the clock
AGAIN = "start again when whatever writes it is done"


def changed(path: str, doing: str) -> UserError:
    """The error for a file that did not stay what it was."""
    return UserError(f"changed while it was {doing}", where=path, fix=AGAIN)


def blocks_in(size: int) -> int:
    """How many blocks a file of so many bytes has."""
    return -(-size // BLOCK)


def tree_of(digests: Sequence[str]) -> str:
    """Digest (hex) of a file by those of all its blocks; a file of one block has that block's."""
    if len(digests) == 1:
        return digests[0]
    return hashlib.sha256(b"".join(map(bytes.fromhex, digests))).hexdigest()


Mark = tuple[int, int, int, int]
"""Inode, size in bytes, modification and change time in ns."""


def mark_of(found: os.stat_result) -> Mark:
    """What tells a state of a file from others without reading it."""
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class Reading:
    """What was read of files, by path.

    Attributes:
        blocks: SHA-256 (hex) of the blocks of each file that were read, by number.
        marks: of each file that was mapped into memory, the mark it had then.
        sources: for readers, what the files are of (`note`).
    """

    def __init__(self) -> None:
        self.sources: list[Any] = []
        self.blocks: dict[str, dict[int, str]] = {}
        self.marks: dict[str, Mark] = {}

    def opened(self, path: str) -> BinaryIO:
        """The file, for reading and seeking. Raises OSError; reading raises UserError where a block is no
        longer what it was when it was read before.
        """
        return io.BufferedReader(_BlockFile(path, self.blocks.setdefault(path, {})), _BUFFER)

    def map(self, path: str) -> mmap.mmap:
        """The file, mapped into memory. Raises OSError, and ValueError for an empty file."""
        with open(path, "rb") as file:
            self._keep(path, mark_of(os.fstat(file.fileno())))
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def _keep(self, path: str, mark: Mark) -> None:
        if self.marks.setdefault(path, mark) != mark:
            raise changed(path, "read")

    def take(self) -> dict[str, Any]:
        """What was read since the last call, as JSON values: see `merge`."""
        taken = {"blocks": self.blocks, "marks": self.marks}
        self.blocks, self.marks = {}, {}
        return taken

    def merge(self, taken: Mapping[str, Any]) -> None:
        """Add what another reader has taken. Raises UserError where it has read other bytes."""
        for path, blocks in taken["blocks"].items():
            own = self.blocks.setdefault(path, {})
            for number, digest in blocks.items():
                if own.setdefault(int(number), digest) != digest:
                    raise changed(path, "read")
        for path, mark in taken["marks"].items():
            self._keep(path, tuple(mark))

    def tree(self, path: str, size: int) -> str:
        """The digest of a file of `size` bytes, as it was read; blocks that were not are read now.

        Raises OSError, and UserError where a file that was mapped has changed since.
        """
        blocks = self.blocks.setdefault(path, {})
        missing = [number for number in range(blocks_in(size)) if number not in blocks]
        if missing:
            with self.opened(path) as file:
                for number in missing:
                    file.seek(number * BLOCK)
                    file.read(1)
        if path in self.marks:
            self._keep(path, mark_of(os.stat(path)))
        return tree_of([blocks[number] for number in sorted(blocks)])


_watching: list[Reading] = []


@contextlib.contextmanager
def watching(reading: Reading) -> Iterator[Reading]:
    """Keep what `open_file` and `content` give, in any thread, until the end of the block."""
    _watching.append(reading)
    try:
        yield reading
    finally:
        _watching.remove(reading)


def note(source: Any) -> None:
    """Keep, while there is watching, what is going to be read."""
    if _watching:
        _watching[-1].sources.append(source)


def open_file(path: str) -> BinaryIO:
    """A file, open for reading and seeking. Raises OSError."""
    return _watching[-1].opened(path) if _watching else open(path, "rb")


def content(path: str) -> bytes | mmap.mmap:
    """The bytes of a file; those of a large one mapped into memory. Raises OSError."""
    if os.path.getsize(path) <= MAPPED_ABOVE:
        with open_file(path) as file:
            return file.read()
    return (_watching[-1] if _watching else Reading()).map(path)


class _BlockFile(io.RawIOBase):
    """A file that is read by whole blocks and hands out nothing that is not in `seen`."""

    def __init__(self, path: str, seen: dict[int, str]) -> None:
        self._path, self._seen = path, seen
        self._file = os.open(path, os.O_RDONLY)
        self._position, self._number, self._block = 0, -1, b""

    def close(self) -> None:
        if not self.closed:
            os.close(self._file)
        super().close()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position}.get(whence)
        self._position = (os.fstat(self._file).st_size if start is None else start) + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        number, offset = divmod(self._position, BLOCK)
        if number != self._number:
            self._load(number)
        part = self._block[offset : offset + len(buffer)]
        buffer[: len(part)] = part
        self._position += len(part)
        return len(part)

    def readall(self) -> bytes:
        parts = []
        while part := self.read(BLOCK):
            parts.append(part)
        return b"".join(parts)

    def _load(self, number: int) -> None:
        parts, start = [], number * BLOCK
        while start < (number + 1) * BLOCK and (
            part := os.pread(self._file, (number + 1) * BLOCK - start, start)
        ):
            parts.append(part)
            start += len(part)
        self._number, self._block = number, b"".join(parts)
        if self._block:
            digest = hashlib.sha256(self._block).hexdigest()
            if self._seen.setdefault(number, digest) != digest:
                raise changed(self._path, "read")
