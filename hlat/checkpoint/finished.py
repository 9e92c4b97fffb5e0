"""Is a run done? Asked from outside, when its processes have ended well."""

from __future__ import annotations

from hlat.checkpoint.folder import Broken, check_sizes, read_marker, step_folders
from hlat.observe.runfolder import RunFolder


def lacking(run: RunFolder, last: int) -> str:
    """What a run lacks to be done; empty when it is: a complete checkpoint of its last step, or of a later
    one, is there, in HLAT's files or in NxD's. Their bytes are not read, which the next start does.

    Args:
        run: the run folder.
        last: the step it was to reach, `run.stop_at_step` or `run.steps`.
    """
    try:
        steps = [step for step in (_newest(run), _newest_nxd(run)) if step is not None]
    except OSError as error:
        return f"its checkpoints cannot be read: {error.strerror}"
    if not steps:
        return f"there is no complete checkpoint; the last step is {last:,}"
    newest = max(steps)
    return "" if newest >= last else f"the newest complete checkpoint is of step {newest:,} of {last:,}"


def _newest(run: RunFolder) -> int | None:
    for step, folder in sorted(step_folders(run.checkpoints).items(), reverse=True):
        try:
            check_sizes(folder, read_marker(folder))
            return step
        except Broken:
            continue
    return None


def _newest_nxd(run: RunFolder) -> int | None:
    names = [done.parent.name.removeprefix("step-") for done in run.nxd_checkpoints.glob("step-*/done")]
    return max((int(name) for name in names if name.isdecimal()), default=None)
