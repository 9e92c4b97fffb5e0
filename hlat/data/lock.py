"""A folder that only one process works in at a time."""

from __future__ import annotations

import errno
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # not a POSIX system: treated as a file system without locks
    fcntl = None  # type: ignore[assignment]

_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


@contextmanager
def locked_folder(folder: Path) -> Iterator[Path]:
    """Create the folder if need be and hold its lock; waits for the process that holds it, however long.

    The lock is a `flock` on `.lock` inside, so the system drops it when its holder dies. On a file system
    without locks the folder gets a name of its own for this process (no waiting, no resuming) and is removed
    at the end if it still exists. Raises OSError.
    """
    while True:
        folder.mkdir(exist_ok=True)
        try:
            handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # the holder removed or renamed the folder in between
        try:
            if fcntl is None:
                raise OSError(errno.ENOSYS, "no file locks on this system")
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            os.close(handle)
            if error.errno not in _NO_LOCKS:
                raise
            yield from _private(folder)
            return
        if _is_same_file(handle, folder / ".lock"):
            break
        os.close(handle)
    try:
        yield folder
    finally:
        os.close(handle)


def _private(folder: Path) -> Iterator[Path]:
    with suppress(OSError):  # leave nothing under the shared name, unless another process has something there
        (folder / ".lock").unlink()
        folder.rmdir()
    own = folder.with_name(f"{folder.name}-{socket.gethostname()}-{os.getpid()}")
    own.mkdir(exist_ok=True)
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _is_same_file(handle: int, path: Path) -> bool:
    """Whether the locked file is still the one under that path.

    Its folder may have been renamed or removed while we waited.
    """
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
