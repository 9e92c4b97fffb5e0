"""`checkpoint.remote` of a run, on its first rank: what is there is fetched at the start, what is saved is
uploaded in the background.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hlat.checkpoint import folder as folders
from hlat.checkpoint.folder import Broken
from hlat.checkpoint.mirror import Mirror, Owner, newer
from hlat.checkpoint.uploader import Uploader
from hlat.errors import SaveFailed, UserError
from hlat.observe.claim import UNCLAIMED, Claim
from hlat.recipe import identity, identity_diff
from hlat.storage.fingerprint import digest_of
from hlat.storage.journal import Journal
from hlat.storage.patience import Value, patiently
from hlat.storage.remote import Remote

if TYPE_CHECKING:
    from hlat.recipe import Recipe

WHERE = "checkpoint.remote"
_MOST_NAMED = 5  # damaged copies in a line
_BEAT = 5.0  # seconds between signs of life while the last upload is awaited
_PAUSES = (1.0, 15.0)  # seconds between attempts at the start: the first, the longest


def open_mirror(recipe: Recipe, root: Path, claim: Claim = UNCLAIMED, data: str = "") -> Mirror:
    """The run's checkpoints in the store. Raises UserError for a URL or a package that will not do.

    data: fingerprint of the run's data.
    """
    assert recipe.checkpoint.remote is not None
    remote = Remote(f"{recipe.checkpoint.remote.rstrip('/')}/{recipe.run.name}", WHERE)
    return Mirror(remote, root, recipe.checkpoint.keep, claim, _owner(recipe, data))


def _owner(recipe: Recipe, data: str) -> Owner:
    """What is this run's in the store: checkpoints of its recipe and data, however long it was to be."""
    own = recipe.to_dict()

    def owns(meta: Mapping[str, Any]) -> bool:
        changed = identity_diff(meta.get("recipe", {}), own)
        same = all(key.startswith("schedule.") for key, _, _ in changed)
        return same and data in ("", meta.get("data_fingerprint"))

    values = {key: value for key, value in identity(own).items() if not key.startswith("schedule.")}
    return Owner(digest_of({"recipe": values, "data": data})[:16], owns)


def _patiently(work: Callable[[], Value], seconds: float, warn: Callable[[str], None]) -> Value:
    def failure(what: str) -> SaveFailed:
        fix = "nothing was lost: start again when it does, or without checkpoint.remote"
        return SaveFailed(what, where=WHERE, fix=fix)

    return patiently(work, seconds, WHERE, failure, pauses=_PAUSES, warn=warn)


@dataclass(frozen=True)
class Stored:
    """What a store holds of a run: the meta data of its newest checkpoint, None without one; and why others
    are none, by their names.
    """

    meta: dict[str, Any] | None
    damaged: dict[str, str]


def look(recipe: Recipe, root: Path, warn: Callable[[str], None]) -> Stored:
    """Look into the store. Also finds out whether it can be written.

    Raises UserError, SaveFailed.
    """
    mirror = open_mirror(recipe, root)

    def find() -> Stored:
        mirror.remote.probe()
        found = mirror.look()
        damaged = dict(found.damaged)
        for copy in newer(found.whole, 0, ()):
            try:
                return Stored(mirror.meta(copy), damaged)
            except Broken as error:
                damaged[copy.name] = str(error)
        return Stored(None, damaged)

    return _patiently(find, recipe.checkpoint.patience, warn)


def lost(url: str, damaged: Mapping[str, str]) -> UserError | None:
    """The error for a store that holds checkpoints none of which can be used; None where it holds none."""
    if not damaged:
        return None
    return UserError(
        f"there are checkpoints in the store and none can be used ({_listed(damaged)})",
        where=f"{WHERE}: {url}",
        fix="restore one of them; to start anew choose another run.name",
    )


def _listed(damaged: Mapping[str, str]) -> str:
    known = [f"{name}: {reason}" for name, reason in sorted(damaged.items(), reverse=True)]
    return "; ".join(known[:_MOST_NAMED]) + (
        f"; and {len(known) - _MOST_NAMED} more" * (len(known) > _MOST_NAMED)
    )


class RemoteSaves:
    """The two directions.

    Args:
        recipe: where the store is, how much is kept, how long it may take.
        root: the checkpoints folder on the disk.
        journal: hears of everything.
        claim: see `Mirror`.
        data: fingerprint of the run's data.
    """

    def __init__(
        self, recipe: Recipe, root: Path, journal: Journal, claim: Claim = UNCLAIMED, data: str = ""
    ) -> None:
        self.root, self.journal, self._patience = root, journal, recipe.checkpoint.patience
        self._after_signal = min(self._patience, recipe.checkpoint.grace / 2)
        self.mirror = open_mirror(recipe, root, claim, data)
        self.uploader: Uploader | None = None
        self._damaged: dict[str, str] | None = None  # as a listing shows it; None: not looked yet
        self.sequence = 0  # the highest there is in the store

    def bring_newer(self, path: Path | None) -> int | None:
        """Fetch the newest checkpoint in the store that was saved after the one at `path` and is not damaged.

        Returns its step; None when there is none. Raises SaveFailed when the store does not answer or the
        disk is full.
        """
        sequence = folders.read_marker(path)["sequence"] if path is not None else 0
        found = _patiently(self.mirror.look, self._patience, self.journal.note)
        if self._damaged is None and found.damaged:
            left = "they are left as they are"
            self.journal.note(
                f"skipped checkpoints in {self.mirror.remote.url}: {_listed(found.damaged)}; {left}"
            )
        self._damaged, copies = found.damaged, found.whole
        self.sequence = max((copy.entry.sequence for copy in copies), default=0)
        for copy in newer(copies, sequence, self.mirror.unusable):
            start = time.monotonic()
            self.mirror.unusable[copy.name] = "it was not fetched"  # until it is, and never tried twice
            try:
                _patiently(lambda copy=copy: self.mirror.fetch(copy), self._patience, self.journal.note)  # type: ignore[misc]
            except Broken as error:
                self.mirror.unusable[copy.name] = str(error)
                line = f"skipped checkpoint {self.mirror.remote.url}/{copy.name}: {error}"
                seconds = time.monotonic() - start
                self.journal.failed("fetch", copy.entry.step, line, kind=copy.name, seconds=seconds)
                continue
            except OSError as error:
                reason, remedy = folders.explain(error, self.root, copy.bytes)
                what = f"checkpoint of step {copy.entry.step} was not fetched ({reason})"
                raise SaveFailed(what, where=str(self.root), fix=remedy) from error
            del self.mirror.unusable[copy.name]
            seconds = time.monotonic() - start
            self.journal.done("fetch", copy.entry.step, seconds=seconds, size=copy.bytes)
            self.journal.note(f"checkpoint of step {copy.entry.step:,} fetched from {self.mirror.remote.url}")
            return copy.entry.step
        return None

    def lost(self) -> UserError | None:
        """The error for a store whose copies are all damaged; None where it has none."""
        return lost(self.mirror.remote.url, {**(self._damaged or {}), **self.mirror.unusable})

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
