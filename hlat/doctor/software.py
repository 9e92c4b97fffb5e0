"""Checks of Python and its packages against the tested set."""

from __future__ import annotations

from collections.abc import Iterator

import hlat
from hlat.backend.neuron.release import PIP_INDEX, PLACEHOLDERS, Release, matches, requirement
from hlat.doctor import Case
from hlat.doctor.finding import Finding
from hlat.doctor.machine import Machine

PYTHON = (3, 11)
TORCH_FROM, TORCH_BELOW, TORCH_TESTED = (2, 9), (2, 14), "2.13"  # pyproject.toml; a test compares
REQUIRED = ("numpy", "pydantic", "pyyaml", "rich", "safetensors", "tokenizers", "sentencepiece")
_PURPOSE = {
    "torch": "PyTorch",
    "torch-xla": "PyTorch on XLA",
    "torch-neuronx": "PyTorch on Neuron",
    "neuronx-cc": "Neuron compiler",
    "libneuronxla": "XLA plug-in of Neuron",
    "nki": "Neuron kernels",
    "neuronx-distributed": "NeuronX Distributed",
}


def check(machine: Machine, case: Case) -> Iterator[Finding]:
    """Python, PyTorch, the packages HLAT needs; on a Neuron machine every package of its release."""
    yield _python(machine, case)
    yield Finding("package.hlat", "ok", f"hlat {hlat.__version__}")
    if case.release is None:
        yield _torch(machine)
        yield from _required(machine)
        yield _not_needed(machine)
        return
    yield from _required(machine)
    for name, pinned in case.release.packages.items():
        yield _pinned(machine, name, pinned, case.release)
    yield from _other_placeholders(machine, set(case.release.packages))


def _python(machine: Machine, case: Case) -> Finding:
    version = ".".join(map(str, machine.python))
    first, last = PYTHON, (3, 99)
    release = case.release
    if release is not None:
        first, last = (3, release.python[0]), (3, release.python[1])
    if machine.python[:2] < PYTHON:
        wanted = f"3.{release.python[0] if release else 11}"
        lines = (f"python{wanted} -m venv .venv", ". .venv/bin/activate")
        return Finding(
            "python", "fail", f"Python {version}; HLAT needs {PYTHON[0]}.{PYTHON[1]} or newer", lines
        )
    if first <= machine.python[:2] <= last:
        return Finding("python", "ok", f"Python {version}")
    assert release is not None
    name = f"3.{release.python[1]}"
    fact = f"Python {version}; Neuron {release.name} has packages for 3.{release.python[0]} to {name}"
    lines = (f"python{name} -m venv .venv", ". .venv/bin/activate")
    return Finding("python", "fail", fact, lines, f"install Python {name} if it is not there")


def _torch(machine: Machine) -> Finding:
    found = machine.package("torch")
    line = (f"python -m pip install 'torch=={TORCH_TESTED}.*'",)
    if found is None:
        return Finding("package.torch", "fail", "PyTorch is not installed", line)
    low, high = (".".join(map(str, bound)) for bound in (TORCH_FROM, TORCH_BELOW))
    if not TORCH_FROM <= _minor(found.version) < TORCH_BELOW:
        fact = f"torch {found.version} is outside the supported range, {low} up to but not {high}"
        return Finding("package.torch", "fail", fact, line)
    return Finding("package.torch", "ok", f"torch {found.version} (supported: {low} up to but not {high})")


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else 0 for part in version.split("+")[0].split(".")[:2])


def _required(machine: Machine) -> Iterator[Finding]:
    missing = [name for name in REQUIRED if machine.package(name) is None]
    if missing:
        fact = f"not installed: {', '.join(missing)}"
        yield Finding("package.required", "fail", fact, (f"python -m pip install {' '.join(missing)}",))
    else:
        yield Finding("package.required", "ok", f"{len(REQUIRED)} packages HLAT needs are installed")


def _not_needed(machine: Machine) -> Finding:
    """On a native machine: the Neuron packages in one line; placeholders are worth a warning."""
    installed = {name: found for name in PLACEHOLDERS if (found := machine.package(name)) is not None}
    empty = [name for name, found in installed.items() if found.empty]
    if empty:
        fact = f"PyPI's empty placeholders are installed: {', '.join(empty)}"
        return Finding("neuron", "warn", fact, (f"python -m pip uninstall -y {' '.join(empty)}",))
    names = ", ".join(name for name in _PURPOSE if name != "torch")
    fact = f"no Neuron device, so not needed: driver, runtime, {names}"
    return Finding("neuron", "ok", fact, advice="hlat doctor --for trn1 checks them all the same")


def _pinned(machine: Machine, name: str, pinned: str, release: Release) -> Finding:
    check, what = f"package.{name}", f"{_PURPOSE[name]} {name}"
    found, wanted = machine.package(name), requirement(name, pinned)
    if found is None:
        return Finding(check, "fail", f"{what} is not installed (tested: {pinned})", requirement=wanted)
    if found.empty:
        fact = f"{name} {found.version} is PyPI's empty placeholder; the package is only in {PIP_INDEX}"
        return Finding(check, "fail", fact, (f"python -m pip uninstall -y {name}",), requirement=wanted)
    if matches(found.version, pinned):
        return Finding(check, "ok", f"{what} {found.version} (Neuron {release.name}, {release.role})")
    different = name in ("torch", "torch-xla") or found.version.split(".")[0] != pinned.split(".")[0]
    fact = f"{what} {found.version} is not the tested {pinned} (Neuron {release.name})"
    return Finding(check, "fail" if different else "warn", fact, requirement=wanted)


def _other_placeholders(machine: Machine, checked: set[str]) -> Iterator[Finding]:
    empty = [
        name
        for name in PLACEHOLDERS
        if name not in checked and (found := machine.package(name)) is not None and found.empty
    ]
    if empty:
        fact = f"PyPI's empty placeholders are installed: {', '.join(empty)}"
        yield Finding(
            "package.placeholders", "warn", fact, (f"python -m pip uninstall -y {' '.join(empty)}",)
        )
