"""What every fuzzed reader has: good files, damage to them, and what reading them right gives."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mutations import Files

os.environ.setdefault("HF_HUB_OFFLINE", "1")

TEXTS = [
    "def read_json(path):\n    return json.load(open(path))\n",
    "  two spaces, Ünïcode 名前, \N{GRINNING FACE}\n\n",
    "</s><|endoftext|><s>",
    "",
    "\n",
    "a" * 300,
]


def content_of(folder: Path) -> Files:
    """A folder's files as bytes, by their names in it."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Target:
    """One reader."""

    def draw(self, draw: Callable[..., Any]) -> Files:
        """Damaged files."""
        raise NotImplementedError

    def read(self, folder: Path) -> None:
        """Read the folder. Raises UserError, or AssertionError for a wrong answer."""
        raise NotImplementedError

    @staticmethod
    def scratch() -> Path:
        """A folder for good files."""
        return Path(tempfile.mkdtemp(prefix="hlat-fuzz-seed-"))
