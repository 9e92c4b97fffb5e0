"""Checks of what the operating system has to bring on a Neuron machine: repository, driver, libraries."""

from __future__ import annotations

from collections.abc import Iterator

from hlat.backend.neuron.release import APT_REPOSITORY, KEY_FILE, YUM_REPOSITORY, Release
from hlat.doctor import Case
from hlat.doctor.finding import Finding
from hlat.doctor.machine import Machine

DRIVER = "aws-neuronx-dkms"
_PURPOSE = {
    DRIVER: "driver",
    "aws-neuronx-runtime-lib": "runtime",
    "aws-neuronx-collectives": "collectives",
    "aws-neuronx-tools": "tools (neuron-ls, neuron-top)",
}
_KEYRING = "/usr/share/keyrings/aws-neuron.gpg"
_APT = (
    f"wget -qO- {APT_REPOSITORY}/{KEY_FILE} | sudo gpg --batch --yes --dearmor -o {_KEYRING}",
    f'. /etc/os-release && echo "deb [signed-by={_KEYRING}] {APT_REPOSITORY} $VERSION_CODENAME main"'
    " | sudo tee /etc/apt/sources.list.d/neuron.list",
    "sudo apt-get update",
)
_YUM = (
    f"printf '[neuron]\\nname=Neuron\\nbaseurl={YUM_REPOSITORY}\\nenabled=1\\nmetadata_expire=0\\n'"
    " | sudo tee /etc/yum.repos.d/neuron.repo",
    f"sudo rpm --import {YUM_REPOSITORY}/{KEY_FILE}",
)


def check(machine: Machine, case: Case) -> Iterator[Finding]:
    """Driver and system packages; nothing on a native machine."""
    if case.release is None:
        return
    found = {name: installed(machine, name) for name in case.release.system}
    missing = [name for name, version in found.items() if not version]
    if missing and not _has_repository(machine):
        lines = _YUM if _uses_rpm(machine) else _APT
        yield Finding("system.repository", "fail", "AWS's Neuron package repository is not configured", lines)
    yield driver(machine, case.release, found[DRIVER])
    for name, pinned in case.release.system.items():
        if name != DRIVER:
            yield _package(machine, name, pinned, found[name], case.release)


def installed(machine: Machine, name: str) -> str:
    """The version of a system package, by dpkg or rpm; empty when it is not installed."""
    for command in (
        ["dpkg-query", "-W", "-f=${db:Status-Status} ${Version}", name],
        ["rpm", "-q", "--qf", "installed %{VERSION}", name],
    ):
        done = machine.run(command)
        if done is not None and done.code == 0 and done.out.startswith("installed "):
            return done.out.split()[1]
    return ""


def driver(machine: Machine, release: Release, package: str) -> Finding:
    """The driver that is loaded counts: a container has no package, and a new one may wait for a reload."""
    name, pinned = "system.driver", release.system[DRIVER]
    loaded = machine.read("/sys/module/neuron/version")
    if loaded and _number(loaded) >= _number(pinned):
        return Finding(name, "ok", f"driver {loaded} is loaded (tested: {pinned} and later)")
    if loaded:
        fact = f"driver {loaded} is loaded, older than the tested {pinned}"
        return Finding(name, "warn", fact, (_install(machine, DRIVER, pinned), *_RELOAD))
    if package:
        fact = f"driver {package} is installed and not loaded"
        return Finding(name, "fail", fact, ("sudo modprobe neuron",))
    headers = "kernel-devel-$(uname -r)" if _uses_rpm(machine) else "linux-headers-$(uname -r)"
    manager = "dnf" if _uses_rpm(machine) else "apt-get"
    lines = (
        f"sudo {manager} install -y {headers}",
        _install(machine, DRIVER, pinned),
        "sudo modprobe neuron",
    )
    return Finding(name, "fail", "no Neuron driver: neither loaded nor installed", lines)


_RELOAD = ("sudo modprobe -r neuron", "sudo modprobe neuron")


def _package(machine: Machine, name: str, pinned: str, version: str, release: Release) -> Finding:
    what, line = f"{_PURPOSE[name]} {name}", (_install(machine, name, pinned),)
    check = f"system.{name.removeprefix('aws-neuronx-')}"
    if not version:
        return Finding(check, "fail", f"{what} is not installed", line)
    if _number(version) == _number(pinned):
        return Finding(check, "ok", f"{what} {version}")
    fact = f"{what} {version} is not the tested {pinned} (Neuron {release.name})"
    return Finding(check, "warn", fact, line)


def _install(machine: Machine, name: str, version: str) -> str:
    if _uses_rpm(machine):
        return f"sudo dnf install -y '{name}-{version}*'"
    return f"sudo apt-get install -y --allow-downgrades '{name}={version}*'"


def _uses_rpm(machine: Machine) -> bool:
    text = machine.read("/etc/os-release")
    kinds = [
        line.partition("=")[2].strip('"')
        for line in text.splitlines()
        if line.startswith(("ID=", "ID_LIKE="))
    ]
    return any(
        kind in ("amzn", "rhel", "fedora", "centos", "rocky") for part in kinds for kind in part.split()
    )


def _has_repository(machine: Machine) -> bool:
    files = [*machine.find("/etc/apt", "*.list"), *machine.find("/etc/apt", "*.sources")]
    files += machine.find("/etc/yum.repos.d", "*.repo")
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(errors="replace", encoding="utf-8"))
        except OSError:
            continue
    return any("repos.neuron.amazonaws.com" in text for text in texts)


def _number(version: str) -> tuple[int, ...]:
    """'2.30.51.0-abc' -> (2, 30, 51): leading numbers, without zeros at the end."""
    numbers = []
    for part in version.split("-")[0].split("."):
        digits = "".join(c for c in part if c.isdigit())
        if not digits:
            break
        numbers.append(int(digits))
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)
