"""Whether a folder is still where it was, by a handle on it that its name has no part in."""

from __future__ import annotations

import os
from pathlib import Path


class Place:
    """A folder that is kept open from now until `close`. Raises OSError."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        self._name = self._link()

    def change(self) -> str:
        """What has become of the folder, in words, where another one or none is at its path by now; empty
        where it is there, or the system does not tell. Two witnesses are asked, as inode numbers alone are
        not reliable on every file system.
        """
        try:
            own = os.fstat(self._handle)
        except OSError:
            return ""
        if _same(self._folder, own):
            return ""
        name = self._link()
        if name in ("", self._name):
            return ""
        if own.st_nlink == 0 or name.endswith(" (deleted)"):
            return "was deleted"
        return f"was moved to {name}" if _same(Path(name), own) else ""

    def close(self) -> None:
        """Let go of it; calling it again does nothing."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _link(self) -> str:
        try:
            return os.readlink(f"/proc/self/fd/{self._handle}")
        except OSError:
            return ""


def _same(path: Path, facts: os.stat_result) -> bool:
    try:
        found = path.stat()
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (facts.st_dev, facts.st_ino)
