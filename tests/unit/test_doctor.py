"""`hlat doctor`: every check in both directions on a faked machine, and both exit codes on this one."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from hlat.backend.neuron.release import FORWARD, PIP_INDEX, PLACEHOLDERS, PRIMARY
from hlat.doctor import Case, collective, devices, host, make_case, software, system
from hlat.doctor.finding import Finding, plan
from hlat.doctor.machine import Machine, Output, Package

ROOT = Path(__file__).resolve().parents[2]
UNLIMITED = (float("inf"), float("inf"))
PORTS = "/proc/sys/net/ipv4/ip_local_"


@pytest.fixture
def machine(fake_host: Any) -> Any:
    """A plain machine, healthy."""
    return fake_host


@pytest.fixture
def node(fake_node: Any) -> Any:
    """A trn1.32xlarge, healthy."""
    return fake_node


def trn1(nodes: int = 1) -> Case:
    return Case("trn1", PRIMARY, nodes)


NATIVE = Case("native")


def all_of(machine: Machine, case: Case) -> dict[str, Finding]:
    parts = (system, devices, host, software, collective)
    found = [finding for part in parts for finding in part.check(machine, case)]
    assert len({finding.check for finding in found}) == len(found), "names of checks are unique"
    return {finding.check: finding for finding in found}


def wrong(machine: Machine, case: Case) -> dict[str, str]:
    return {name: finding.status for name, finding in all_of(machine, case).items() if finding.status != "ok"}


def test_healthy_machines(machine: Any) -> None:
    assert wrong(machine, NATIVE) == {}


def test_a_healthy_node(node: Any) -> None:
    assert wrong(node, trn1(16)) == {}
    assert len(all_of(node, trn1(16))) == 33


def test_a_bare_machine_names_every_missing_piece(machine: Any) -> None:
    machine.packages.pop("torch")
    found = all_of(machine, trn1(16))
    for name, version in PRIMARY.packages.items():
        finding = found[f"package.{name}"]
        assert finding.status == "fail" and name in finding.fact
        assert finding.commands == (
            f"python -m pip install --extra-index-url {PIP_INDEX} '{name}=={version}.*'",
        )
    for name in ("collectives", "runtime-lib", "tools"):
        finding = found[f"system.{name}"]
        pinned = PRIMARY.system[f"aws-neuronx-{name}"]
        assert finding.status == "fail" and f"'aws-neuronx-{name}={pinned}*'" in finding.commands[0]
    assert any("aws-neuronx-dkms=2.26.10.0*" in line for line in found["system.driver"].fix)
    for name in ("system.repository", "devices.neuron", "network.efa", "network.libfabric"):
        assert found[name].status == "fail"
    assert "efa-installer" in found["network.libfabric"].fix[0]


def test_red_hat_systems_get_their_own_lines(machine: Any) -> None:
    machine.write("/etc/os-release", 'ID="amzn"\nID_LIKE="fedora"\n')
    text = "\n".join(plan(list(all_of(machine, trn1()).values())))
    assert "sudo dnf install -y 'aws-neuronx-tools-2.28.23.0*'" in text and "neuron.repo" in text
    assert "apt-get install -y --allow" not in text


def test_the_plan_is_in_order_and_installs_packages_at_once(machine: Any) -> None:
    lines = plan(list(all_of(machine, trn1()).values()))
    assert len(set(lines)) == len(lines)
    pip = [line for line in lines if PIP_INDEX in line]
    assert len(pip) == 1 and all(f"'{name}==" in pip[0] for name in PRIMARY.packages)

    def place(part: str) -> int:
        return next(index for index, line in enumerate(lines) if part in line)

    parts = ("neuron.list", "apt-get update", "dkms", "modprobe", "runtime-lib", "efa_installer", PIP_INDEX)
    places = [place(part) for part in parts]
    assert places == sorted(places)
    assert plan([Finding("a", "ok", "fine", ("never",))]) == []


@pytest.mark.parametrize(
    ("files", "status", "part"),
    [
        ({"/sys/module/neuron/version": "2.26.10.0"}, "ok", "2.26.10.0 is loaded"),
        ({"/sys/module/neuron/version": "2.20.1.0"}, "warn", "older than the tested 2.26.10.0"),
        ({}, "fail", "is installed and not loaded"),
    ],
)
def test_driver(machine: Any, files: dict[str, str], status: str, part: str) -> None:
    machine.commands["aws-neuronx-dkms"] = Output(0, "installed 2.26.10.0")
    for path, text in files.items():
        machine.write(path, text)
    finding = all_of(machine, trn1())["system.driver"]
    assert finding.status == status and part in finding.fact
    assert (finding.fix == ()) == (status == "ok")


def test_another_system_package_is_a_warning(node: Any) -> None:
    node.commands["aws-neuronx-collectives"] = Output(0, "installed 2.22.26.0")
    assert wrong(node, trn1())["system.collectives"] == "warn"
    node.commands["aws-neuronx-collectives"] = Output(1, "")
    assert wrong(node, trn1())["system.collectives"] == "fail"
    assert wrong(node, trn1())["system.repository"] == "fail"
    node.write("/etc/apt/sources.list.d/neuron.list", "deb https://apt.repos.neuron.amazonaws.com jammy main")
    assert "system.repository" not in all_of(node, trn1())


def test_lost_devices(node: Any) -> None:
    (node.root / "dev/neuron7").unlink()
    found = wrong(node, trn1())
    assert found["devices.neuron"] == found["devices.neuron-ls"] == "fail"


@pytest.mark.parametrize(
    ("output", "status", "part"),
    [
        (None, "warn", "not installed"),
        (Output(1, "", "no driver"), "fail", "no driver"),
        (Output(0, "no json"), "fail", "neuron-ls fails"),
        (Output(None, "", "no answer in 60 s"), "fail", "no answer"),
        (Output(0, json.dumps({"neuron_devices": [{"nc_count": 2}] * 16})), "ok", "32 cores"),
        (Output(0, json.dumps([{"neuron_processes": [{"pid": 77}]}] + [{}] * 15)), "warn", "77"),
    ],
)
def test_neuron_ls(node: Any, output: Output | None, status: str, part: str) -> None:
    del node.commands["neuron-ls --json"]
    if output is not None:
        node.commands["neuron-ls"] = output
    finding = all_of(node, trn1())["devices.neuron-ls"]
    assert finding.status == status and part in finding.fact


@pytest.mark.parametrize(
    ("counter", "advice"), [("sram_ecc_uncorrected", "replace"), ("mem_ecc_repairable_uncorrected", "reboot")]
)
def test_memory_errors(node: Any, counter: str, advice: str) -> None:
    node.write(f"/sys/devices/virtual/neuron_device/neuron3/stats/hardware/{counter}", "2\n")
    finding = all_of(node, trn1())["devices.memory"]
    assert finding.status == "fail" and f"neuron3 {counter} 2" in finding.fact and advice in finding.advice


def test_counters_in_folders(node: Any) -> None:
    folder = "/sys/devices/virtual/neuron_device/neuron0/neuron_core0/stats/hardware/mem_ecc_uncorrected"
    node.write(f"{folder}/total", "1")
    assert wrong(node, trn1())["devices.memory"] == "fail"


def test_efa(node: Any) -> None:
    vendor = node.root / "sys/class/infiniband/rdmap0s27/device/vendor"
    vendor.write_text("0x15b3")
    assert wrong(node, trn1(1))["network.efa"] == "warn" and wrong(node, trn1(2))["network.efa"] == "fail"
    node.commands["fi_info"] = Output(61, "", "fi_getinfo: -61")
    assert (
        wrong(node, trn1(1))["network.libfabric"] == "warn"
        and wrong(node, trn1(2))["network.libfabric"] == "fail"
    )
    node.write("/sys/devices/virtual/dmi/id/product_name", "trn1.2xlarge\n")
    assert wrong(node, trn1(2))["network.efa"] == "fail" and "network.efa" not in wrong(node, trn1(1))


@pytest.mark.parametrize(
    ("case", "limits", "check", "status", "line"),
    [
        (NATIVE, {"NOFILE": (256.0, 4096.0)}, "limits.nofile", "warn", "ulimit -n 1024"),
        (trn1(), {"NOFILE": (1024.0, 70000.0)}, "limits.nofile", "warn", "ulimit -n 65535"),
        (trn1(4), {"NOFILE": (1024.0, 4096.0)}, "limits.nofile", "fail", "limits.d"),
        (trn1(), {"MEMLOCK": (8e6, 8e6)}, "limits.memlock", "warn", "memlock unlimited"),
        (trn1(4), {"MEMLOCK": (8e6, 8e6)}, "limits.memlock", "fail", "memlock unlimited"),
    ],
)
def test_limits(node: Any, case: Case, limits: dict, check: str, status: str, line: str) -> None:
    node.limits |= limits
    finding = all_of(node, case)[check]
    assert finding.status == status and line in finding.fix[0]


def test_memory_and_huge_pages(node: Any) -> None:
    node.write("/proc/meminfo", "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\nHugePages_Total: 0\n")
    found = all_of(node, trn1())
    assert found["limits.hugepages"].fix == ("sudo sysctl -w vm.nr_hugepages=5120",)
    assert found["limits.memory"].status == "warn"
    node.write("/proc/meminfo", "")
    assert all_of(node, NATIVE)["limits.memory"].status == "ok"


def test_disk(node: Any) -> None:
    node.free_bytes = 10**9
    found = wrong(node, trn1())
    assert found["disk.run"] == found["disk.cache"] == found["limits.shm"] == "warn"
    assert wrong(node, NATIVE) == {"disk.run": "warn"}
    node.readable = False
    assert wrong(node, NATIVE)["disk.run"] == "fail"


def test_a_shared_compile_cache(node: Any) -> None:
    node.kind = "lustre"
    assert wrong(node, trn1())["disk.cache"] == "warn" and wrong(node, trn1(2))["disk.cache"] == "fail"
    node.environ = {"NEURON_CC_FLAGS": "--cache_dir=s3://bucket/neuron"}
    assert "s3://bucket/neuron" in all_of(node, trn1(2))["disk.cache"].fact
    assert "disk.cache" not in wrong(node, trn1(2))


def test_ports_and_names(node: Any) -> None:
    node.port = False
    assert wrong(node, trn1())["network.port"] == "fail" and wrong(node, NATIVE)["network.port"] == "warn"
    node.write(f"{PORTS}reserved_ports", "40000-41000\n")
    finding = all_of(node, trn1(2))["network.reserved"]
    assert finding.fix == ("sudo sysctl -w net.ipv4.ip_local_reserved_ports=40000-41000,48620",)
    node.write(f"{PORTS}reserved_ports", "48000-49000\n")
    assert "network.reserved" not in wrong(node, trn1(2))
    node.name = "n" * 64
    assert wrong(node, trn1(2))["network.name"] == "fail"


def test_clock(node: Any) -> None:
    for error in (float("inf"), 30.0):
        node.clock = error
        assert wrong(node, trn1())["clock"] == "warn" and "clock" not in wrong(node, NATIVE)
    node.clock = None
    assert "clock" not in wrong(node, trn1())


@pytest.mark.parametrize(
    ("environ", "line"),
    [
        ({"XLA_USE_BF16": "1"}, ("unset XLA_USE_BF16",)),
        ({"NEURON_CC_FLAGS": "--auto-cast=all"}, ()),
        ({"NEURON_CC_FLAGS": "--a='"}, ()),
    ],
)
def test_variables(node: Any, environ: dict[str, str], line: tuple[str, ...]) -> None:
    node.environ = environ
    finding = all_of(node, trn1())["variables"]
    assert finding.status == "fail" and finding.fix == line and finding.advice


@pytest.mark.parametrize(
    ("case", "python", "status"),
    [
        (NATIVE, (3, 11, 0), "ok"),
        (NATIVE, (3, 14, 0), "ok"),
        (NATIVE, (3, 10, 12), "fail"),
        (trn1(), (3, 12, 3), "ok"),
        (trn1(), (3, 13, 1), "fail"),
        (Case("trn1", FORWARD), (3, 13, 1), "ok"),
    ],
)
def test_python(node: Any, case: Case, python: tuple[int, int, int], status: str) -> None:
    node.python = python
    finding = all_of(node, case)["python"]
    assert finding.status == status
    assert (status == "ok") == (finding.fix == ())


@pytest.mark.parametrize(
    ("version", "status"),
    [(None, "fail"), ("2.8.1", "fail"), ("2.9.0+cu128", "ok"), ("2.13.0a0", "ok"), ("2.14.0", "fail")],
)
def test_torch(machine: Any, version: str | None, status: str) -> None:
    machine.packages.pop("torch")
    if version is not None:
        machine.packages["torch"] = Package(version)
    assert all_of(machine, NATIVE)["package.torch"].status == status


def test_torch_range_is_that_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    low, high = (".".join(map(str, bound)) for bound in (software.TORCH_FROM, software.TORCH_BELOW))
    assert f"torch>={low},<{high}" in project["dependencies"]
    assert project["requires-python"] == f">={'.'.join(map(str, software.PYTHON))}"
    named = {"".join(c for c in line.split(">")[0]) for line in project["dependencies"]}
    assert named == {*software.REQUIRED, "torch"}
    assert f'TESTED_TORCH = "{software.TORCH_TESTED}' in (ROOT / "launch" / "setup_env.py").read_text()


def test_missing_requirements(machine: Any) -> None:
    del machine.packages["rich"]
    assert all_of(machine, NATIVE)["package.required"].fix == ("python -m pip install rich",)


def test_other_versions_of_neuron_packages(node: Any) -> None:
    node.packages["neuronx-cc"] = Package("2.22.12471.0")
    node.packages["torch-xla"] = Package("2.11.0")
    assert wrong(node, trn1())["package.neuronx-cc"] == "warn"
    assert wrong(node, trn1())["package.torch-xla"] == "fail"


def test_placeholders_are_not_taken_for_the_packages(node: Any) -> None:
    for name in PLACEHOLDERS:
        node.packages[name] = Package("1.0", empty=True)
    found = all_of(node, trn1())
    for name in ("torch-neuronx", "neuronx-distributed", "neuronx-cc", "libneuronxla", "nki"):
        finding = found[f"package.{name}"]
        assert finding.status == "fail" and "placeholder" in finding.fact and PIP_INDEX in finding.fact
        assert (
            finding.commands[0] == f"python -m pip uninstall -y {name}" and PIP_INDEX in finding.commands[1]
        )
    lines = plan(list(found.values()))
    installs = next(index for index, line in enumerate(lines) if PIP_INDEX in line)
    uninstalls = [index for index, line in enumerate(lines) if "uninstall -y" in line and "nrtpy" not in line]
    assert len(uninstalls) == 5 and max(uninstalls) < installs
    assert found["package.placeholders"].fix == ("python -m pip uninstall -y nrtpy nkipy nki-library",)
    assert "not run" in found["allreduce.neuron"].fact
    assert wrong(node, NATIVE)["neuron"] == "warn"


@pytest.mark.parametrize(
    ("output", "status", "part"),
    [
        (Output(0, 'noise\n{"right": true, "seconds": 0.001}\n'), "ok", "1.0 ms"),
        (Output(1, '{"right": false, "seconds": 0.001}\n'), "fail", "wrong sum"),
        (Output(1, "", "Traceback\nRuntimeError: no route\n"), "fail", "no route"),
        (Output(None, "", "no answer in 90 s"), "fail", "no answer"),
        (None, "fail", "cannot be started"),
    ],
)
def test_all_reduce(machine: Any, output: Output | None, status: str, part: str) -> None:
    del machine.commands["hlat.doctor.probe"]
    if output is not None:
        machine.commands["hlat.doctor.probe"] = output
    finding = all_of(machine, NATIVE)["allreduce.gloo"]
    assert finding.status == status and part in finding.fact


def test_graphics_cards(machine: Any) -> None:
    machine.commands["nvidia-smi"] = Output(0, "NVIDIA H200, 570.1\nNVIDIA H200, 570.1\n")
    assert "2 GPU: NVIDIA H200" in all_of(machine, NATIVE)["devices"].fact
    machine.commands["nvidia-smi"] = Output(9, "Driver/library version mismatch")
    assert wrong(machine, NATIVE) == {"devices": "warn"}


def test_compiler(machine: Any) -> None:
    machine.commands["clang++ --version"] = machine.commands.pop("g++ --version")
    assert "g++" in all_of(machine, NATIVE)["compiler"].fix[0]  # torch.compile does not look for clang++
    machine.environ["CXX"] = "clang++"
    assert all_of(machine, NATIVE)["compiler"].status == "ok"
    machine.environ["CXX"] = "nonexistent"
    found = all_of(machine, NATIVE)["compiler"]
    assert found.status == "warn" and "(nonexistent)" in found.fact and "CXX" in found.advice


def test_the_case_follows_the_machine(node: Any, tmp_path: Path) -> None:
    case = make_case(node)
    assert (case.platform, case.release, case.port) == ("trn1", PRIMARY, 29500)
    node.packages |= {name: Package(version) for name, version in FORWARD.packages.items()}
    node.environ = {"MASTER_PORT": "41000"}
    assert make_case(node).release is FORWARD and make_case(node).port == 41000
    assert make_case(node, "native").release is None
    assert make_case(Machine(tmp_path / "plain")).platform == "native"
