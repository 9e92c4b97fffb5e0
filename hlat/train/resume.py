"""Whether a start may go on in a run folder, and what becomes of the rows that lie there."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hlat.checkpoint.nxd import newest_nxd, unfinished_nxd
from hlat.checkpoint.peers import Peers
from hlat.checkpoint.reader import lost, newest_in
from hlat.errors import SaveFailed, UserError
from hlat.observe.aside import put_aside
from hlat.observe.jsonl import START, Row, cut, read_rows
from hlat.storage.fingerprint import FILE as FINGERPRINT
from hlat.train import remote as store
from hlat.train import state

if TYPE_CHECKING:
    from hlat.observe.runfolder import RunFolder
    from hlat.recipe import Recipe


def check_resume(recipe: Recipe, data: str, folder: RunFolder, warn: Callable[[str], None]) -> None:
    """Refuse, before anything is written, to continue a run that this recipe does not continue, and to start
    over where a run has saved checkpoints.

    Args:
        recipe, data: of the start; fingerprint of its data.
        folder: the run folder; it may be missing.
        warn: told when the store has to be asked again.

    Raises UserError; SaveFailed when the store does not answer.
    """
    stored = store.Stored(None, {})
    if recipe.checkpoint.remote is not None:
        stored = store.look(recipe, folder.checkpoints, warn)
    if recipe.run.resume == "never":
        _refuse_checkpoints(recipe, folder, stored)
        return
    if stored.meta is not None:
        state.check_same_run(recipe, data, stored.meta, str(recipe.checkpoint.remote))
    newest, skipped = newest_in(folder.checkpoints, False, Peers())
    files = newest_nxd(folder.nxd_checkpoints)
    for found in (newest, files):
        if found is not None:
            state.check_same_run(recipe, data, found.meta, str(folder.path))
    if newest is not None or files is not None or stored.meta is not None:
        return
    unfinished = unfinished_nxd(folder.nxd_checkpoints)
    error = lost(folder.checkpoints, skipped, folder.nxd_checkpoints, unfinished)
    error = error or store.lost(f"{recipe.checkpoint.remote}/{recipe.run.name}", stored.damaged)
    if error is not None:
        raise error


def _refuse_checkpoints(recipe: Recipe, folder: RunFolder, stored: store.Stored) -> None:
    saved = (folder.checkpoints, folder.nxd_checkpoints)
    if any(kept.is_dir() and any(kept.iterdir()) for kept in saved):
        raise UserError(
            "the run folder holds checkpoints and run.resume is never",
            where=str(folder.path),
            fix="choose another run.dir, or run.resume=auto to continue",
        )
    if stored.meta is not None or stored.damaged:
        what = "checkpoint.remote holds checkpoints of this run and run.resume is never"
        fix = "choose another run.name, or run.resume=auto to continue"
        raise UserError(what, where=str(recipe.checkpoint.remote), fix=fix)


def settle_rows(folder: RunFolder, step: int, warn: Callable[[str], None]) -> None:
    """Before a run goes on from `step`: rows of one that started over are put aside, under a number. Tells
    `warn` that, and which rows are missing. For the first rank, which holds the folder.

    Raises SaveFailed where they cannot be moved.
    """
    folder.claim.check_place()
    last = _last_step(folder)
    if step:
        if (last or 0) < step:
            found = "no rows" if last is None else f"rows up to step {last:,}"
            warn(
                f"{folder.metrics} has {found}: those up to step {step:,}, where the run goes on, are missing"
            )
        cut(folder.metrics, _of_a_stop, folder.claim.confirm)
        return
    if last is None:
        return
    folder.claim.confirm()
    try:
        files = put_aside([folder.metrics, folder.path / FINGERPRINT], folder.logs)
    except OSError as error:
        what = f"its rows could not be put aside ({error.strerror})"
        raise SaveFailed(what, where=str(folder.metrics), fix="make room there") from error
    warn(
        f"there are rows up to step {last:,} and no checkpoint: the run starts over at step 0, and the rows "
        f"are kept in {files[0]}"
    )


def _of_a_stop(row: Row) -> bool:
    """Whether a row is there because the run was stopped: one that goes on has the rows of one that was
    not.
    """
    return row.get("kind") == "eval" and row.get("stop") is True


def _last_step(folder: RunFolder) -> int | None:
    """The last step that a row is about; None without any."""
    try:
        rows = [row for row in read_rows(folder.metrics) if row.get("kind") != START]
    except OSError:
        return None
    steps = [row["step"] for row in rows if isinstance(row.get("step"), int)]
    return max(steps, default=0) if rows else None
