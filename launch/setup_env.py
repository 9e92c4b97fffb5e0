"""Make or update `.venv`: the only set-up step, called by the Makefile with the Python that HLAT shall use.

    python3 launch/setup_env.py [--extras dev,hf] [--torch 2.13.0]

Standard library only. Nothing happens when nothing changed since the last call. The rule for torch, in order:

1. `--torch X`: exactly X is installed into `.venv`.
2. A torch that someone put into `.venv` by hand, in the supported range, stays.
3. A torch in range that the calling Python already has (the system's, a container's, AWS's on trn1) is used
   from where it is: `.venv` gets to see that Python's packages, and a constraint keeps pip from replacing it.
4. Otherwise the tested release is installed, because an open range would take a newer, untested one.

Up to the version check the syntax must stay readable for Python 3.6: an old Python says its one line too.
"""
# ruff: noqa: E402, UP031

import sys

OLDEST = (3, 11)
if sys.version_info < OLDEST:
    import shutil
    import subprocess

    line = "set-up: HLAT needs Python %d.%d or newer, " % OLDEST
    line += "and %s is %d.%d" % (sys.executable, sys.version_info[0], sys.version_info[1])
    for minor in (13, 12, 11, 14):
        other = shutil.which("python3.%d" % minor)
        if other and not subprocess.call([other, "-c", ""], stderr=subprocess.DEVNULL):
            sys.exit(line + "; say: make train PYTHON=" + other)
    sys.exit(line + "; install a newer one and say: make train PYTHON=/path/to/python3")

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sysconfig
import tomllib
from dataclasses import dataclass
from pathlib import Path

TESTED_TORCH = "2.13.0"
ROOT = Path(__file__).resolve().parents[1]
STATE = "hlat-setup.json"
PARENT_PTH = "hlat_parent_packages.pth"


class SetupError(Exception):
    """What is wrong and what to do, in one line."""


@dataclass(frozen=True)
class Range:
    """The torch releases of pyproject.toml: `low <= version < high`, as tuples of numbers."""

    low: tuple[int, ...]
    high: tuple[int, ...]

    def __contains__(self, version: str) -> bool:
        release, early = parse_version(version)
        return (self.low < release or (self.low == release and not early)) and release < self.high

    def __str__(self) -> str:
        low, high = (".".join(map(str, bound)) for bound in (self.low, self.high))
        return f"{low} up to, not including, {high}"


@dataclass(frozen=True)
class Plan:
    """Where torch comes from: 'install' (into .venv), 'own' (in .venv already) or 'parent' (the caller's)."""

    source: str
    version: str


def parse_version(version: str) -> tuple[tuple[int, ...], bool]:
    """'2.9.0a0+git' -> ((2, 9), True): the release without trailing zeros; is it a pre-release?"""
    match = re.match(r"\d+(\.\d+)*", version)
    if match is None:
        raise SetupError(f"{version!r} is not a version of torch; write for example TORCH={TESTED_TORCH}")
    release = [int(part) for part in match.group().split(".")]
    while release and release[-1] == 0:
        release.pop()
    return tuple(release), bool(re.match(r"[.\-_]?(a|b|c|rc|dev|alpha|beta|pre)", version[match.end() :]))


def public(version: str) -> str:
    """The version without the part after '+', which only says how it was built."""
    return version.split("+")[0]


def torch_range(pyproject: Path) -> Range:
    """The supported range, read from the dependency line `torch>=LOW,<HIGH` of pyproject.toml."""
    dependencies = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    line = next(item for item in dependencies if item.startswith("torch"))
    match = re.fullmatch(r"torch>=([\d.]+),<([\d.]+)", line.replace(" ", ""))
    if match is None:
        raise SetupError(f"{pyproject}: the torch dependency must read 'torch>=LOW,<HIGH', not {line!r}")
    return Range(parse_version(match.group(1))[0], parse_version(match.group(2))[0])


def installed_torch(paths: list[str]) -> str | None:
    """The version of the torch distribution found first on `paths`, without importing it."""
    found = next(iter(importlib.metadata.distributions(name="torch", path=paths)), None)
    return found.version if found else None


def choose_torch(
    requested: str, own: str | None, own_is_default: bool, parent: str | None, supported: Range
) -> Plan:
    """The rule of the module's docstring.

    Args:
        requested: the release the user asked for, or "".
        own: the version inside .venv, if any.
        own_is_default: HLAT itself put it there, as the tested release of that day.
        parent: the version the calling Python has, if any.
        supported: the range of pyproject.toml.
    """
    if requested:
        if requested not in supported:
            raise SetupError(f"torch {requested} is not supported ({supported}); choose another TORCH=")
        return Plan("own", own) if own and public(own) == public(requested) else Plan("install", requested)
    if own:
        current = own in supported and (not own_is_default or public(own) == TESTED_TORCH)
        return Plan("own", own) if current else Plan("install", TESTED_TORCH)
    if parent and parent in supported:
        return Plan("parent", parent)
    if parent:
        print(f"torch {parent} of {sys.prefix} is not supported ({supported}): .venv gets its own")
    return Plan("install", TESTED_TORCH)


