"""The set-up script: which torch it takes, and that an installed one is kept. Fake packages, no network."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "launch" / "setup_env.py"
spec = importlib.util.spec_from_file_location("setup_env", SCRIPT)
assert spec is not None and spec.loader is not None
setup_env = importlib.util.module_from_spec(spec)
sys.modules["setup_env"] = setup_env  # dataclasses look their module up
spec.loader.exec_module(setup_env)

TESTED = setup_env.TESTED_TORCH
SUPPORTED = setup_env.Range((2, 9), (2, 14))


def fake_torch(site: Path, version: str) -> None:
    """A package `torch` of that version which pip and Python take for installed."""
    shutil.rmtree(site / "torch", ignore_errors=True)
    for old in site.glob("torch-*.dist-info"):
        shutil.rmtree(old)
    (site / "torch").mkdir(parents=True)
    (site / "torch" / "__init__.py").write_text(f"__version__ = {version!r}\n")
    info = site / f"torch-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")


# Runs the real script in a given Python with pip replaced: an install of torch writes a fake torch instead.
DRIVER = f"""
import json, os, shutil, sys
from pathlib import Path
sys.path.insert(0, os.path.join(os.environ["CHECKOUT"], "launch"))
import setup_env

{inspect.getsource(fake_torch)}

def call(command):
    with open(os.environ["LOG"], "a") as log:
        log.write(json.dumps(command) + "\\n")
    torch = [word for word in command if word.startswith("torch==")]
    if command[1:3] == ["-m", "venv"]:
        setup_env.subprocess.run([*command, "--without-pip"], check=True)
    elif torch:
        fake_torch(setup_env.Environment(setup_env.ROOT).site_packages(), torch[0].split("==")[1])

