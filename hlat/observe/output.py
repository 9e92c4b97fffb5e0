"""Files that a command writes at its end: whether it can, asked before the work begins."""

from __future__ import annotations

import os
from pathlib import Path

from hlat.errors import UserError


def check_output(path: str | Path | None, option: str) -> None:
    """Raise UserError where a file cannot be written: its folder is missing or closed, or it is a folder.

    None is fine, and so is everything on ranks but the first, which write nothing.
    """
    if path is None or os.environ.get("RANK", "0") != "0":
        return
    file = Path(path).expanduser()
    where = f"{option} {path}"
    if file.is_dir():
        raise UserError("is a folder", where=where, fix="give the name of a file in it")
    if not file.absolute().parent.is_dir():
        raise UserError(f"there is no folder {file.parent}", where=where, fix="create it, or write elsewhere")
    if not os.access(file.absolute().parent, os.W_OK | os.X_OK):
        raise UserError(
            f"no permission to write in {file.absolute().parent}", where=where, fix="write elsewhere"
        )
