"""The job's store listens where the cluster is, and nowhere else."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.elastic.rendezvous import RendezvousParameters

from hlat.backend import interfaces
from hlat.backend.cluster import join
from hlat.backend.interfaces import addresses_of, listen
from hlat.backend.rendezvous import Address, connect_store, read_address, serve
from hlat.errors import UserError
from hlat.supervise.classify import Evidence, classify
from hlat.supervise.rendezvous import create

NAMES = {
    "node-a": ["127.0.1.1"],
    "node-b": ["203.0.113.9"],
    "node-6": ["::1"],
    "node-lo": ["127.0.0.1", "::1"],
}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.getaddrinfo

    def resolve(host: str, port: int, *args: Any, **kwargs: Any) -> Any:
        found = [real(place, port, *args, **kwargs) for place in NAMES.get(host, [host])]
        return [info for infos in found for info in infos]

    monkeypatch.setattr(interfaces.socket, "getaddrinfo", resolve)


def reachable(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def others() -> list[str]:
    """Every other address of this machine: another one of loopback, and those of its interfaces."""
    found = [place[0] for _, name in socket.if_nameindex() for place in addresses_of(name)]
    return ["127.0.0.2", *found]


@pytest.mark.parametrize(
    ("host", "bound"), [("localhost", ""), ("127.0.0.1", ""), ("::1", ""), ("node-6", "::1")]
)
def test_only_the_address_is_served(host: str, bound: str) -> None:
    port = free_port()
    server, address = listen(host, port)
    with server:
        assert address == (bound or address) and reachable(address, port)
        if address == "::1":
            assert host in ("::1", "node-6")
        refused = [other for other in others() if other != address]
        assert refused and not any(reachable(other, port) for other in refused)


def test_a_named_interface_is_served() -> None:
    named = [(name, place[0]) for _, name in socket.if_nameindex() for place in addresses_of(name)]
    for name, address in named:
        if address.startswith(("127.", "::1")):
            continue
        port = free_port()
        server, bound = listen("node-b", port, [name])  # a name that leads elsewhere: address translation
        with server:
            assert bound == addresses_of(name)[0][0] and reachable(bound, port)
            assert not reachable("127.0.0.1", port) and not reachable("::1", port)
        server, bound = listen(address, port, ["none0", name])
        with server:
            assert bound == address and reachable(address, port)


def test_lo_has_an_address() -> None:
    assert addresses_of("lo")[0] == ("127.0.0.1", 0) and addresses_of("none0") == []


@pytest.mark.parametrize(
    ("host", "rest", "words"),
    [
        (
            "node-b",
            (),
            "MASTER_ADDR: node-b (203.0.113.9) is no address of this machine; start rank 0 on that",
        ),
        (
            "node-b",
            (["none0"],),
            "GLOO_SOCKET_IFNAME: none0 has no address; write an interface that has one (lo",
        ),
        (
            "node-a",
            ((), 2),
            "MASTER_ADDR: node-a is 127.0.1.1 here, which no other machine reaches; set MASTER_ADDR",
        ),
        (
            "0.0.0.0",
            (),
            "MASTER_ADDR: 0.0.0.0 stands for every interface; write the address of rank 0's machine",
        ),
        ("::", (), "stands for every interface"),
        ("no-such-host.invalid", (), "MASTER_ADDR: no-such-host.invalid cannot be resolved"),
    ],
)
def test_what_cannot_be_served(host: str, rest: tuple[Any, ...], words: str) -> None:
    with pytest.raises(UserError) as caught:
        listen(host, free_port(), *rest)
    assert words in caught.value.line() and caught.value.fix


def test_a_loopback_address_does_for_one_machine() -> None:
    server, bound = listen("node-a", free_port(), ["eth0"], 1)
    with server:
        assert bound == "127.0.1.1"


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1", "node-lo"])
def test_the_store_can_be_used_and_is_not_open_elsewhere(host: str) -> None:
    port = free_port()
    store, address = serve(Address(0, 2, 0, host, port, False, "0"))
    assert address.bound in ("127.0.0.1", "::1")
    client = connect_store(address, 0.0)
    client.set("key", "value")
    assert store.get("key") == b"value"
    assert not any(reachable(other, port) for other in others() if other != address.bound)


def test_what_launchers_say() -> None:
    given = {"RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "node-a", "MASTER_PORT": "29500"}

    def read(**more: str) -> tuple[tuple[str, ...], int]:
        address = read_address({**given, **more})
        assert address is not None
        return address.interfaces, address.machines

    assert read() == ((), 1)
    assert read(GLOO_SOCKET_IFNAME="eth0, ib0", LOCAL_WORLD_SIZE="2") == (("eth0", "ib0"), 2)
    assert read(LOCAL_WORLD_SIZE="4") == ((), 1)
    assert read(SLURM_STEP_NUM_NODES="8", LOCAL_WORLD_SIZE="4") == ((), 8)
    assert read(SLURM_STEP_NUM_NODES="1", LOCAL_WORLD_SIZE="2") == ((), 2)


def test_a_job_that_would_be_open_everywhere_does_not_start() -> None:
    given = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "0.0.0.0", "MASTER_PORT": str(free_port())}
    with pytest.raises(UserError, match="stands for every interface"):
        join(1, given)


def test_the_supervisors_rendezvous_is_not_open_elsewhere() -> None:
    port = free_port()
    config = {"rank": 0, "timeout": 30}
    handler = create(RendezvousParameters("hlat", f"127.0.0.1:{port}", "run", 1, 1, **config))
    info = handler.next_rendezvous()
    assert handler.use_agent_store and handler.get_backend() == "hlat"
    told = info.bootstrap_store_info
    assert (told.master_addr, told.master_port) == ("127.0.0.1", port) and info.world_size == 1
    info.store.set("key", "value")
    assert handler.next_rendezvous().store.get("key") == b"value"
    assert reachable("127.0.0.1", port)
    assert not any(reachable(other, port) for other in others() if other != "127.0.0.1")


def test_a_port_that_the_supervisor_cannot_have_is_named(tmp_path: Path) -> None:
    """The agent of node 0 ends with one line, which the supervisor learns: a port may be free again later."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        config = {"rank": 0, "timeout": 30}
        handler = create(RendezvousParameters("hlat", f"127.0.0.1:{port}", "run", 1, 2, **config))
        with pytest.raises(UserError, match=f"MASTER_PORT {port}: rank 0 cannot listen.*choose another"):
            handler.next_rendezvous()
        words = f"--nnodes 2 --node-rank 0 --nproc-per-node 1 --master-addr 127.0.0.1 --master-port {port}"
        command = [sys.executable, "-m", "hlat.supervise.agent", str(tmp_path / "result.json")]
        command += [*words.split(), "--no-python", "true"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    line = json.loads((tmp_path / "result.json").read_text())["refused"]
    assert done.stderr.splitlines() == [line] and "cannot listen: Address already in use" in line
    verdict = classify(Evidence(text=line))
    assert (verdict.rule, verdict.action) == ("late-start", "restart")
