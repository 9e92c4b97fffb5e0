"""A folder that only one process works in at a time."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hlat.data.partial import LOCK, OWNED, check_own, claim, temporary

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
    at the end if it still exists. Raises OSError, and UserError for a folder that HLAT did not make, or a
    link: see `hlat.data.partial`.
    """
    while True:
        with suppress(FileExistsError):
            folder.mkdir()
        try:
            check_own(folder)
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
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
        if _is_same_file(handle, folder / LOCK):
            break
        os.close(handle)
    try:
        claim(folder, handle)
        yield folder
    finally:
        os.close(handle)


def _private(folder: Path) -> Iterator[Path]:
    with suppress(OSError):  # leave nothing under the shared name, unless another process has something there
        if os.listdir(folder) == [LOCK]:
            (folder / LOCK).unlink()
            folder.rmdir()
    own = temporary(folder)
    own.mkdir()
    try:
        (own / LOCK).write_bytes(OWNED)
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
