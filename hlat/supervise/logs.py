"""Ranks' output: written on the machine's own disk, copied into the run folder as it grows.

A rank whose output went straight to a full or hanging disk would fail or hang with it.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

_RANK_FILE = re.compile(r"(?P<rank>\d+)/(?P<stream>stdout|stderr)\.log$")


class LogMirror:
    """Copies what torchrun writes below `source` to `target`/rank-<n>-<stream>.log; numbers of ranks on this
    machine count from `first`.
    """

    def __init__(self, source: Path, target: Path, first: int = 0) -> None:
        self.source, self.target, self.first = source, target, first
        self._copied: dict[Path, int] = {}

    def files(self) -> dict[Path, Path]:
        """Each rank's file here, and its place in the run folder."""
        found = {}
        for path in sorted(self.source.rglob("*.log")):
            match = _RANK_FILE.search(path.as_posix())
            if match:
                number = self.first + int(match["rank"])
                found[path] = self.target / f"rank-{number:05}-{match['stream']}.log"
        return found

    def sync(self) -> None:
        """Append what is new. What the disk does not take now is tried again at the next call."""
        for path, copy in self.files().items():
            done = self._copied.get(path, 0)
            with contextlib.suppress(OSError), path.open("rb") as file:
                file.seek(done)
                while block := file.read(1 << 20):
                    self.target.mkdir(parents=True, exist_ok=True)
                    with copy.open("ab") as out:
                        out.truncate(self._copied.get(path, 0))  # half a block of a disk that was full
                        out.write(block)
                    self._copied[path] = self._copied.get(path, 0) + len(block)

    def tail(self, size: int = 16384) -> str:
        """The end of every rank's output, stderr after stdout."""
        parts = []
        for path in self.files():
            with contextlib.suppress(OSError), path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - size))
                parts.append((path.name, file.read().decode(errors="replace")))
        return "\n".join(text for _, text in sorted(parts, key=lambda part: part[0] == "stderr.log"))
