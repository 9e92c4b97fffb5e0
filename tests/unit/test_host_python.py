"""Children import the installed hlat, and nothing from the folder they are started in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest

import hlat
from hlat.backend.nxd import precompile
from hlat.data import pool
from hlat.host import python
from hlat.host.python import environment, module, torchrun_module
from hlat.recipe import load
from hlat.supervise import attempt, child
from hlat.supervise.watch import Limits

ROOT = str(Path(hlat.__file__).resolve().parents[1])
SAYS = "import json, os, random, sys; print(json.dumps([random.__file__, sys.flags.safe_path, sys.argv[1:]]))"


def test_neither_a_module_nor_its_imports_come_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, here = tmp_path / "mine", tmp_path / "here"
    for folder in (mine, here):
        folder.mkdir()
        (folder / "random.py").write_text("")
    (mine / "says.py").write_text(SAYS)
    (here / "says.py").write_text("raise SystemExit('from the working directory')")
    environ = {**os.environ, "PYTHONPATH": str(mine)}
    for command in (module("says", "a b"), torchrun_module(["says", "a b"])[1:]):
        done = subprocess.run(command, cwd=here, env=environ, capture_output=True, text=True, check=True)
        assert json.loads(done.stdout) == [str(mine / "random.py"), True, ["a b"]], "PYTHONPATH counts"
    monkeypatch.setenv("PYTHON_EXEC", "/other/python")
    assert torchrun_module(["says"])[:2] == ["--no-python", "/other/python"]


@pytest.mark.parametrize(
    ("given", "path", "expected"),
    [
        ("", ["/usr/bin"], None),  # the command `hlat` of an installed package, an editable one too
        ("", [ROOT], ROOT),  # python -m hlat in a clone, or a script that added it
        ("", [""], None),
        ("/a:/b", [ROOT], f"{ROOT}:/a:/b"),
        (f"/a:{ROOT}", [ROOT, "/a"], f"/a:{ROOT}"),
    ],
)
def test_a_child_finds_the_hlat_that_started_it(
    given: str, path: list[str], expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(python, "installed", lambda: False)
    monkeypatch.chdir(tmp_path)
    environ = {"PYTHONPATH": given} if given else {}
    assert environment(environ, path).get("PYTHONPATH") == expected
    monkeypatch.chdir(ROOT)
    assert environment({}, [""])["PYTHONPATH"] == ROOT
    monkeypatch.setattr(python, "installed", lambda: True)
    assert "PYTHONPATH" not in environment({}, [""])


def test_whether_this_very_hlat_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", [PathFinder])
    monkeypatch.setattr(python.site, "getusersitepackages", lambda: str(tmp_path))
    for places, expected in (([ROOT], True), ([str(tmp_path)], False)):
        monkeypatch.setattr(python.site, "getsitepackages", lambda: places)  # noqa: B023
        assert python.installed() is expected
    (tmp_path / "hlat.py").write_text("")  # another one
    assert not python.installed()


def test_every_child_is_started_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Supervisor's agent and its ranks, runs of a sweep, tokenizing processes, compiling ahead."""
    seen: list[list[str]] = []

    def popen(command: list[str], **values: Any) -> None:
        seen.append(command)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", popen)
    words = ["hlat", "train", "tiny"]
    starts = (
        lambda: attempt.Attempt(attempt.Place(), words, tmp_path, limits=Limits(), grace=1.0),
        lambda: child.Children().run(words, tmp_path / "log"),
        lambda: pool._start(tmp_path, 0),
    )
    for start in starts:
        with pytest.raises(KeyboardInterrupt):
            start()  # type: ignore[no-untyped-call]
    tool = tmp_path / "neuron_parallel_compile"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    environ = {"PATH": str(tmp_path)}
    seen.append(precompile.commands("tiny", [], load("tiny"), "/tmp/x", environ)[0][1:])
    assert len(seen) == 4
    for command in seen:
        assert command[:3] == [sys.executable, "-P", "-m"]
    for command in (seen[0], seen[3]):
        at = command.index("--no-python")
        assert command[at + 1 : at + 7] == [sys.executable, "-P", "-u", "-m", "hlat", "train"]
    assert python.module("x", python="/p") == ["/p", "-P", "-m", "x"]


def test_no_other_place_starts_a_module() -> None:
    files = {path for path in Path(hlat.__file__).parent.rglob("*.py") if '"-m"' in path.read_text()}
    assert files == {Path(python.__file__)}
