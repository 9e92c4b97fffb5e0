"""Which file a command's name stands for, whatever the working directory holds."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping


def find_program(name: str) -> str | None:
    """Absolute path of a program on PATH; None without one. Entries of PATH that are relative (`.`, or
    empty, which means the same) are passed over: they would run what a data folder or repository holds.
    """
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    return shutil.which(name, path=os.pathsep.join(folder for folder in folders if os.path.isabs(folder)))


def cpp_compiler(environ: Mapping[str, str] = os.environ) -> str:
    """The C++ compiler that torch.compile asks for: the one in CXX, else g++ (clang++ on macOS)."""
    return environ.get("CXX", "") or ("clang++" if sys.platform == "darwin" else "g++")
