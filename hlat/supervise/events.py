"""The restart log of a supervised run: logs/supervisor/events.jsonl, one object a line."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from pathlib import Path
from typing import Any

from hlat.errors import SaveFailed
from hlat.observe.jsonl import append, encode
from hlat.observe.redact import redact, redact_all

FOLDER = Path("logs") / "supervisor"
FILE = "events.jsonl"
BAD_NODES = "bad-nodes.txt"


class Events:
    """Appends to the log, and says on stderr what a person should know. A line is on the disk when `add`
    returns; a full disk keeps lines for later.

    Args:
        folder: logs/supervisor of the run.
        quiet: say nothing (machines but the first).
    """

    def __init__(self, folder: Path, quiet: bool = False) -> None:
        self.path, self.quiet, self.host = folder / FILE, quiet, socket.gethostname()
        self._waiting: list[bytes] = []

    def add(self, event: str, line: str = "", **values: Any) -> None:
        """One event: `time` (unix seconds), `host`, its name and values; `line` is said as well."""
        entry = {"time": time.time(), "host": self.host, "event": event, **values}
        self._waiting.append(encode(redact_all(entry)))
        with contextlib.suppress(OSError, SaveFailed):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            append(self.path, b"".join(self._waiting))
            self._waiting.clear()
        if line and not self.quiet:
            with contextlib.suppress(OSError):
                print(f"hlat supervise: {redact(line)}", file=sys.stderr, flush=True)
