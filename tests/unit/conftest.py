"""Shared by the unit tests: machines for `hlat doctor` whose facts are set by the test."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType

import pytest

from hlat.backend.neuron.release import PRIMARY
from hlat.doctor import software
from hlat.doctor.machine import Machine, Output, Package
from hlat.storage.urls import KINDS, Kind

KINDS["memory"] = Kind("memory://folder")  # fsspec's own, for tests alone

UNLIMITED = (float("inf"), float("inf"))
PORTS = "/proc/sys/net/ipv4/ip_local_"


class FakeMachine(Machine):
    """Files lie in a folder, other facts are attributes; a healthy machine to begin with."""

    def __init__(self, root: Path) -> None:
        super().__init__(root, {"PATH": os.environ["PATH"]})
        self.python = (3, 11, 9)
        self.commands: dict[str, Output] = {}
        self.packages = {name: Package("1.0") for name in software.REQUIRED} | {"torch": Package("2.13.0")}
        self.limits = {"NOFILE": (65535.0, 65535.0), "MEMLOCK": UNLIMITED}
        self.free_bytes: int | None = 10**12
        self.readable = self.port = True
        self.clock: float | None = 0.01
        self.kind, self.name = "ext4", "node-1"

    def write(self, path: str, text: str = "") -> None:
        file = self.root / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def run(
        self, command: Sequence[str], timeout: float = 20, environ: Mapping[str, str] | None = None
    ) -> Output | None:
        found = (value for key, value in self.commands.items() if key in " ".join(command))
        return next(found, None)

    def package(self, name: str) -> Package | None:
        return self.packages.get(name)

    def limit(self, name: str) -> tuple[float, float]:
        return self.limits[name]

    def free(self, path: Path) -> int | None:
        return self.free_bytes

    def size(self, path: Path) -> int | None:
        return self.free_bytes

    def writable(self, path: Path) -> bool:
        return self.readable

    def file_system(self, path: Path) -> str:
        return self.kind

    def port_free(self, port: int) -> bool:
        return self.port

    def clock_error(self) -> float | None:
        return self.clock

    def host_name(self) -> str:
        return self.name


@pytest.fixture
def fake_host(tmp_path: Path) -> FakeMachine:
    """A plain machine."""
    fake = FakeMachine(tmp_path)
    fake.write("/proc/meminfo", "MemTotal: 33554432 kB\nMemAvailable: 16777216 kB\nHugepagesize: 2048 kB\n")
    fake.write("/dev/shm/empty")
    fake.write("/etc/os-release", 'ID=ubuntu\nVERSION_CODENAME="jammy"\n')
    fake.commands["g++ --version"] = Output(0, "g++ 12.2\n")
    fake.commands["hlat.doctor.probe"] = Output(0, '{"right": true, "seconds": 0.001}\n')
    return fake


@pytest.fixture
def fake_node(fake_host: FakeMachine) -> FakeMachine:
    """A healthy trn1.32xlarge."""
    for index in range(16):
        fake_host.write(f"/dev/neuron{index}")
        for counter in ("sram_ecc_uncorrected", "mem_ecc_uncorrected"):
            folder = f"/sys/devices/virtual/neuron_device/neuron{index}/stats/hardware"
            fake_host.write(f"{folder}/{counter}", "0\n")
    for index in range(8):
        fake_host.write(f"/sys/class/infiniband/rdmap{index}s27/device/vendor", "0x1d0f\n")
    fake_host.write("/sys/devices/virtual/dmi/id/product_name", "trn1.32xlarge\n")
    fake_host.write("/sys/module/neuron/version", "2.31.7.0\n")  # newer than the rest: fine
    fake_host.write(
        "/proc/meminfo", "MemTotal: 536870912 kB\nMemAvailable: 500000000 kB\nHugePages_Total: 5120\n"
    )
    fake_host.write(f"{PORTS}reserved_ports", "29500,48620\n")
    fake_host.write(f"{PORTS}port_range", "32768 60999\n")
    for name, version in PRIMARY.system.items():
        fake_host.commands[f"{name}"] = Output(0, f"installed {version}-1a2b")
    listed = [{"neuron_device": i, "nc_count": 2, "neuron_processes": []} for i in range(16)]
    fake_host.commands["neuron-ls --json"] = Output(0, json.dumps(listed))
    fake_host.commands["fi_info"] = Output(0, "provider: efa\n    fabric: efa\n")
    fake_host.commands["nxd.probe"] = Output(0, '{"right": true, "seconds": 0.2}\n')
    fake_host.packages |= {name: Package(f"{version}.0") for name, version in PRIMARY.packages.items()}
    return fake_host


@pytest.fixture(scope="session")
def launch_stubs(load_module) -> ModuleType:
    """Stand-ins for a cluster's commands."""
    return load_module(Path(__file__).with_name("launch_stubs.py"))


@pytest.fixture
def stub_cluster(launch_stubs: ModuleType, tmp_path: Path, monkeypatch):
    """Stand-ins for SLURM's commands; the test's own calls find them too."""
    made = launch_stubs.Cluster(tmp_path / "cluster")
    for name in ("PATH", "RECORD"):
        monkeypatch.setenv(name, made.environ[name])
    return made


@pytest.fixture
def small_recipe(launch_stubs: ModuleType, tmp_path: Path, monkeypatch) -> str:
    """A small recipe in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(launch_stubs.RECIPE)
    (tmp_path / "text").write_text("what is trained on\n")
    return "small.yaml"


@pytest.fixture
def byte_level_files(tmp_path: Path) -> list[Path]:
    """The files of a byte-level tokenizer with one token a byte, and <|endoftext|> as EOS."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|endoftext|>", normalized=False)])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|endoftext|>"}')
    return [tmp_path / "tokenizer.json", tmp_path / "tokenizer_config.json"]
