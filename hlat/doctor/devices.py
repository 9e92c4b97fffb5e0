"""Checks of the accelerators and the network cards: Neuron devices, their memory errors, EFA, GPUs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from hlat.backend.neuron import machine as neuron
from hlat.backend.neuron.release import EFA_INSTALLER
from hlat.doctor import Case, gpus
from hlat.doctor.finding import Finding
from hlat.doctor.machine import Machine

_COUNTERS = ("sram_ecc_uncorrected", "mem_ecc_uncorrected", "mem_ecc_repairable_uncorrected")
_EFA_ADVICE = "launch the instance with EFA interfaces (AWS, Prepare trn1.32xlarge for multi-node execution)"


def check(machine: Machine, case: Case) -> Iterator[Finding]:
    """Devices a run computes and communicates on."""
    if not case.neuron:
        yield from gpus.check(machine)
        return
    found = neuron.neuron_devices(machine.root)
    yield count(machine, case)
    if found:
        yield _listed(machine, found)
        yield memory_errors(machine)
    yield from efa(machine, case)


def count(machine: Machine, case: Case) -> Finding:
    """Whether all Neuron devices of the instance are there."""
    found = neuron.neuron_devices(machine.root)
    kind = neuron.instance_type(machine.root)
    expected, _ = neuron.INSTANCES.get(kind, (0, 0))
    where = f" on {kind}" if kind else ""
    if not found:
        advice = f"take a {case.platform} instance, and load the driver (system.driver)"
        return Finding("devices.neuron", "fail", f"no Neuron device (/dev/neuron*){where}", advice=advice)
    if found < expected:
        advice = "reboot; if devices stay away, replace the instance"
        return Finding(
            "devices.neuron", "fail", f"{found} of {expected} Neuron devices{where}", advice=advice
        )
    return Finding("devices.neuron", "ok", f"{found} Neuron devices{where}")


def _listed(machine: Machine, count: int) -> Finding:
    """What neuron-ls says; processes on the cores would make a run fail."""
    name = "devices.neuron-ls"
    done = machine.run(["neuron-ls", "--json-output"], timeout=60)
    if done is None:
        return Finding(name, "warn", "neuron-ls is not installed", advice="install the tools (system.tools)")
    if done.code != 0:
        done = (
            machine.run(["neuron-ls", "--output-format", "json"], timeout=60) or done
        )  # from Neuron 2.34 on
    devices = _devices(done.out)
    if done.code != 0 or devices is None:
        text = " ".join((done.err or done.out).split())[:120] or "nothing readable"
        return Finding(name, "fail", f"neuron-ls fails: {text}", advice="reload the driver, else reboot")
    busy = [process for device in devices for process in device.get("neuron_processes") or []]
    pids = sorted({str(process.get("pid")) for process in busy if isinstance(process, dict)}, key=len)
    if len(devices) != count:
        fact = f"neuron-ls lists {len(devices)} devices, /dev has {count}"
        return Finding(name, "fail", fact, advice="reload the driver, else reboot")
    if pids:
        fact = f"processes use Neuron cores: {', '.join(pids)}"
        return Finding(name, "warn", fact, advice="end them if they are left over from a run")
    cores = sum(int(device.get("nc_count") or 0) for device in devices)
    return Finding(name, "ok", f"{len(devices)} devices, {cores} cores, none in use")


def _devices(text: str) -> list[dict[str, Any]] | None:
    """The devices of either JSON format: a list, or a mapping that holds one."""
    try:
        found = json.loads(text)
    except ValueError:
        return None
    if isinstance(found, dict):
        found = next((value for value in found.values() if isinstance(value, list)), None)
    if not isinstance(found, list) or not all(isinstance(item, dict) for item in found):
        return None
    return found


def memory_errors(machine: Machine) -> Finding:
    """Uncorrected memory errors since the driver was loaded, from sysfs."""
    name = "devices.memory"
    seen, errors = 0, []
    for counter in _COUNTERS:
        for file in machine.find("/sys/devices/virtual/neuron_device", counter):
            file = file / "total" if file.is_dir() else file
            text = machine.read(str(file.relative_to(machine.root)))
            seen += text.isdigit()
            if text.isdigit() and int(text):
                device = next(
                    (part for part in file.parts if part.startswith("neuron") and part[6:].isdigit()), ""
                )
                errors.append((counter, f"{device} {counter} {text}"))
    if not seen:
        return Finding(name, "warn", "no memory error counters in /sys (older or newer driver)")
    if not errors:
        return Finding(name, "ok", "no uncorrected memory error")
    fact = "uncorrected memory errors: " + ", ".join(text for _, text in errors[:4])
    if all(counter == "mem_ecc_repairable_uncorrected" for counter, _ in errors):
        return Finding(
            name, "fail", fact, ("sudo reboot",), "repairable: reload the driver or reboot, test again"
        )
    return Finding(name, "fail", fact, advice="replace the instance")


def efa(machine: Machine, case: Case) -> Iterator[Finding]:
    """EFA devices, and whether libfabric uses them."""
    kind = neuron.instance_type(machine.root)
    _, expected = neuron.INSTANCES.get(kind, (0, 1))
    count = neuron.efa_devices(machine.root)
    if kind in neuron.INSTANCES and expected == 0:
        several = case.nodes > 1
        fact = f"{kind} has no EFA" + (f", which {case.nodes} nodes need" if several else "; one node only")
        advice = "take trn1.32xlarge" if several else ""
        yield Finding("network.efa", "fail" if several else "ok", fact, advice=advice)
        return
    if not count:
        yield Finding("network.efa", "fail", "no EFA device (/sys/class/infiniband)", advice=_EFA_ADVICE)
    elif count < expected:
        fact = f"{count} of {expected} EFA devices on {kind}"
        yield Finding("network.efa", "fail" if case.nodes > 1 else "warn", fact, advice=_EFA_ADVICE)
    else:
        yield Finding("network.efa", "ok", f"{count} EFA devices")
    done = machine.run(["fi_info", "-p", "efa"])
    if done is not None and done.code == 0 and "provider: efa" in done.out:
        yield Finding("network.libfabric", "ok", "libfabric offers the provider efa")
        return
    fact = "libfabric (fi_info) is not installed" if done is None else "libfabric offers no provider efa"
    yield Finding(
        "network.libfabric", "fail" if case.nodes > 1 or done is None else "warn", fact, _efa_lines(case)
    )


def _efa_lines(case: Case) -> tuple[str, ...]:
    version = case.release.efa_installer if case.release is not None else "latest"
    archive = f"aws-efa-installer-{version}.tar.gz"
    return (
        f"curl -fO {EFA_INSTALLER}/{archive}",
        f"tar -xf {archive}",
        "cd aws-efa-installer && sudo ./efa_installer.sh -y && cd ..",
    )
