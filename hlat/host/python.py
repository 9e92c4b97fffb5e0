"""Starting this Python again, for a module of HLAT.

`python -m` puts the working directory before everything else, so that a folder called hlat there, or a file
with the name of a module of the standard library, would be imported in place of the installed one. The
command `hlat` does not do that, and what it starts must not either: -P. The variable PYTHONSAFEPATH would say
the same, but to every Python below, scripts of compilers among them, which need the folder they lie in.
"""

from __future__ import annotations

import os
import site
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

import hlat

_PATH, _NAME = "PYTHONPATH", "hlat"


def module(name: str, *words: str, python: str = sys.executable) -> list[str]:
    """The command that runs a module: nothing is imported from the working directory."""
    return [python, "-P", "-m", name, *words]


def torchrun_module(command: Sequence[str]) -> list[str]:
    """What follows torchrun's own options for ranks that run a module (its name and arguments): torchrun's
    `-m`, but for the working directory. PYTHON_EXEC names another interpreter, as for torchrun.
    """
    python = os.environ.get("PYTHON_EXEC", sys.executable)
    return ["--no-python", python, "-P", "-u", "-m", *command]


def environment(environ: Mapping[str, str] = os.environ, path: Sequence[str] | None = None) -> dict[str, str]:
    """A child's environment, in which it imports this very hlat: a script may have found it by a path that a
    child would not know, and `python -m hlat` in the folder it lies in.

    path: where this process imports from (default: sys.path).
    """
    root = str(Path(hlat.__file__).resolve().parents[1])
    given = [entry for entry in environ.get(_PATH, "").split(os.pathsep) if entry]
    here = {os.path.realpath(entry) for entry in (sys.path if path is None else path)}
    if root not in here or root in map(os.path.realpath, given) or installed():
        return dict(environ)
    return {**environ, _PATH: os.pathsep.join([root, *given])}


def installed() -> bool:
    """Whether every Python of this environment finds this very hlat: in its packages, or by the finder of an
    editable installation.
    """
    packages = [*site.getsitepackages(), site.getusersitepackages()]
    specs = [PathFinder.find_spec(_NAME, packages)]
    specs += [finder.find_spec(_NAME, None) for finder in sys.meta_path if finder is not PathFinder]
    found = [spec.origin for spec in specs if spec is not None and spec.origin is not None]
    return os.path.realpath(hlat.__file__) in map(os.path.realpath, found)
