"""What a supervisor leaves of a run that never began: nothing, after a mistake in its recipe or data."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from hlat.supervise.events import FOLDER


class Traces:
    """The folders that are not there before the supervisor makes them.

    Args:
        run: the run folder.
    """

    def __init__(self, run: Path) -> None:
        self._run = run
        self._new = [folder for folder in (run, *run.parents) if not folder.exists()]

    def are_all(self) -> bool:
        """Whether the run folder was not there before and holds nothing but the supervisor's own logs."""
        logs = FOLDER.parts[0]
        try:
            found = (
                [path.name for path in self._run.iterdir()],
                [p.name for p in (self._run / logs).iterdir()],
            )
        except OSError:
            return False
        return bool(self._new) and found == ([logs], [FOLDER.name])

    def remove(self) -> None:
        """Remove them, as far as nobody else has put something there."""
        shutil.rmtree(self._run / FOLDER, ignore_errors=True)
        with contextlib.suppress(OSError):
            (self._run / FOLDER.parts[0]).rmdir()
            for folder in self._new:
                folder.rmdir()
