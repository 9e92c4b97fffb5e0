"""The file lock that Neuron's compiler wrapper holds in a module's folder while it compiles.

The lock is a flock on `model.hlo_module.pb.lock`. A file that nobody has locked says nothing: its process has
ended, and the kernel took the lock away. Such a file is never deleted here. Whoever waits for the lock has it
open, and would hold a file that the next one does not find.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

SUFFIX = ".lock"
_NAME = f"model.hlo_module.pb{SUFFIX}"
_TRIES = 5  # until the file that was locked is the one at the path
_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def locked(folder: Path) -> bool:
    """Whether a process holds a lock in a module's folder, or may do so; the answer may be old at once."""
    for path in folder.glob(f"*{SUFFIX}"):
        with ExitStack() as moment:
            if not _lock(path, moment, fcntl.LOCK_SH):  # two that ask do not see each other
                return True
    return False


@contextmanager
def holding(folder: Path) -> Iterator[bool]:
    """Hold a module's lock inside, as a compiler would, without waiting for it. The value says whether it is
    held; False: another process has it.
    """
    own = folder / _NAME
    with ExitStack() as stack:
        others = [path for path in sorted(folder.glob(f"*{SUFFIX}")) if path != own]
        yield all(_lock(path, stack, fcntl.LOCK_EX, make=path == own) for path in (*others, own))


def _lock(path: Path, stack: ExitStack, kind: int, make: bool = False) -> bool:
    """Lock a file until the stack ends, or know that nobody has it. Returns False where another process has
    it, and for a file that cannot be opened or locked.

    make: make a file that is missing. Where the file system has no locks, one that this makes is as good.
    """
    for _ in range(_TRIES):
        there = path.exists()
        if not there and not make:
            return True
        with ExitStack() as attempt:
            try:
                handle = os.open(path, os.O_RDONLY | (os.O_CREAT if make else 0), 0o666)
                attempt.callback(os.close, handle)
                fcntl.flock(handle, kind | fcntl.LOCK_NB)
            except FileNotFoundError:
                continue
            except OSError as error:
                if there or error.errno not in _WITHOUT_LOCKS:
                    return False
                path.unlink(missing_ok=True)  # nobody can wait for it
                return True
            if _is_at(handle, path):  # else its holder has deleted it when it was done
                stack.push(attempt.pop_all())
                return True
    return False


def _is_at(handle: int, path: Path) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(handle), os.stat(path))
    return False
