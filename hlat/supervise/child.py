"""Runs one command at a time, and passes on to it what asks this process to stop."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from hlat.host.python import environment, module
from hlat.observe.heartbeat import PARENT
from hlat.observe.stopping import handling
from hlat.supervise.bounded import GrowingFile

_MOST = 1 << 20
_LOOK = 1.0


class Children:
    """Runs modules, each given by its name and arguments, one after another.

    Attributes:
        received: the first signal that asked to stop; None so far.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    @contextmanager
    def forwarding(self) -> Iterator[Children]:
        """Inside, the signals that stop a run go to the command; the former handlers are put back after."""
        with handling(self._forward):
            yield self

    def run(self, words: Sequence[str], log: Path) -> tuple[int, str]:
        """Wait for a command, whose output is added to a log.

        It is in a session of its own, so that Ctrl-C reaches it once, from here, and it is told to stop when
        this process is gone (see `hlat.observe.heartbeat.prepare`).

        Returns:
            Its exit status, negative for a signal, as `subprocess` has it; 0 without a start after a signal.
            The end of what was written to the log meanwhile, a mebibyte at most.
        """
        if self.received is not None:
            return 0, ""
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "ab") as file:
            start = file.tell()
            self._process = subprocess.Popen(
                module(*words),
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**environment(), PARENT: str(os.getpid())},
                start_new_session=True,
            )
            if self.received is not None:  # it came while the process started
                self._process.send_signal(self.received)
            bounds = GrowingFile(log, start)
            while (code := _wait(self._process)) is None:
                bounds.bound()
            self._process = None
        with open(log, "rb") as file:
            file.seek(max(start, os.fstat(file.fileno()).st_size - _MOST))
            return code, file.read(_MOST).decode(errors="replace")

    def _forward(self, number: int, _frame: FrameType | None) -> None:
        """Pass on the first of them, and every Ctrl-C: the second one interrupts a run that saves."""
        if self.received is not None and number != signal.SIGINT:
            return
        self.received = self.received or number
        if self._process is not None:
            self._process.send_signal(number)


def _wait(process: subprocess.Popen[bytes]) -> int | None:
    try:
        return process.wait(_LOOK)
    except subprocess.TimeoutExpired:
        return None