setup_env.call = call
sys.argv = ["setup_env.py", *sys.argv[1:]]
sys.exit(setup_env.main())
"""


class Checkout:
    """A copy of what the set-up needs, in a folder with a space in its name, and the commands it ran."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "check out"
        (self.root / "launch").mkdir(parents=True)
        shutil.copy(SCRIPT, self.root / "launch")
        shutil.copy(ROOT / "pyproject.toml", self.root)
        self.log = folder / "commands"
        self.venv = self.root / ".venv"

    def set_up(
        self, python: Path | str, *arguments: str, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        self.log.write_text("")
        names = {"CHECKOUT": str(self.root), "LOG": str(self.log)}
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))
        }
        return subprocess.run(
            [str(python), "-c", DRIVER, *arguments],
            capture_output=True,
            text=True,
            env={**kept, **names, **environment},
        )

    def commands(self) -> list[list[str]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def installs(self) -> list[str]:
        """What pip was asked for, in order: 'torch==X' or the editable target."""
        return [command[-1] for command in self.commands() if "install" in command]

    def torch(self) -> str:
        probe = "import torch; print(torch.__version__, torch.__file__)"
        python = self.venv / "bin" / "python"
        return subprocess.run(
            [str(python), "-c", probe], capture_output=True, text=True, cwd=self.venv
        ).stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


@pytest.fixture
def parent(tmp_path: Path) -> Path:
    """The Python of a virtual environment of the user's, without any package."""
    subprocess.run([base_python(), "-m", "venv", "--without-pip", str(tmp_path / "parent")], check=True)
    return tmp_path / "parent" / "bin" / "python"


def base_python() -> str:
    return (
        getattr(sys, "_base_executable", sys.executable) if sys.prefix != sys.base_prefix else sys.executable
    )


def site_of(python: Path) -> Path:
    return next(iter((python.parent.parent / "lib").glob("python3.*"))) / "site-packages"


@pytest.mark.parametrize(
    ("version", "inside"),
    [
        ("2.8.9", False),
        ("2.9.0a0+50eac81.nv25.09", False),
        ("2.9", True),
        ("2.9.1+cu128", True),
        ("2.10.0a0+git", True),
        ("2.13.0+cpu", True),
        ("2.14.0.dev20261101", False),
        ("2.14", False),
        ("3.0", False),
    ],
)
def test_range(version: str, inside: bool) -> None:
    assert (version in SUPPORTED) is inside


@pytest.mark.parametrize(
    ("requested", "own", "own_is_default", "parent", "expected"),
    [
        ("", None, False, None, ("install", TESTED)),
        ("", None, False, "2.9.1", ("parent", "2.9.1")),
        ("", None, False, "2.8.0", ("install", TESTED)),
        ("", "2.10.0+cu128", False, "2.9.1", ("own", "2.10.0+cu128")),
        ("", f"{TESTED}+cpu", True, None, ("own", f"{TESTED}+cpu")),
        ("", "2.12.0+cpu", True, None, ("install", TESTED)),
        ("", "2.8.0", False, None, ("install", TESTED)),
        ("2.11.0", None, False, "2.9.1", ("install", "2.11.0")),
        ("2.11.0", "2.11.0+cpu", False, None, ("own", "2.11.0+cpu")),
    ],
)
def test_choice_of_torch(
    requested: str, own: str, own_is_default: bool, parent: str, expected: tuple
) -> None:
    plan = setup_env.choose_torch(requested, own, own_is_default, parent, SUPPORTED)
    assert (plan.source, plan.version) == expected


@pytest.mark.parametrize("requested", ["2.8.0", "2.14", "newest"])
def test_unsupported_request_is_refused(requested: str) -> None:
    with pytest.raises(setup_env.SetupError, match=requested):
        setup_env.choose_torch(requested, None, False, None, SUPPORTED)


def test_range_comes_from_pyproject() -> None:
    supported = setup_env.torch_range(ROOT / "pyproject.toml")
    assert TESTED in supported and str(supported) == "2.9 up to, not including, 2.14"


def test_torch_of_a_venv_is_kept(checkout: Checkout, parent: Path) -> None:
    fake_torch(site_of(parent), "2.9.1+neuron")
    done = checkout.set_up(parent, "--extras", "dev,hf")
    assert done.returncode == 0, done.stderr
    assert "torch 2.9.1+neuron: kept" in done.stdout
    assert checkout.installs() == [f"{checkout.root}[dev,hf]"]
    assert (checkout.venv / "constraints.txt").read_text() == "torch==2.9.1+neuron\n"
    assert checkout.torch().split(maxsplit=1)[1].startswith(str(site_of(parent)))


def test_torch_of_a_base_python_is_kept(checkout: Checkout, tmp_path: Path) -> None:
    python = base_python()
    tag = "python{}.{}".format(*sys.version_info)
    site = tmp_path / "user" / "lib" / tag / "site-packages"
    fake_torch(site, "2.10.0")
    done = checkout.set_up(python, PYTHONUSERBASE=str(tmp_path / "user"))
    assert done.returncode == 0, done.stderr
    assert checkout.installs() == [str(checkout.root)]
    assert "include-system-site-packages = true" in (checkout.venv / "pyvenv.cfg").read_text()


@pytest.mark.parametrize("version", [None, "2.8.0", "2.14.1"])
def test_tested_torch_is_installed_otherwise(checkout: Checkout, parent: Path, version: str | None) -> None:
    if version:
        fake_torch(site_of(parent), version)
    done = checkout.set_up(parent)
    assert done.returncode == 0, done.stderr
    assert ("is not supported" in done.stdout) is (version is not None)
    assert checkout.installs() == [f"torch=={TESTED}", str(checkout.root)]
    assert checkout.torch().split(maxsplit=1)[1].startswith(str(checkout.venv))


def test_nothing_happens_the_second_time(checkout: Checkout, parent: Path) -> None:
    checkout.set_up(parent, "--extras", "hf")
    assert len(checkout.installs()) == 2
    checkout.set_up(parent)
    assert checkout.commands() == []
    checkout.set_up(checkout.venv / "bin" / "python", "--extras", "hf")  # .venv itself is activated
    assert checkout.commands() == []
    checkout.set_up(parent, "--extras", "dev")
    assert checkout.installs() == [f"{checkout.root}[dev,hf]"]
    with open(checkout.root / "pyproject.toml", "a") as file:
        file.write("# another release\n")
    checkout.set_up(parent)
    assert checkout.installs() == [f"{checkout.root}[dev,hf]"]


def test_explicit_torch_stays(checkout: Checkout, parent: Path) -> None:
    fake_torch(site_of(parent), "2.9.1")
    checkout.set_up(parent, "--torch", "2.11.0")
    assert checkout.installs() == ["torch==2.11.0", str(checkout.root)]
    checkout.set_up(parent)
    assert checkout.installs() == []
    assert checkout.torch().startswith("2.11.0")


def test_environment_for_another_python_is_made_anew(checkout: Checkout, parent: Path) -> None:
    checkout.set_up(parent)
    (checkout.venv / "left-over").touch()
    other = parent.parent.parent.parent / "other"
    subprocess.run([base_python(), "-m", "venv", "--without-pip", str(other)], check=True)
    done = checkout.set_up(other / "bin" / "python")
    assert "making it anew" in done.stdout
    assert not (checkout.venv / "left-over").exists()


def test_environment_made_by_hand_is_never_removed(checkout: Checkout, parent: Path) -> None:
    subprocess.run([base_python(), "-m", "venv", "--without-pip", str(checkout.venv)], check=True)
    fake_torch(site_of(checkout.venv / "bin" / "python"), "2.12.0")
    (checkout.venv / "mine").touch()
    done = checkout.set_up(parent)
    assert done.returncode == 0, done.stderr
    assert checkout.installs() == [str(checkout.root)]
    assert (checkout.venv / "mine").exists() and checkout.torch().startswith("2.12.0")


def test_interrupted_set_up_is_repeated(checkout: Checkout, parent: Path) -> None:
    checkout.venv.mkdir()
    (checkout.venv / setup_env.STATE).write_text(json.dumps({"parent": {"python": str(parent)}}))
    done = checkout.set_up(parent)
    assert done.returncode == 0, done.stderr
    assert checkout.torch().startswith(TESTED)


def test_broken_environment_is_one_line(checkout: Checkout, parent: Path) -> None:
    (checkout.venv / "bin").mkdir(parents=True)
    done = checkout.set_up(parent)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "make clean" in done.stderr


def test_missing_ensurepip_is_one_line(checkout: Checkout, parent: Path) -> None:
    hide = "import importlib.util as u; real = u.find_spec\n"
    hide += "u.find_spec = lambda name, *rest: None if name == 'ensurepip' else real(name, *rest)\n"
    names = {"CHECKOUT": str(checkout.root), "LOG": str(checkout.log)}
    done = subprocess.run(
        [str(parent), "-c", hide + DRIVER], capture_output=True, text=True, env={**os.environ, **names}
    )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1 and "apt install python3" in done.stderr
    assert not checkout.venv.exists()


def test_old_python_is_one_line() -> None:
    ast.parse(SCRIPT.read_text(), feature_version=(3, 6))  # else an old Python shows a SyntaxError
    pretend = f"import sys, runpy; sys.version_info = (3, 9, 18); runpy.run_path({str(SCRIPT)!r})"
    done = subprocess.run([sys.executable, "-c", pretend], capture_output=True, text=True)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "needs Python 3.11" in done.stderr and "is 3.9" in done.stderr and "PYTHON=" in done.stderr


def test_compiler_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    note = setup_env.compiler_note()
    assert note is not None and "no C++ compiler" in note and "\n" not in note
    (tmp_path / "g++").touch(mode=0o755)
    include = tmp_path / "include"
    include.mkdir()
    (include / "Python.h").touch()
    monkeypatch.setattr(setup_env.sysconfig, "get_path", lambda name: str(include))
    assert setup_env.compiler_note() is None
