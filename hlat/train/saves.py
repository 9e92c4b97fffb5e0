"""Where a run's state is kept: in HLAT's checkpoints, or (`checkpoint.format: nxd`) in NxD's own files while
it trains.

What a run continues from is the newer of the two, whichever of them it writes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hlat.checkpoint.nxd import NxdFolder, newest_nxd
from hlat.checkpoint.store import CheckpointStore
from hlat.errors import UserError
from hlat.train import state

if TYPE_CHECKING:
    from hlat.checkpoint.reader import Checkpoint
    from hlat.recipe import Recipe
    from hlat.train.run import Run

SETTLE = 10  # steps after which a save in NxD's background must be complete


class Saves:
    """A run's checkpoints in HLAT's format. Every method is collective.

    Args:
        folder: the checkpoints folder.
        nxd_folder: where NxD's files are, if there are any.
        recipe: how often, how many.
        warn: receives a line about each checkpoint that cannot be used.
        tokenizer: its files, kept with each checkpoint.
    """

    def __init__(
        self,
        folder: Path,
        nxd_folder: Path,
        recipe: Recipe,
        warn: Callable[[str], None],
        tokenizer: Sequence[Path] = (),
    ) -> None:
        self.section = section = recipe.checkpoint
        self.nxd_folder, self.tokenizer = nxd_folder, list(tokenizer)
        self.store = CheckpointStore(
            folder,
            keep=section.keep,
            permanent_every_tokens=section.permanent_every_tokens,
            async_=section.async_,
            warn=warn,
        )

    def find(self, before: int | None = None) -> Checkpoint | NxdFolder | None:
        """The newest state there is, of a step below `before` if that is given; None where there is none."""
        checkpoint, files = self.store.newest(before=before), newest_nxd(self.nxd_folder)
        if files is not None and before is not None and files.step >= before:
            files = None
        if files is not None and (checkpoint is None or files.step > checkpoint.step):
            return files
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

    def save(self, run: Run, wait: bool) -> None:
        """Save a run's state; `wait` until it is complete on the disk. Raises UserError if that failed."""
        details = state.meta(run)
        self.store.save(
            run.step, state.tensors(run), details, details["tokens"], tokenizer=self.tokenizer, wait=wait
        )

    def complete(self, step: int) -> bool:
        """Whether everything saved so far is complete on the disk, as far as this rank knows after `step`."""
        return not self.store.busy

    def wait(self) -> None:
        """Wait until everything is complete. Raises what `save` raises."""
        self.store.wait()


class NxdSaves(Saves):
    """The same in NxD's files, which every rank writes as they lie in memory; a save that waits (the last
    step's) is one of HLAT's, which loads anywhere.

    NxD marks a save in the background as complete at a later call only: `complete` makes one.
    """

    _open: int | None = None  # step of a save that is not marked complete yet

    def save(self, run: Run, wait: bool) -> None:
        """See `Saves`."""
        from hlat.train import nxd_checkpoint

        self._finish()
        if wait:
            super().save(run, wait)
            return
        nxd_checkpoint.save(
            run,
            self.nxd_folder,
            keep=self.section.keep,
            background=self.section.async_,
            tokenizer=self.tokenizer,
        )
        self._open = run.step if self.section.async_ else None

    def complete(self, step: int) -> bool:
        """See `Saves`."""
        if self._open is not None and step >= self._open + SETTLE:
            self._finish()
        return self._open is None

    def wait(self) -> None:
        """See `Saves`."""
        self._finish()
        super().wait()

    def _finish(self) -> None:
        if self._open is not None:
            from hlat.backend.nxd import files

            self._open = None
            files.finish(self.nxd_folder)


def kind_of_saves(recipe: Recipe) -> type[Saves]:
    """As the recipe says."""
    return NxdSaves if recipe.checkpoint.format == "nxd" else Saves
