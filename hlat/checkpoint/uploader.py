"""Uploads a run's checkpoints in the background, one after the other, for as long as the store needs.

Training never waits for it. Of the checkpoints that wait only the newest is kept: a store that cannot keep up
gets fewer of them.
"""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

from hlat.checkpoint.folder import Broken
from hlat.checkpoint.mirror import Gone, Mirror
from hlat.errors import FolderLost
from hlat.storage.journal import Journal
from hlat.storage.remote import StoreError

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0  # seconds between attempts, doubled each time
LONGEST_LAST_PAUSE = 5.0  # while the end of the run waits


class Uploader:
    """See the module text.

    Args:
        mirror: where to.
        journal: hears of every attempt.
    """

    def __init__(self, mirror: Mirror, journal: Journal) -> None:
        self.mirror, self.journal = mirror, journal
        self._changed = threading.Condition()
        self._waiting: Path | None = None
        self._current: Path | None = None
        self._hurry = self._lost = False
        self._error = ""
        self.uploaded: int | None = None
        """Step of the newest checkpoint that is known to be complete in the store."""
        threading.Thread(target=self._run, name="uploads", daemon=True).start()

    def submit(self, folder: Path) -> None:
        """Upload a complete step folder after the one that is under way, in place of one that waits."""
        with self._changed:
            if self._lost:
                return
            skipped, self._waiting = self._waiting, folder
            self._changed.notify_all()
        if skipped is not None and skipped != folder:
            self._skip(skipped, f"step {_step(folder):,} is newer")

    def keeps(self, step: int) -> bool:
        """Whether the checkpoint of a step is being uploaded and must stay on the disk for now."""
        with self._changed:
            return self._current is not None and _step(self._current) == step

    def wait(self, seconds: float) -> str | None:
        """Wait until everything is uploaded, at most so long. Returns None, or what prevents it."""
        end = time.monotonic() + seconds
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            while self._waiting is not None or self._current is not None:
                left = end - time.monotonic()
                if left <= 0:
                    return self._error or self._under_way()
                self._changed.wait(left)
            self._hurry = False
        return None

    def _under_way(self) -> str:
        words = []
        if self._current is not None:
            words.append(f"step {_step(self._current):,} is still being uploaded")
        if self._waiting is not None:
            words.append(f"step {_step(self._waiting):,} waits")
        return ", ".join(words)

    def _run(self) -> None:
        with contextlib.suppress(FolderLost):  # the main thread finds out for itself, and ends the run
            self._work()
        with self._changed:
            self._lost, self._waiting, self._current = True, None, None
            self._changed.notify_all()

    def _work(self) -> None:
        self._clean()
        while True:
            with self._changed:
                self._current = None
                self._changed.notify_all()
                while self._waiting is None:
                    self._changed.wait()
                folder, self._waiting = self._waiting, None
                self._current = folder
            self._upload(folder)

    def _upload(self, folder: Path) -> None:
        pause = FIRST_PAUSE
        while True:
            start = time.monotonic()
            try:
                copy = self.mirror.upload(folder)
            except Gone:
                self._skip(folder, "it is not on the disk any more")
                return
            except Broken as error:
                line = f"{folder} is damaged on the disk and was not uploaded: {error}"
                self._failed(folder, line, f"damaged {folder.name}", start)
                return
            except FolderLost:
                raise
            except Exception as error:  # also a defect must not end the uploads in silence
                line = f"checkpoint of step {_step(folder):,} was not uploaded: {_text(error)}"
                kind = error.kind if isinstance(error, StoreError) else type(error).__name__
                self._failed(folder, f"{line}; it will be tried again", kind, start)
                self._error = _text(error)
                if self._pause(pause):
                    self._skip(folder, "the store failed and there is a newer one")
                    return
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            self._error, self.uploaded = "", _step(folder)
            if copy is not None:
                self.journal.done("upload", _step(folder), seconds=time.monotonic() - start, size=copy.bytes)
                self._tidy(_step(folder))
            return

    def _clean(self) -> None:
        """Once at the start: what killed processes left unfinished."""
        with contextlib.suppress(StoreError):  # `_tidy` will tell
            self.mirror.abort_uploads()
        self._tidy(0)

    def _tidy(self, step: int) -> None:
        start = time.monotonic()
        try:
            for old in self.mirror.tidy():
                seconds = time.monotonic() - start
                self.journal.done("delete", old.entry.step, seconds=seconds, size=old.bytes)
        except StoreError as error:
            line = f"old checkpoints were not deleted: {error}; it will be tried after the next upload"
            seconds = time.monotonic() - start
            self.journal.failed("delete", step, line, kind=error.kind, seconds=seconds)

    def _pause(self, seconds: float) -> bool:
        """Wait before another attempt; True as soon as there is a newer checkpoint."""
        start = time.monotonic()
        with self._changed:
            while self._waiting is None:
                longest = min(seconds, LONGEST_LAST_PAUSE) if self._hurry else seconds
                left = start + longest - time.monotonic()
                if left <= 0:
                    return False
                self._changed.wait(left)
            return True

    def _skip(self, folder: Path, why: str) -> None:
        self.journal.failed("upload", _step(folder), f"skipped: {why}", kind="", seconds=0.0)

    def _failed(self, folder: Path, line: str, kind: str, start: float) -> None:
        self.journal.failed("upload", _step(folder), line, kind=kind, seconds=time.monotonic() - start)


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, StoreError) else f"{type(error).__name__}: {error}"


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
