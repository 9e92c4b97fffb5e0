"""Which processes hold Neuron devices: a left-over one keeps its cores, and a new run finds none."""

from __future__ import annotations

import os
import re
from collections.abc import Collection

from hlat.doctor.finding import Finding
from hlat.doctor.machine import Machine

_DEVICE = re.compile(r"/dev/neuron\d+$")


def check(machine: Machine, own: Collection[int] = ()) -> Finding:
    """Other processes with an open Neuron device, as far as they may be seen. own: process ids that may."""
    found = {}
    for folder in sorted(machine.root.glob("proc/[0-9]*"), key=lambda path: int(path.name)):
        if int(folder.name) in own:
            continue
        devices = set()
        try:
            for handle in (folder / "fd").iterdir():
                target = os.readlink(handle)
                if _DEVICE.search(target):
                    devices.add(target)
        except OSError:
            continue  # it has ended, or is another user's
        if devices:
            name = machine.read(f"/proc/{folder.name}/comm")
            found[f"{folder.name} ({name})"] = len(devices)
    if not found:
        return Finding("devices.holders", "ok", "no process holds a Neuron device")
    text = ", ".join(f"{who}: {count}" for who, count in list(found.items())[:8])
    return Finding(
        "devices.holders", "fail", f"processes hold Neuron devices: {text}", advice="end them (kill PID)"
    )
