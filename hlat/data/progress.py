"""What is shown while text is tokenized: a bar on a terminal, one line at the end elsewhere.

Only in the first process of a run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hlat.data.build import Built


def text_size(size: int) -> str:
    """Bytes of text for a person: `812 bytes`, `43.1 kB`, `1,234.5 MB`."""
    if size < 1000:
        return f"{size} byte{'s' * (size != 1)}"
    return f"{size / 1e3:.1f} kB" if size < 1e6 else f"{size / 1e6:,.1f} MB"


class Bar:
    """Receives progress in bytes.

    Shows nothing before the first report, so that a hit in the cache stays silent.
    """

    def __init__(self, label: str, quiet: bool) -> None:
        self._label, self._quiet = label, quiet
        self._progress: Any = None
        self._task: Any = None

    def update(self, done: int, total: int) -> None:
        """`done` of `total` bytes of text; `total` is an estimate (compressed files hold more)."""
        if self._quiet or not sys.stderr.isatty():
            return
        if self._progress is None:
            self._start()
        self._progress.update(self._task, completed=done, total=max(done, total))

    def finish(self, built: Built) -> None:
        """Say what was done, if anything was."""
        self.close()
        if not self._quiet and built.seconds:
            again = f", {built.reused_units} units kept from an interrupted run" if built.reused_units else ""
            speed = built.bytes / 1e6 / max(built.seconds, 1e-9)
            size = text_size(built.bytes)
            print(
                f"{self._label}: {size} in {built.seconds:.1f} s ({speed:.1f} MB/s){again}",
                file=sys.stderr,
            )

    def close(self) -> None:
        """Take the bar off the screen."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        stream = getattr(sys.stderr, "unguarded", sys.stderr)  # rich draws with control characters
        self._progress = Progress(*columns, console=Console(file=stream), transient=True)
        self._task = self._progress.add_task(self._label, total=None)
        self._progress.start()


@contextmanager
def tokenizing(label: str, quiet: bool = False) -> Iterator[Bar]:
    """A bar for one piece of work, taken down whatever happens."""
    bar = Bar(label, quiet or os.environ.get("RANK", "0") != "0")
    try:
        yield bar
    finally:
        bar.close()
