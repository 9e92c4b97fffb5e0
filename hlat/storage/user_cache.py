"""Where HLAT keeps what it can make again."""

from __future__ import annotations

import os
from pathlib import Path

from hlat.paths import expand


def cache_root() -> Path:
    """The user's cache folder, `$XDG_CACHE_HOME/hlat`, by default `~/.cache/hlat` (not created)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else expand("~/.cache", "XDG_CACHE_HOME")) / "hlat"
