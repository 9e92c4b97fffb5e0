"""Files that are appended to, and what makes their content outlive a power cut."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from pathlib import Path


def open_to_append(path: Path) -> tuple[int, bool]:
    """A file to append to, and whether it was made just now. Raises OSError, also for a pipe: a writer would
    hang once it is full.
    """
    new = not path.exists()
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    if stat.S_ISFIFO(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "it is a pipe", str(path))
    return file, new


def beside(path: Path) -> Path:
    """A name for what is to become a file, hidden beside it and new: two processes may have one number, in
    two containers, and one that was stopped must not write on in a file that the other has put in place.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")


def write_all(file: int, content: bytes) -> None:
    """Write all of it. Raises OSError, with a part of it written."""
    block = memoryview(content)
    while block:
        block = block[os.write(file, block) :]


def add(file: int, content: bytes) -> None:
    """Append all of it and flush it to the disk, or raise OSError with nothing added."""
    size = os.fstat(file).st_size
    try:
        write_all(file, content)
        sync(file)
    except OSError:
        os.ftruncate(file, size)
        raise


def sync(file: int) -> None:
    """Wait until the content of an open file is on the disk. Raises OSError."""
    try:
        os.fsync(file)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a pipe or device, which keeps nothing
            raise


def sync_folder(path: Path) -> None:
    """Make new and changed names in a folder survive a power cut, where the filesystem offers it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def identity(file: int) -> tuple[int, int, int]:
    """Device, inode number and size in bytes of an open file; size 0 for what is no regular file."""
    facts = os.fstat(file)
    return facts.st_dev, facts.st_ino, facts.st_size if stat.S_ISREG(facts.st_mode) else 0
