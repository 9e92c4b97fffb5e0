"""Files that make way for new ones and are kept: under a number that nothing has yet."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from hlat.observe import durable


def put_aside(files: Sequence[Path], folder: Path) -> list[Path]:
    """Move files of one folder into another one, as `<name>-aside-<number><suffix>`. The number is the same
    for all of them, the lowest that no file there has. Returns their new paths; those that are missing or
    empty are left out. Raises OSError.
    """
    found = [file for file in files if file.is_file() and file.stat().st_size]
    if not found:
        return []
    folder.mkdir(exist_ok=True)
    for number in count(1):
        names = [folder / f"{file.stem}-aside-{number}{file.suffix}" for file in files]
        if not any(name.exists() or name.is_symlink() for name in names):
            break
    moved = []
    for file, name in zip(files, names, strict=True):
        if file in found:
            shutil.move(file, name)  # `logs` may be a link to another disk
            moved.append(name)
    for place in (folder, files[0].parent):
        durable.sync_folder(place)
    return moved
