"""A folder on this machine's own disk for one attempt, with room set aside for what must be written when the
disk is full: heartbeats, and how the ranks ended.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hlat.observe.heartbeat import SLOT, heartbeat_file
from hlat.observe.text import byte_size

_RESULT = 64 << 10
_LITTLE = 1 << 20  # bytes: so few that it is worth a try


class Scratch:
    """Attributes: path: the folder, new. result: the file for how the ranks ended.

    Args:
        ranks: of this machine.

    Raises OSError with the folder's name where it cannot be made.
    """

    def __init__(self, ranks: Iterable[int]) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="hlat-"))
        self.result = self.path / "result.json"
        try:
            _set_aside(self.result, _RESULT)
            for rank in ranks:
                _set_aside(heartbeat_file(self.path, rank), SLOT)
        except OSError:
            self.remove()
            raise

    def trouble(self, silent: bool = False) -> str:
        """Why nothing can be written here, with what is free; empty when it can be.

        Args:
            silent: try it whatever the file system says of itself: a quota, for one, does not show there.
        """
        try:
            facts = os.statvfs(self.path)
        except OSError as error:
            return described(error, self.path)
        little = facts.f_bavail * facts.f_frsize < _LITTLE or (facts.f_files and not facts.f_favail)
        if not (silent or little or facts.f_flag & os.ST_RDONLY):
            return ""
        probe = self.path / ".room"
        try:
            with probe.open("wb", buffering=0) as file:
                if file.write(bytes(SLOT)) < SLOT:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(probe))
        except OSError as error:
            return described(error, self.path)
        finally:
            with contextlib.suppress(OSError):
                probe.unlink()
        return ""

    def read_result(self) -> dict[str, Any] | None:
        """What the agent has written; None when it has not."""
        try:
            found = json.loads(self.result.read_bytes().rstrip(b"\0 \n"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def remove(self) -> None:
        """Delete the folder."""
        shutil.rmtree(self.path, ignore_errors=True)


def write_result(path: Path, values: dict[str, Any]) -> None:
    """Write into the room that is set aside; a file that is not there is made."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.pwrite(handle, json.dumps(values).encode(), 0)
    finally:
        os.close(handle)


def described(error: OSError, path: Path) -> str:
    """What went wrong, where, and how much is free there."""
    return f"{path}: {error.strerror or error} ({room(path)})"


def room(path: Path) -> str:
    """Bytes and files that are free on the disk of a path, of which the last parts may not exist."""
    for place in (path, *path.parents):
        try:
            facts = os.statvfs(place)
        except OSError:
            continue
        size, unit = facts.f_blocks * facts.f_frsize, facts.f_frsize
        text = f"{byte_size(facts.f_bavail * unit)} of {byte_size(size)} free"
        if facts.f_files:
            text += f", {facts.f_favail:,} of {facts.f_files:,} files"
        return f"{text}, mounted read-only" if facts.f_flag & os.ST_RDONLY else text
    return "nothing is known of its disk"


def _set_aside(path: Path, size: int) -> None:
    with path.open("wb") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise OSError(error.errno, error.strerror, str(path)) from None
        file.write(bytes(size))
