"""What happens to a run's files: rows for metrics.jsonl, a line on the console for each kind of trouble."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any


class Journal:
    """Collects what the main thread and those in the background have to say; `report` passes it on.

    Args:
        warn: receives a line about each kind of trouble, once until that works again.

    Attributes:
        rows: for metrics.jsonl, of kind `storage`; whoever writes them takes them out.
    """

    def __init__(self, warn: Callable[[str], None]) -> None:
        self.rows: deque[dict[str, Any]] = deque()
        self._warn = warn
        self._lines: deque[str] = deque()
        self._known: dict[str, set[str]] = {}

    def done(self, what: str, step: int, *, seconds: float, size: int, row: bool = True) -> None:
        """Something worked.

        Args:
            what: `save`, `upload`, `fetch`.
            step: of the checkpoint.
            seconds, size: how long it took, and bytes.
            row: whether it gets a row.
        """
        if row:
            self._row(what, step, seconds, size, None)
        if self._known.pop(what, None):
            self._lines.append(f"{what} of the checkpoint of step {step:,} worked: the trouble is over")

    def failed(self, what: str, step: int, error: str, *, kind: str, seconds: float, size: int = 0) -> None:
        """Something failed.

        Args:
            error: what happened, a line.
            kind: failures of one kind are told once until `what` works again; "" is not told at all.
            what, step, seconds, size: as in `done`.
        """
        self._row(what, step, seconds, size, error)
        if kind and kind not in self._known.setdefault(what, set()):
            self._known[what].add(kind)
            self._lines.append(error)

    def note(self, line: str) -> None:
        """A line for the console."""
        self._lines.append(line)

    def report(self) -> None:
        """Pass the lines on. For the main thread."""
        while self._lines:
            self._warn(self._lines.popleft())

    def _row(self, what: str, step: int, seconds: float, size: int, error: str | None) -> None:
        row = {"kind": "storage", "step": step, "what": what, "seconds": round(seconds, 3), "bytes": size}
        self.rows.append({**row, "error": error})
