"""Ranks' output: written on the machine's own disk, copied into the run folder as it grows.

A rank whose output went straight to a full or hanging disk would fail or hang with it. The copy holds no
secret (`hlat.observe.redact`), whichever library printed it.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import BinaryIO

from hlat.observe.redact import redact

_BLOCK = 1 << 20
_RANK_FILE = re.compile(r"(?P<rank>\d+)/(?P<stream>stdout|stderr)\.log$")


class LogMirror:
    """Copies what torchrun writes below `source` to `target`/rank-<n>-<stream>.log; numbers of ranks on this
    machine count from `first`.
    """

    def __init__(self, source: Path, target: Path, first: int = 0) -> None:
        self.source, self.target, self.first = source, target, first
        self._copied: dict[Path, tuple[int, int]] = {}  # bytes read, and where the copy ends

    def files(self) -> dict[Path, Path]:
        """Each rank's file here, and its place in the run folder."""
        found = {}
        for path in sorted(self.source.rglob("*.log")):
            match = _RANK_FILE.search(path.as_posix())
            if match:
                number = self.first + int(match["rank"])
                found[path] = self.target / f"rank-{number:05}-{match['stream']}.log"
        return found

    def sync(self, last: bool = False) -> None:
        """Append the lines that are new, at the end (`last`) also one without an end. What the disk does not
        take now is tried again at the next call.
        """
        for path, copy in self.files().items():
            with contextlib.suppress(OSError), path.open("rb") as file:
                if path not in self._copied:  # what is there already is not this attempt's: go on below it
                    self._copied[path] = 0, _size(copy)
                read, written = self._copied[path]
                while block := _next(file, read, last):
                    clean = redact(block.decode(errors="surrogateescape")).encode(errors="surrogateescape")
                    self.target.mkdir(parents=True, exist_ok=True)
                    with copy.open("ab") as out:
                        out.truncate(written)  # half a block of a disk that was full
                        out.write(clean)
                    read, written = self._copied[path] = read + len(block), written + len(clean)

    def tail(self, size: int = 16384) -> str:
        """The end of every rank's output, stderr after stdout."""
        parts = []
        for path in self.files():
            with contextlib.suppress(OSError), path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - size))
                parts.append((path.name, file.read().decode(errors="replace")))
        return "\n".join(text for _, text in sorted(parts, key=lambda part: part[0] == "stderr.log"))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return 0


def _next(file: BinaryIO, read: int, last: bool) -> bytes:
    """The next lines of a file: a secret that is cut in two would not be found. Progress bars end theirs
    with a carriage return.
    """
    file.seek(read)
    block = file.read(_BLOCK)
    end = max(block.rfind(b"\n"), block.rfind(b"\r")) + 1
    whole = last or (end == 0 and len(block) == _BLOCK)
    return block if whole else block[:end]
