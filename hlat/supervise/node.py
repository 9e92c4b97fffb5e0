"""Is this machine fit to train now? Asked before each start: quick, without torch, and changes nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from hlat.doctor import devices, gpus, holders, host, make_case, software, space, system
from hlat.doctor.finding import Finding
from hlat.doctor.machine import Machine
from hlat.supervise.classify import Evidence, classify
from hlat.supervise.kernel import kernel_lines

if TYPE_CHECKING:
    from hlat.doctor import Case
    from hlat.recipe import Recipe

PATIENCE = 4.0  # seconds for a command, all of which run side by side
_RECENT = 3600.0  # a hardware error of the last hour counts, an older one is told
_NOT_ASKED = ("network.port", "compiler", "disk.temporary")  # the run holds it; for other times
_NOT_THE_NODES = ("disk.", "limits.", "python", "package.", "variables", "recipe.", "devices.holders")


def node_findings(
    recipe: Recipe,
    *,
    machine: Machine | None = None,
    nodes: int = 1,
    ranks: int = 0,
    own: Collection[int] = (),
    kernel: Callable[[float], str] = kernel_lines,
) -> list[Finding]:
    """What speaks for and against starting this recipe here. A program that is asked gets `PATIENCE` seconds.

    Args:
        recipe: the run. machine: default: this one. nodes: of the job. ranks: on this one (0: not known).
        own: process ids that may hold devices beside this one and its parent.
        kernel: gives its messages since a time.
    """
    machine = machine or Machine()
    machine.patience = PATIENCE
    platform = "trn1" if recipe.backend == "nxd" else None
    run = Path("." if "://" in recipe.run.dir else recipe.run.dir)
    case = make_case(machine, platform, nodes, run)
    mine = {os.getpid(), os.getppid(), *own}
    parts: tuple[Callable[[], Iterable[Finding]], ...] = (
        lambda: _devices(machine, case, ranks, mine),
        lambda: devices.efa(machine, case) if case.neuron else (),
        lambda: host.check(machine, case),
        lambda: software.check(machine, case),
        lambda: (space.check(machine, recipe), _kernel(kernel)),
    )
    with ThreadPoolExecutor(len(parts)) as pool:
        found = [finding for part in pool.map(lambda ask: list(ask()), parts) for finding in part]
    return [finding for finding in found if finding.check not in _NOT_ASKED]


def is_bad(findings: Iterable[Finding]) -> list[Finding]:
    """What makes this node unfit: failures that another node would not have."""
    return [f for f in findings if f.status == "fail" and not f.check.startswith(_NOT_THE_NODES)]


def _devices(machine: Machine, case: Case, ranks: int, own: Collection[int]) -> Iterable[Finding]:
    if not case.neuron:
        yield from gpus.check(machine, ranks)
        return
    yield devices.count(machine, case)
    yield devices.memory_errors(machine)
    yield holders.check(machine, own)
    if case.release is not None:
        yield system.driver(machine, case.release, "")


def _kernel(lines: Callable[[float], str]) -> Finding:
    """Hardware errors in the kernel's log: the rows of the failure table that it can hold."""
    name, now = "kernel", time.time()
    recent = classify(Evidence(kernel=lines(now - _RECENT)))
    if recent.kind == "node":
        status = "fail" if recent.action == "exclude" else "warn"
        advice = "see the failure table; replace or repair the machine"
        return Finding(name, status, f"in the last hour: {recent.reason}", advice=advice)  # type: ignore[arg-type]
    older = classify(Evidence(kernel=lines(0.0)))
    if older.kind == "node":
        return Finding(name, "warn", f"since the boot: {older.reason}", advice="see the failure table")
    return Finding(name, "ok", "no hardware error in the kernel's log, as far as it may be read")
