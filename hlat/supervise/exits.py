"""Exit codes of `hlat supervise`, and which one says why a job of several machines ended.

All machines end with the same code as a rule. They do not where a supervisor was killed or could not start.
"""

from __future__ import annotations

from collections.abc import Iterable

from hlat.errors import FolderLost, TrainingStopped, UserError

DONE, FAILED, REQUEUE, BAD_NODE, INTERRUPTED = 0, 1, 75, 76, 130
WRONG, GUARD, LOST = UserError.exit_code, TrainingStopped.exit_code, FolderLost.exit_code
# Before all else what must not start again, as another process trains, or would end the same way; then a
# person who ended it; then a bad machine, after which others may have given up.
ORDER = (LOST, WRONG, GUARD, INTERRUPTED, BAD_NODE, FAILED)
_KILLED = 128  # and more: by a signal that the supervisor does not handle


def decisive(codes: Iterable[int]) -> int:
    """The code of a job whose machines have ended with these. After those of `ORDER` any other below 128,
    with which a shell says that it could not start a supervisor there; then `REQUEUE`; then the highest.
    """
    found = set(codes)
    named = next((code for code in ORDER if code in found), None)
    if named is not None:
        return named
    if strange := [code for code in found if 0 < code < _KILLED and code != REQUEUE]:
        return max(strange)
    return REQUEUE if REQUEUE in found else max(found, default=DONE)


def starts_again(code: int) -> bool:
    """Whether a job that ended so is to be queued again."""
    return code in (REQUEUE, BAD_NODE) or (code >= _KILLED and code != INTERRUPTED)
