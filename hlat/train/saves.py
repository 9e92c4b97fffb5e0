"""Where a run's state is kept: in HLAT's checkpoints, or (`checkpoint.format: nxd`) in NxD's own files while
it trains.

What a run continues from is the newer of the two, whichever of them it writes. A save that fails is reported
and tried again a few steps later; training goes on. Only the last one has to succeed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hlat.checkpoint.nxd import NxdFolder, newest_nxd, unfinished_nxd
from hlat.checkpoint.reader import lost
from hlat.checkpoint.store import CheckpointStore
from hlat.errors import FolderLost, SaveFailed, UserError
from hlat.observe.claim import UNCLAIMED, Claim
from hlat.storage.journal import Journal
from hlat.train import state
from hlat.train.remote import RemoteSaves

if TYPE_CHECKING:
    from hlat.checkpoint.reader import Checkpoint
    from hlat.recipe import Recipe
    from hlat.train.run import Run

SETTLE = 10  # steps after which a save in NxD's background must be complete
RETRY_STEPS = 10  # after which the outcome of a save is compared, and a failed one tried again
LONGEST_PAUSE = 15.0  # seconds between two attempts at the last save


class Saves:
    """A run's checkpoints in HLAT's format. Every method is collective.

    Args:
        folder: the checkpoints folder.
        nxd_folder: where NxD's files are, if there are any.
        recipe: how often, how many.
        warn: receives a line about each checkpoint that cannot be used.
        tokenizer: its files, kept with each checkpoint.
        exchange: every rank's value, by rank, on every rank.
        claim: asked on the first rank before anything is written or deleted.
        data: fingerprint of the run's data: what is of another is not this run's.

    Attributes:
        journal: what went wrong and what worked.
    """

    def __init__(
        self,
        folder: Path,
        nxd_folder: Path,
        recipe: Recipe,
        warn: Callable[[str], None],
        tokenizer: Sequence[Path] = (),
        exchange: Callable[[Any], list[Any]] = lambda value: [value],
        claim: Claim = UNCLAIMED,
        data: str = "",
    ) -> None:
        self.journal, self._exchange, self._claim = Journal(warn), exchange, claim
        self._saving: int | None = None  # step of a save whose completion nobody was told of
        self._failed: SaveFailed | None = None  # the last save's failure, as all ranks know it
        self._open_since: float | None = None  # when the last save began, until its outcome is known
        self._step = 0  # of the last save
        self._sent: int | None = None  # step of the last checkpoint given to the uploads
        self._countdown: int | None = None  # steps until the outcome of the last save is compared
        self.section = section = recipe.checkpoint
        self.nxd_folder, self.tokenizer = nxd_folder, list(tokenizer)
        self.store = CheckpointStore(
            folder,
            keep=section.keep,
            permanent_every_tokens=section.permanent_every_tokens,
            async_=section.async_,
            warn=warn,
            claim=claim,
        )
        self._remote: RemoteSaves | None = None
        if section.remote is not None and self.store.first:
            self._remote = RemoteSaves(recipe, folder, self.journal, claim, data)
            self.store.keep_back = self._remote.keeps
        self._remote_searched = section.remote is None

    def find(self, before: int | None = None) -> Checkpoint | NxdFolder | None:
        """The newest state there is, of a step below `before` if that is given; None where there is none. The
        first time also `checkpoint.remote` is searched: what is newer there is fetched, and uploading begins.

        Raises SaveFailed when the store does not answer for `checkpoint.patience`; without `before` UserError
        when there are checkpoints and none can be used.
        """
        checkpoint, files = self.store.newest(before=before), newest_nxd(self.nxd_folder)
        if not self._remote_searched:
            self._remote_searched = True
            checkpoint = self._newest_of_both(checkpoint)
        if files is not None and before is not None and files.step >= before:
            files = None
        if files is not None and (checkpoint is None or files.step > checkpoint.step):
            return files
        if checkpoint is None and before is None:
            self._refuse_to_start_over()
        return checkpoint

    def _refuse_to_start_over(self) -> None:
        """Raise UserError where there are checkpoints, here or in the store, and none can be used."""
        error = lost(self.store.root, self.store.skipped, self.nxd_folder, unfinished_nxd(self.nxd_folder))
        if error is None and self._remote is not None:
            error = self._remote.lost()
        words = None if error is None else (error.what, error.where, error.fix)
        if (words := self._exchange(words)[0]) is not None:  # as the first rank sees it
            what, where, fix = words
            raise UserError(what, where=where, fix=fix)

    def _newest_of_both(self, checkpoint: Checkpoint | None) -> Checkpoint | None:
        while True:
            step = None
            if self._remote is not None:
                step = self._remote.bring_newer(checkpoint.path if checkpoint else None)
                self.store.after_sequence = self._remote.sequence
                self.journal.report()
            if self._exchange(step)[0] is None:
                break
            checkpoint = self.store.newest()
        if self._remote is not None:
            self._remote.start(checkpoint.path if checkpoint else None)
        return checkpoint

    def restore(self, run: Run, found: Checkpoint | NxdFolder) -> None:
        """Put into a run what `find` found. Raises UserError if it cannot be loaded here."""
        if not isinstance(found, NxdFolder):
            state.restore(run, found)
            return
        if run.backend.name != "nxd":
            what = f"the newest state, of step {found.step}, is in NxD's files, which need backend nxd"
            fix = f"run: hlat convert from-nxd {found.path} {self.nxd_folder.parent}"
            raise UserError(what, where=str(found.path), fix=fix)
        from hlat.train import nxd_checkpoint

        nxd_checkpoint.restore(run, self.nxd_folder, found.path.name)

    def save(
        self,
        run: Run,
        wait: bool,
        obstacle: Callable[[], OSError | None] = lambda: None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """Save a run's state; a failure is reported, and `retry_due` asks for another attempt.

        Args:
            run: whose state.
            wait: until it is complete on the disk; a failed attempt is repeated for `checkpoint.patience`.
            obstacle: what forbids a save on the first rank: rows of steps it covers that are not written.
            beat: called before each attempt.

        Raises:
            SaveFailed: with `wait`, when it did not succeed in that time.
        """
        self._settle()
        start, pause = time.monotonic(), 1.0
        while True:
            beat()
            self._attempt(run, wait, obstacle())
            if self._failed is None or not wait:
                return
            seconds = time.monotonic() - start
            answers = self._exchange((seconds + pause > self.section.patience, seconds, self._failed.what))
            if any(over for over, _, _ in answers):
                _, seconds, what = answers[0]  # the same words on all ranks are printed once
                what = f"after {seconds:.0f} s of trying: {what}"
                fix = f"{self._failed.fix}, then start again"
                raise SaveFailed(what, where=self._failed.where, fix=fix) from self._failed
            self.journal.report()
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def completed(self, step: int) -> int | None:
        """Step of a save that has become complete, as far as this rank knows after `step`; told once."""
        self.journal.report()
        if self._saving is None or self.store.busy or self.store.failure is not None:
            return None
        done, self._saving = self._saving, None
        self._send(done)
        return done

    def retry_due(self) -> bool:
        """Whether the last save failed and is to be tried again now; the same on every rank. Call it once
        after each step.
        """
        if self._countdown is None:
            return False
        self._countdown -= 1
        if self._countdown:
            return False
        self._countdown = RETRY_STEPS
        states = self._exchange("busy" if self.store.busy else "failed" if self._has_failed() else "saved")
        if "busy" not in states and "failed" not in states:
            self._countdown = None
        return "busy" not in states and "failed" in states

    def wait(self) -> bool:
        """Wait until nothing is being written. Returns whether the last save is complete."""
        self._settle()
        self.journal.report()
        return self._failed is None

    def finish(self, stopped: bool, beat: Callable[[], None] = lambda: None) -> None:
        """At the end of the run, when the last save is complete: wait for its upload, for a bounded time (see
        `RemoteSaves.finish`). Raises SaveFailed on the first rank.
        """
        if self._remote is not None:
            self._remote.finish(stopped, beat)
        self.journal.report()

    def _send(self, step: int) -> None:
        """Let a complete checkpoint be uploaded, once."""
        if self._remote is not None and self._sent != step:
            self._sent = step
            self._remote.submit(step)

    def _has_failed(self) -> bool:
        return self._failed is not None or self.store.failure is not None

    def _attempt(self, run: Run, wait: bool, obstacle: OSError | None) -> None:
        details = state.meta(run)
        self._step, self._saving, self._sent = run.step, run.step, None
        self._failed, self._countdown, self._open_since = None, RETRY_STEPS, time.monotonic()
        try:
            self.store.save(
                run.step,
                state.tensors(run),
                details,
                details["tokens"],
                tokenizer=self.tokenizer,
                wait=wait,
                obstacle=obstacle,
            )
        except SaveFailed as failure:
            self._note(failure)
        else:
            if wait or not self.section.async_:
                self._note(None)

    def _settle(self) -> None:
        """Wait for a save in the background, and take note of how it ended."""
        try:
            self.store.wait()
        except SaveFailed as failure:
            self._note(failure)
        else:
            self._note(None)

    def _note(self, failure: SaveFailed | None) -> None:
        """Take note of how the last save ended, once."""
        began, self._open_since = self._open_since, None
        if began is None:
            return
        seconds = time.monotonic() - began
        if failure is None:
            self.journal.done("save", self._step, seconds=seconds, size=0, row=False)
            self._send(self._step)
            return
        self._failed, self._saving = failure, None
        if self.store.first:
            kind = str(getattr(failure.__cause__, "errno", ""))
            line = f"{failure.line()}; it will be tried again"
            self.journal.failed("save", self._step, line, kind=kind or "?", seconds=seconds)


class NxdSaves(Saves):
    """The same in NxD's files, which every rank writes as they lie in memory; a save that waits (the last
    step's) is one of HLAT's, which loads anywhere.

    NxD marks a save in the background as complete at a later call only: `complete` makes one.
    """

    _open: int | None = None  # step of a save that is not marked complete yet

    def save(
        self,
        run: Run,
        wait: bool,
        obstacle: Callable[[], OSError | None] = lambda: None,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """See `Saves`. A rank cannot tell whether NxD failed on another one: a failure ends the run."""
        from hlat.train import nxd_checkpoint

        self._finish()
        if wait:
            super().save(run, wait, obstacle, beat)
            return
        self._confirm()
        if (problem := obstacle()) is not None:
            raise SaveFailed(str(problem), where=str(self.nxd_folder), fix="make room, then start again")
        nxd_checkpoint.save(
            run,
            self.nxd_folder,
            keep=self.section.keep,
            background=self.section.async_,
            tokenizer=self.tokenizer,
        )
        self._saving = run.step
        self._open = run.step if self.section.async_ else None

    def completed(self, step: int) -> int | None:
        """See `Saves`."""
        if self._open is not None and step >= self._open + SETTLE:
            self._finish()
        return super().completed(step) if self._open is None else None

    def wait(self) -> bool:
        """See `Saves`."""
        self._finish()
        return super().wait()

    def _finish(self) -> None:
        if self._open is not None:
            from hlat.backend.nxd import files

            self._open = None
            self._confirm()
            files.finish(self.nxd_folder)

    def _confirm(self) -> None:
        """Raise on every rank alike what the claim raises on the first: a rank alone would be waited for."""
        words: tuple[type[UserError], str, str, str] | None = None
        try:
            self._claim.check_place()
            self._claim.confirm()
        except FolderLost as lost:
            words = FolderLost, lost.what, lost.where, lost.fix
        except OSError as error:
            words = SaveFailed, str(error), str(self.nxd_folder), "start again when the folder can be read"
        if (words := self._exchange(words)[0]) is not None:
            kind, what, where, fix = words
            raise kind(what, where=where, fix=fix)


def kind_of_saves(recipe: Recipe) -> type[Saves]:
    """As the recipe says."""
    return NxdSaves if recipe.checkpoint.format == "nxd" else Saves
