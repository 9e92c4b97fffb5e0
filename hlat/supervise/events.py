"""The restart log of a supervised run: logs/supervisor/events.jsonl, one object a line."""

from __future__ import annotations

import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

from hlat.errors import SaveFailed
from hlat.observe.jsonl import append, encode
from hlat.observe.redact import redact, redact_all
from hlat.observe.terminal import one_line
from hlat.supervise.aside import Aside, write_whole
from hlat.supervise.scratch import room

FOLDER = Path("logs") / "supervisor"
FILE = "events.jsonl"
BAD_NODES = "bad-nodes.txt"
_FILE_SECONDS, _LINE_SECONDS = 5.0, 1.0  # how long a disk or the reader of a pipe may hold up the supervisor


class Events:
    """Appends to the log, and says on stderr what a person should know. A line is on the disk when `add`
    returns, unless the disk takes longer than some seconds; a full disk keeps lines for later, and is told
    of once.

    Args:
        folder: logs/supervisor of the run.
        quiet: say nothing (machines but the first).
    """

    def __init__(self, folder: Path, quiet: bool = False) -> None:
        self.path, self.quiet, self.host = folder / FILE, quiet, socket.gethostname()
        self._waiting: list[bytes] = []
        self._lock = threading.Lock()
        self._file, self._stderr, self._failing = Aside("events"), Aside("said"), False

    def add(self, event: str, line: str = "", **values: Any) -> None:
        """One event: `time` (unix seconds), `host`, its name and values; `line` is said as well."""
        entry = {"time": time.time(), "host": self.host, "event": event, **values}
        with self._lock:
            self._waiting.append(encode(redact_all(entry)))
        self._file.do(self._append, _FILE_SECONDS)
        self.say(line)

    def say(self, line: str) -> None:
        """What a person should know, without an event in the file."""
        if line and not self.quiet:
            self._say(line)

    def _append(self) -> None:
        with self._lock:
            lines = list(self._waiting)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append(self.path, b"".join(lines))
        except (OSError, SaveFailed) as error:
            if not self._failing:
                self._failing = True
                self._say(f"the restart log cannot be written: {error} ({room(self.path)})", 0.0)
            return
        self._failing = False
        with self._lock:
            del self._waiting[: len(lines)]

    def _say(self, line: str, seconds: float = _LINE_SECONDS) -> None:
        text = f"hlat supervise: {one_line(redact(line))}\n"
        self._stderr.do(lambda: write_whole(sys.stderr, text), seconds)
