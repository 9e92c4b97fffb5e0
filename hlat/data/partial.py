"""What is written before it has its name: folders that are HLAT's own, and temporary files.

A folder `X.partial` is taken over, emptied or removed only where HLAT made it: then `.lock` in it says so, or
it holds nothing else. Whatever else has that name stays as it is, and so does what a link of that name
points to.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import stat
from pathlib import Path

from hlat.errors import UserError
from hlat.host import json_text

LOCK = ".lock"
OWNED = b"a folder that hlat fills; safe to delete while no hlat runs\n"


def temporary(path: Path) -> Path:
    """A name beside `path` that no other process has, on any machine."""
    own = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    return path.with_name(f"{path.name}.{own}.tmp")


def check_own(folder: Path) -> None:
    """Raises UserError unless a folder is HLAT's, or empty; FileNotFoundError when it is gone."""
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode):
        raise _foreign(folder, "is a link" if stat.S_ISLNK(found.st_mode) else "is no folder")
    names = sorted(os.listdir(folder))
    state = _lock_state(folder)
    others = [name for name in names if name != LOCK]
    if state == "owned" or (not others and state != "foreign"):
        return
    if state == "empty" and _is_earlier_job(folder):
        return
    # It may have been removed, or got its name, while it was looked at.
    if not os.path.samestat(found, os.lstat(folder)):
        raise FileNotFoundError(folder)
    raise _foreign(folder, f"holds {others[0] if others else LOCK}, which hlat did not write")


def claim(folder: Path, lock: int) -> None:
    """Note in the open lock file of a folder, which `check_own` has seen, that the folder is HLAT's."""
    if os.fstat(lock).st_size == 0:
        os.pwrite(lock, OWNED, 0)


def clear(folder: Path) -> None:
    """Remove all that a folder of HLAT's holds, but its lock. Raises OSError."""
    for item in folder.iterdir():
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        elif item.name != LOCK:
            item.unlink()


def discard(folder: Path) -> None:
    """Remove a folder that HLAT made, with all it holds; any other stays. Raises OSError."""
    try:
        check_own(folder)
    except (UserError, FileNotFoundError):
        return
    clear(folder)  # the lock last: whoever waits for it must not find the folder without
    (folder / LOCK).unlink(missing_ok=True)
    folder.rmdir()


def _lock_state(folder: Path) -> str:
    lock = folder / LOCK
    try:
        if not stat.S_ISREG(os.lstat(lock).st_mode):
            return "foreign"
        content = lock.read_bytes()
    except OSError:
        return "none"
    return "owned" if content == OWNED else "foreign" if content else "empty"


def _is_earlier_job(folder: Path) -> bool:
    """Whether an earlier version filled it, which left the lock file empty beside the job's description."""
    try:
        job = json_text.loads((folder / "job.json").read_bytes())
        return {"key", "tokenizer_identity", "units"} <= job.keys()
    except (OSError, ValueError, AttributeError):
        return False


def _foreign(folder: Path, what: str) -> UserError:
    return UserError(
        f"{what}; it is left as it is",
        where=str(folder),
        fix="rename or remove it, or choose another name for what is to be written",
    )
