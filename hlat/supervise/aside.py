"""Work that may block (a file on a network that hangs, a pipe that nobody reads), in a thread of its own."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import time
from collections.abc import Callable
from typing import TextIO

_MOST = 512  # pieces of work that wait; more are refused


class Aside:
    """One thread, and what waits for it. It ends with the process, whatever it waits for.

    Args:
        name: of the thread.
        most: pieces of work that may wait.
    """

    def __init__(self, name: str, most: int = _MOST) -> None:
        self._work: queue.Queue[tuple[Callable[[], None], threading.Event]] = queue.Queue(most)
        self._thread: threading.Thread | None = None
        self._name, self._late, self._starting = name, False, threading.Lock()

    def do(self, work: Callable[[], None], seconds: float = 0.0) -> bool:
        """Let the thread do it after all else; what it raises is not told.

        Args:
            work: what to do.
            seconds: wait so long for its end. Nothing is waited for while earlier work is late.

        Returns:
            Whether the work was taken: False when too much waits already.
        """
        done = threading.Event()
        with self._starting:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
        try:
            self._work.put_nowait((work, done))
        except queue.Full:
            return False
        if seconds > 0 and not self._late:
            self._late = not done.wait(seconds)
        return True

    def wait(self, seconds: float) -> bool:
        """Wait for all that was taken. Returns whether it has been done in time."""
        end = time.monotonic() + seconds
        while self._work.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.005)
        return not self._work.unfinished_tasks

    def _run(self) -> None:
        while True:
            work, done = self._work.get()
            with contextlib.suppress(Exception):
                work()
            done.set()
            self._late = self._late and not self._work.empty()
            self._work.task_done()


def write_whole(stream: TextIO, text: str) -> None:
    """Write to a stream of this process past its buffer, whose lock a thread that hangs would keep."""
    try:
        handle = stream.fileno()
    except (OSError, ValueError):  # captured by a test, or in a notebook
        stream.write(text)
        stream.flush()
        return
    with contextlib.suppress(OSError, ValueError):
        stream.flush()
    data = text.encode(stream.encoding or "utf-8", "backslashreplace")
    while data:
        data = data[os.write(handle, data) :]
