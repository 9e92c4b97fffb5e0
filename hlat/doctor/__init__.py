"""`hlat doctor`: is this machine ready to train, and if not, which lines repair it?

Checks look and report; they change nothing, need no root and import no Neuron package.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from hlat.doctor.finding import Finding
from hlat.doctor.machine import Machine

if TYPE_CHECKING:
    from hlat.backend.neuron.release import Release


@dataclass(frozen=True)
class Case:
    """What a machine shall be fit for.

    platform: 'native', 'trn1' or 'trn2' (also for trn3). release: the Neuron packages it is compared with;
    None on native. nodes: instances of the run. run_dir: where runs are written. port: of the rendezvous.
    """

    platform: str
    release: Release | None = None
    nodes: int = 1
    run_dir: Path = field(default_factory=lambda: Path("runs"))
    port: int = 29500

    @property
    def neuron(self) -> bool:
        """Whether Neuron devices are required."""
        return self.platform != "native"


def make_case(
    machine: Machine,
    platform: str | None = None,
    nodes: int = 1,
    run_dir: Path = Path("runs"),
    port: int | None = None,
) -> Case:
    """The case for a platform, or for the one the machine looks like.

    port None stands for MASTER_PORT, else torchrun's default.
    """
    from hlat.backend.neuron import machine as devices
    from hlat.backend.neuron.release import BY_PLATFORM, choose

    platform = platform or devices.platform(machine.root)
    release = None
    if platform in BY_PLATFORM:
        names = BY_PLATFORM[platform][0].packages
        found = {name: package.version for name in names if (package := machine.package(name)) is not None}
        release = choose(platform, found)
    if port is None:
        text = machine.environ.get("MASTER_PORT", "")
        port = int(text) if text.isdigit() else 29500
    return Case(platform, release, nodes, run_dir, port)


def examine(machine: Machine, case: Case) -> list[Finding]:
    """Every finding, in the order in which they should be repaired."""
    from hlat.doctor import collective, devices, host, software, system

    parts = (system, devices, host, software, collective)
    return [finding for part in parts for finding in part.check(machine, case)]