class Environment:
    """The virtual environment `.venv` of the checkout at `root`, and what is recorded about it."""

    def __init__(self, root: Path) -> None:
        self.root, self.path = root, root / ".venv"
        self.python = self.path / "bin" / "python"
        file = self.path / STATE
        self.state: dict = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def save(self, **changes: object) -> None:
        """Merge `changes` into the state file; renamed into place, so that it is never half there."""
        self.state.update(changes)
        self.path.mkdir(exist_ok=True)
        part = self.path / (STATE + ".part")
        part.write_text(json.dumps(self.state, indent=1) + "\n", encoding="utf-8")
        part.replace(self.path / STATE)

    def site_packages(self) -> Path | None:
        """Its own site-packages folder, None before it exists."""
        return next(iter(sorted(self.path.glob("lib/python3.*/site-packages"))), None)

    def own_torch(self) -> str | None:
        """The version of torch installed in this environment itself."""
        site = self.site_packages()
        return installed_torch([str(site)]) if site else None

    def made_by_hlat(self) -> bool:
        """False for one that was here before: it is used as it is, and never removed."""
        return "parent" in self.state

    def stale(self, parent: dict) -> bool:
        """Made by HLAT, but for another Python or another place, or its Python is gone."""
        recorded = self.state.get("parent", {})
        same = all(recorded.get(key) == parent[key] for key in ("version", "prefix", "root"))
        return self.made_by_hlat() and not (same and self.python.exists())

    def create(self, parent: dict) -> None:
        """Make it if it is not there, and see that it works."""
        if not self.path.exists():
            if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
                fix = f"Debian/Ubuntu: apt install python{parent['version']}-venv; or choose another PYTHON="
                raise SetupError(f"{sys.executable} cannot make virtual environments; {fix}")
            self.save(parent=parent)
            call([sys.executable, "-m", "venv", str(self.path)])
        self.check()

    def check(self) -> None:
        """It must run, be new enough and hold pip."""
        probe = f"import sys; print(sys.version_info[:2] >= {OLDEST})"
        try:
            answer = subprocess.run(
                [str(self.python), "-c", probe],
                capture_output=True,
                text=True,
                encoding="utf-8",
                errors="replace",
            ).stdout
        except OSError:
            answer = ""
        if answer.strip() != "True":
            state = "has a Python that is too old" if answer else "does not run"
            raise SetupError(f"{self.path} {state}; say 'make clean' (it removes .venv) and try again")
        if subprocess.run([str(self.python), "-m", "pip", "--version"], capture_output=True).returncode:
            call([str(self.python), "-m", "ensurepip", "--upgrade"])

    def show_parent(self, visible: bool) -> None:
        """Let this environment see the calling Python's packages, or not.

        A base Python is shown by venv's own switch. If the caller is a virtual environment itself, that would
        show *its* base, so a .pth file names its folders instead: as plain paths, because pip hides those
        from isolated builds.
        """
        by_switch = self.made_by_hlat() and sys.prefix == sys.base_prefix
        if self.made_by_hlat():
            config = self.path / "pyvenv.cfg"
            switch = rf"\g<1>{'true' if visible and by_switch else 'false'}"
            text = re.sub(r"(include-system-site-packages = )\w+", switch, config.read_text(encoding="utf-8"))
            config.write_text(text, encoding="utf-8")
        site = self.site_packages()
        assert site is not None, "check() ran before"
        (site / PARENT_PTH).unlink(missing_ok=True)
        if visible and not by_switch:
            (site / PARENT_PTH).write_text("".join(f"{path}\n" for path in parent_paths()), encoding="utf-8")

    def install(self, plan: Plan, extras: list[str]) -> None:
        """torch first, if it is to be installed; then HLAT (editable), with torch pinned to what is there."""
        pip = [str(self.python), "-m", "pip", "--disable-pip-version-check", "install"]
        version = plan.version
        if plan.source == "install":
            call([*pip, f"torch=={version}"])
            version = self.own_torch() or version
            self.save(default_torch=version if plan.version == TESTED_TORCH else None)
        constraints = self.path / "constraints.txt"
        constraints.write_text(f"torch=={version}\n", encoding="utf-8")
        target = f"{self.root}[{','.join(extras)}]" if extras else str(self.root)
        call([*pip, "--constraint", str(constraints), "--editable", target])
        self.check_torch(version)

    def check_torch(self, expected: str) -> None:
        """torch must import inside the environment and be the one the plan named."""
        probe = [str(self.python), "-c", "import torch; print(torch.__version__)"]
        done = subprocess.run(
            probe, capture_output=True, text=True, cwd=self.path, encoding="utf-8", errors="replace"
        )
        found = done.stdout.strip()
        if done.returncode or public(found) != public(expected):
            reason = found or (done.stderr.strip().splitlines() or ["nothing"])[-1]
            fix = "say 'make clean' and try again"
            raise SetupError(f"torch {expected} was expected in {self.path}, found: {reason}; {fix}")


