"""Files that a command writes at its end: whether it can, asked before the work begins."""

from __future__ import annotations

import os
from pathlib import Path

from hlat.paths import file_to_write


def check_output(path: str | Path | None, option: str) -> None:
    """Raise UserError where a file cannot be written: its folder is missing or closed, or it is a folder, a
    pipe or a device.

    None is fine, and so is everything on ranks but the first, which write nothing.
    """
    if path is None or os.environ.get("RANK", "0") != "0":
        return
    file_to_write(path, f"{option} {path}")
