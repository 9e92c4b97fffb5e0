"""`checkpoint.remote` of a run, on its first rank: what is there is fetched at the start, what is saved is
uploaded in the background.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hlat.checkpoint import folder as folders
from hlat.checkpoint.folder import Broken
from hlat.checkpoint.mirror import Mirror, newer
from hlat.checkpoint.uploader import Uploader
from hlat.errors import SaveFailed, UserError
from hlat.observe.claim import UNCLAIMED, Claim
from hlat.storage.journal import Journal
from hlat.storage.patience import Value, patiently
from hlat.storage.remote import Remote

if TYPE_CHECKING:
    from hlat.recipe import Recipe

WHERE = "checkpoint.remote"
_BEAT = 5.0  # seconds between signs of life while the last upload is awaited
_PAUSES = (1.0, 15.0)  # seconds between attempts at the start: the first, the longest


def open_mirror(recipe: Recipe, root: Path, claim: Claim = UNCLAIMED) -> Mirror:
    """The run's checkpoints in the store. Raises UserError for a URL or a package that will not do."""
    assert recipe.checkpoint.remote is not None
    remote = Remote(f"{recipe.checkpoint.remote.rstrip('/')}/{recipe.run.name}", WHERE)
    return Mirror(remote, root, recipe.checkpoint.keep, claim)


def _patiently(work: Callable[[], Value], seconds: float, warn: Callable[[str], None]) -> Value:
    def failure(what: str) -> SaveFailed:
        fix = "nothing was lost: start again when it does, or without checkpoint.remote"
        return SaveFailed(what, where=WHERE, fix=fix)

    return patiently(work, seconds, WHERE, failure, pauses=_PAUSES, warn=warn)


def newest_meta(recipe: Recipe, root: Path, warn: Callable[[str], None]) -> dict[str, Any] | None:
    """The meta data of the newest checkpoint in the store; None without one. Also finds out whether the store
    can be written.

    Raises UserError, SaveFailed.
    """
    mirror = open_mirror(recipe, root)

    def look() -> dict[str, Any] | None:
        mirror.remote.probe()
        for copy in newer(mirror.copies(), 0, set()):
            try:
                return dict(json.loads(mirror.meta(copy)))
            except (FileNotFoundError, ValueError):
                continue  # damaged: told when it is fetched
        return None

    return _patiently(look, recipe.checkpoint.patience, warn)


class RemoteSaves:
    """The two directions.

    Args:
        recipe: where the store is, how much is kept, how long it may take.
        root: the checkpoints folder on the disk.
        journal: hears of everything.
        claim: see `Mirror`.
    """

    def __init__(self, recipe: Recipe, root: Path, journal: Journal, claim: Claim = UNCLAIMED) -> None:
        self.root, self.journal, self._patience = root, journal, recipe.checkpoint.patience
        self._after_signal = min(self._patience, recipe.checkpoint.grace / 2)
        self.mirror = open_mirror(recipe, root, claim)
        self.uploader: Uploader | None = None
        self.sequence = 0  # the highest there is in the store

    def bring_newer(self, path: Path | None) -> int | None:
        """Fetch the newest checkpoint in the store that was saved after the one at `path` and is not damaged.

        Returns its step; None when there is none. Raises SaveFailed when the store does not answer or the
        disk is full.
        """
        sequence = folders.read_marker(path)["sequence"] if path is not None else 0
        copies = _patiently(self.mirror.copies, self._patience, self.journal.note)
        self.sequence = max((copy.entry.sequence for copy in copies), default=0)
        for copy in newer(copies, sequence, self.mirror.unusable):
            start = time.monotonic()
            self.mirror.unusable.add(copy.name)  # until it has proved to be good, and never fetched twice
            try:
                _patiently(lambda copy=copy: self.mirror.fetch(copy), self._patience, self.journal.note)  # type: ignore[misc]
            except Broken as error:
                line = f"skipped checkpoint {self.mirror.remote.url}/{copy.name}: {error}"
                seconds = time.monotonic() - start
                self.journal.failed("fetch", copy.entry.step, line, kind=copy.name, seconds=seconds)
                continue
            except OSError as error:
                reason, remedy = folders.explain(error, self.root, copy.bytes)
                what = f"checkpoint of step {copy.entry.step} was not fetched ({reason})"
                raise SaveFailed(what, where=str(self.root), fix=remedy) from error
            self.mirror.unusable.discard(copy.name)
            seconds = time.monotonic() - start
            self.journal.done("fetch", copy.entry.step, seconds=seconds, size=copy.bytes)
            self.journal.note(f"checkpoint of step {copy.entry.step:,} fetched from {self.mirror.remote.url}")
            return copy.entry.step
        return None

    def lost(self) -> UserError:
        """The error for a store whose copies are all damaged."""
        names = ", ".join(sorted(self.mirror.unusable))
        return UserError(
            f"there are checkpoints in the store and none can be used (damaged: {names})",
            where=f"{WHERE}: {self.mirror.remote.url}",
            fix="restore one of them; to start anew choose another run.name",
        )

    def start(self, path: Path | None) -> None:
        """Begin to upload, with the checkpoint at `path`, if the store does not have it."""
        self.uploader = Uploader(self.mirror, self.journal)
        if path is not None:
            self.uploader.submit(path)

    def submit(self, step: int) -> None:
        """Upload the checkpoint of a step in the background."""
        if self.uploader is not None:
            self.uploader.submit(folders.step_folder(self.root, step))

    def keeps(self, step: int) -> bool:
        """Whether the checkpoint of a step must stay on the disk until it is uploaded."""
        return self.uploader is not None and self.uploader.keeps(step)

    def finish(self, stopped: bool, beat: Callable[[], None] = lambda: None) -> None:
        """Wait for the uploads, at most `checkpoint.patience`, or half of `checkpoint.grace` when a signal
        has stopped the run: its state is safe on the disk, and the next start goes on.

        Args:
            stopped: by a signal.
            beat: called now and then.

        Raises SaveFailed when they are not complete by then, unless it was stopped.
        """
        if self.uploader is None:
            return
        seconds = self._after_signal if stopped else self._patience
        end = time.monotonic() + seconds
        while problem := self.uploader.wait(min(_BEAT, max(0.0, end - time.monotonic()))):
            if time.monotonic() >= end:
                break
            beat()
            self.journal.report()
        self.mirror.claim.confirm()  # who has lost the folder does not say that all is there
        if problem is None:
            return
        last = self.uploader.uploaded
        there = f"the newest there is of step {last:,}" if last is not None else "this run uploaded none"
        what = f"the last checkpoint is safe in {self.root} but not in the store after {seconds:.0f} s"
        what = f"{what}: {problem}; {there}"
        if stopped:
            self.journal.note(f"{WHERE}: {what}; the next start goes on")
            return
        raise SaveFailed(what, where=WHERE, fix="start again to go on with the upload")
