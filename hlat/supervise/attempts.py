"""Numbers of attempts. They go on over all jobs of a run, so that a job that starts again, or a second
supervisor that was started by mistake, keeps what the ranks of another attempt have said.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from hlat.observe.jsonl import read_rows
from hlat.supervise.events import FILE

_NAME = re.compile(r"attempt-(\d+)")


def folder_of(logs: Path, number: int) -> Path:
    """Where the output of an attempt goes."""
    return logs / f"attempt-{number}"


def claim(logs: Path, after: int = 0) -> int:
    """The number of a new attempt, above those of all folders and events there are. Its folder is made here:
    whoever makes it has the number. Where the disk does not allow it the number is a guess.

    Args:
        logs: logs/supervisor of the run.
        after: a number that this process has used.
    """
    number = 1 + max([after, *_known(logs)])
    with contextlib.suppress(OSError):
        logs.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            folder_of(logs, number).mkdir()
            return number
        except FileExistsError:
            number += 1
        except OSError:
            return number


def _known(logs: Path) -> set[int]:
    found = set()
    with contextlib.suppress(OSError):
        found |= {int(match[1]) for path in logs.iterdir() if (match := _NAME.fullmatch(path.name))}
    with contextlib.suppress(OSError):  # a folder may have been deleted
        numbers = (row.get("attempt") for row in read_rows(logs / FILE))
        found |= {number for number in numbers if type(number) is int}
    return found