def parent_paths() -> list[str]:
    """The folders that `site` put on the calling Python's path: its packages and what its .pth files name."""
    probe = [sys.executable, "-S", "-c", "import sys; print('\\n'.join(sys.path))"]
    bare = subprocess.run(
        probe, capture_output=True, text=True, check=True, encoding="utf-8", errors="replace"
    ).stdout.splitlines()
    bare.append(str(Path(__file__).resolve().parent))
    return [path for path in sys.path if path and path not in bare and os.path.isdir(path)]


def call(command: list[str]) -> None:
    """Run a command with its output shown; SetupError when it fails."""
    if subprocess.run(command).returncode:
        raise SetupError(f"this failed, see above: {' '.join(command)}")


def compiler_note() -> str | None:
    """One line when torch.compile will not work on this machine, else None."""
    compilers = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++"]
    missing = []
    if not any(shutil.which(name) for name in compilers):
        missing.append("C++ compiler")
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        missing.append("Python.h")
    if not missing:
        return None
    packages = "g++ python{}.{}-dev".format(*sys.version_info)
    slower = "training works, without torch.compile and slower"
    return f"note: no {' and no '.join(missing)} here: {slower} (Debian/Ubuntu: apt install {packages})"


def leave_own_venv(environment: Environment) -> None:
    """When `.venv` itself is activated and called us, go on with the Python that it was made from."""
    if not environment.path.exists() or Path(sys.prefix).resolve() != environment.path.resolve():
        return
    parent = environment.state.get("parent", {}).get("python") or getattr(sys, "_base_executable", "")
    if not parent or not os.path.exists(parent) or os.environ.get("HLAT_SETUP_PARENT") == parent:
        fix = "say: deactivate; make clean; and try again"
        raise SetupError(f"the Python that {environment.path} was made from is gone; {fix}")
    os.environ["HLAT_SETUP_PARENT"] = parent
    os.execv(parent, [parent, os.path.abspath(__file__), *sys.argv[1:]])


def fingerprint(root: Path, plan: Plan) -> str:
    """What the set-up depends on, as one hash: when it is the recorded one there is nothing to do."""
    facts = [
        str(root),
        (root / "pyproject.toml").read_text(encoding="utf-8"),
        Path(__file__).read_text(encoding="utf-8"),
    ]
    facts += [str(plan.source == "parent"), public(plan.version)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def set_up(root: Path, extras: list[str], requested: str) -> None:
    """Bring `root/.venv` to the wanted state. Raises SetupError with one line for the user."""
    environment = Environment(root)
    leave_own_venv(environment)
    version = "{}.{}".format(*sys.version_info)
    parent = {"python": sys.executable, "version": version, "prefix": sys.prefix, "root": str(root)}
    if environment.stale(parent):
        was = environment.state["parent"]
        print(f".venv was made with {was.get('python')} in {was.get('root')}: making it anew")
        shutil.rmtree(environment.path)
        environment = Environment(root)
    own = environment.own_torch()
    own_is_default = own is not None and environment.state.get("default_torch") == own
    site = environment.site_packages()
    same_python = site is None or site.parent.name == f"python{version}"  # else its packages are of no use
    callers = installed_torch(sys.path) if same_python else None
    plan = choose_torch(requested, own, own_is_default, callers, torch_range(root / "pyproject.toml"))
    wanted = sorted(set(extras) | set(environment.state.get("extras", [])))
    key = fingerprint(root, plan)
    if environment.state.get("key") == key and environment.state.get("extras") == wanted:
        return
    environment.create(parent)
    environment.save(key=None)
    environment.show_parent(plan.source == "parent")
    where = {"install": "to be installed into .venv", "own": "in .venv", "parent": f"kept, in {sys.prefix}"}
    print(f"torch {plan.version}: {where[plan.source]}")
    environment.install(plan, wanted)
    environment.save(key=key, extras=wanted)
    note = compiler_note()
    if note:
        print(note)


def main() -> int:
    """Exit code 0, or 2 after one line that says what to do."""
    parser = argparse.ArgumentParser(description="Make or update .venv for this checkout.")
    parser.add_argument("--extras", default="", help="comma-separated extras of pyproject.toml")
    parser.add_argument("--torch", default="", help="install exactly this torch, whatever is there already")
    args = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # pip prints too: keep the order
    try:
        set_up(ROOT, [name for name in args.extras.split(",") if name], args.torch)
    except SetupError as error:
        print(f"set-up: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
