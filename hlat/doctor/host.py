"""Checks of the host: limits, memory, disk, port, clock, names, variables."""

from __future__ import annotations

import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from hlat.backend.neuron.machine import instance_type
from hlat.backend.neuron.profile import check_variables, compile_cache
from hlat.doctor import Case
from hlat.doctor.finding import Finding
from hlat.doctor.machine import Machine
from hlat.errors import UserError
from hlat.host.limits import memory
from hlat.host.programs import cpp_compiler

_FILES = 65535  # NxD's launch scripts
_LIMITS_FILE = "/etc/security/limits.d/99-hlat.conf"
_AGAIN = "log in again afterwards; in a SLURM or container job set it there"
_HUGE_PAGES = 5120  # of 2 MiB: the 10 GiB that containers with EFA usually ask for
_ROOT_COMM_PORT = 48620  # bootstrap of Neuron collectives
_GIB = 2**30
_SHARED = ("nfs", "lustre", "efs", "fuse", "cifs", "beegfs", "gpfs")
_CLOCK_SECONDS = 1.0


def check(machine: Machine, case: Case) -> Iterator[Finding]:
    """Everything about the host."""
    yield _open_files(machine, case)
    if case.neuron:
        yield _locked_memory(machine, case)
        yield _huge_pages(machine)
        yield _shared_memory(machine)
    yield _memory(machine, case)
    if not case.neuron:
        yield _compiler(machine)
    yield from _disk(machine, case)
    yield _port(machine, case)
    if case.neuron:
        yield from _cluster(machine, case)
        yield _variables(machine)
    yield _clock(machine, case)


def _open_files(machine: Machine, case: Case) -> Finding:
    name, wanted = "limits.nofile", _FILES if case.neuron else 1024
    soft, hard = machine.limit("NOFILE")
    if soft >= wanted:
        return Finding(name, "ok", f"open files: {_count(soft)}")
    lines: tuple[str, ...] = (f"ulimit -n {wanted}",)
    if hard < wanted:
        lines = (f"echo '* - nofile {wanted}' | sudo tee -a {_LIMITS_FILE}",)
    status = "fail" if case.neuron and case.nodes > 1 else "warn"
    fact = f"open files: {_count(soft)}, at least {wanted} needed"
    return Finding(name, status, fact, lines, _AGAIN)  # type: ignore[arg-type]


def _locked_memory(machine: Machine, case: Case) -> Finding:
    soft, _ = machine.limit("MEMLOCK")
    if soft == float("inf"):
        return Finding("limits.memlock", "ok", "locked memory: unlimited")
    line = f"echo '* - memlock unlimited' | sudo tee -a {_LIMITS_FILE}"
    status = "fail" if case.nodes > 1 else "warn"
    fact = f"locked memory: {soft / 2**20:,.0f} MiB; EFA registers buffers of any size"
    return Finding("limits.memlock", status, fact, (line,), _AGAIN)  # type: ignore[arg-type]


def _huge_pages(machine: Machine) -> Finding:
    total = _meminfo(machine, "HugePages_Total")
    size = _meminfo(machine, "Hugepagesize") or 2048
    if total:
        return Finding("limits.hugepages", "ok", f"huge pages: {total} of {size // 1024} MiB")
    line = f"sudo sysctl -w vm.nr_hugepages={_HUGE_PAGES}"
    return Finding(
        "limits.hugepages", "warn", "no huge pages reserved; EFA's buffers come from them", (line,)
    )


def _shared_memory(machine: Machine) -> Finding:
    total = machine.size(machine.root / "dev/shm")
    if total is None:
        return Finding("limits.shm", "warn", "no /dev/shm", advice="mount a tmpfs there")
    if total >= 8 * _GIB:
        return Finding("limits.shm", "ok", f"/dev/shm: {total / _GIB:.0f} GiB")
    fact = f"/dev/shm: {total / _GIB:.1f} GiB; collectives on one node go through it"
    line = "sudo mount -o remount,size=50% /dev/shm"
    return Finding(
        "limits.shm", "warn", fact, (line,), "in a container: --shm-size, or an emptyDir of medium Memory"
    )


def _memory(machine: Machine, case: Case) -> Finding:
    found = memory(machine.root)
    if found is None:
        return Finding("limits.memory", "ok", "host memory: not known on this system")
    total, free = found.total / _GIB, found.available / _GIB
    fact = f"host memory: {total:.0f} GiB, {free:.0f} GiB available"
    if found.limited:
        fact += " (the limit of the control group)"
    small = instance_type(machine.root) == "trn1.2xlarge"
    if case.neuron and total < 64 and not small:
        fact += "; compiling graphs for 32 cores needs more"
        return Finding(
            "limits.memory", "warn", fact, advice="a trn1.32xlarge has 512 GiB: raise the container's limit"
        )
    return Finding("limits.memory", "ok" if free > 1 else "warn", fact)


def _meminfo(machine: Machine, key: str) -> int:
    """A figure of /proc/meminfo, in KiB where it has a unit."""
    for line in machine.read("/proc/meminfo").splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    return 0


def _compiler(machine: Machine) -> Finding:
    name = cpp_compiler(machine.environ)
    done = machine.run([name, "--version"])
    if done is None or done.code != 0:
        fact = f"no C++ compiler ({name}): training is not compiled and slower"
        lines = () if machine.environ.get("CXX") else ("sudo apt-get install -y g++ python3-dev",)
        advice = "" if lines else "unset CXX, or let it name a C++ compiler"
        return Finding("compiler", "warn", fact, lines, advice)
    if not (Path(sysconfig.get_path("include")) / "Python.h").exists():
        line = "sudo apt-get install -y python3-dev"
        return Finding("compiler", "warn", "no Python.h: training is not compiled and slower", (line,))
    return Finding("compiler", "ok", done.out.splitlines()[0] if done.out else name)


def _disk(machine: Machine, case: Case) -> Iterator[Finding]:
    yield _folder(machine, "disk.run", "run folder", case.run_dir, 100 if case.neuron else 5)
    if not case.neuron:
        yield _folder(machine, "disk.temporary", "temporary files", Path(tempfile.gettempdir()), 1)
        return
    try:
        where = compile_cache(machine.environ)
    except UserError:
        return  # reported with the variables
    if "://" in where:
        yield Finding("disk.cache", "ok", f"compile cache: {where}")
        return
    found = _folder(machine, "disk.cache", "compile cache", Path(where), 50)
    kind = machine.file_system(Path(where))
    if found.status == "ok" and any(kind.startswith(shared) for shared in _SHARED):
        fact = f"compile cache {where} is on {kind}, where file locks do not hold"
        lines = ("export NEURON_COMPILE_CACHE_URL=/var/tmp/neuron-compile-cache",)
        found = Finding("disk.cache", "fail" if case.nodes > 1 else "warn", fact, lines)
    yield found


def _folder(machine: Machine, check: str, what: str, path: Path, gigabytes: int) -> Finding:
    free = machine.free(path)
    if not machine.writable(path):
        return Finding(
            check, "fail", f"{what} {path} cannot be written", advice="choose another, or its owner"
        )
    fact = f"{what} {path}: {(free or 0) / 1e9:,.0f} GB free"
    if free is None or free >= gigabytes * 1e9:
        return Finding(check, "ok", fact)
    return Finding(
        check, "warn", f"{fact}, {gigabytes} GB advised", advice="make room, or choose another place"
    )


def _port(machine: Machine, case: Case) -> Finding:
    if not 0 < case.port < 65536:
        return Finding(
            "network.port", "fail", f"{case.port} is no port", advice="take one from 1024 to 65535"
        )
    if machine.port_free(case.port):
        return Finding("network.port", "ok", f"port {case.port} is free for the rendezvous")
    fact = f"port {case.port} of the rendezvous is in use"
    advice = "end what listens there (ss -ltnp shows it), or export another MASTER_PORT on all nodes"
    return Finding("network.port", "fail" if case.neuron else "warn", fact, advice=advice)


def _cluster(machine: Machine, case: Case) -> Iterator[Finding]:
    """What several nodes need beside EFA; nothing for one."""
    if case.nodes == 1:
        return
    wanted = [case.port, _ROOT_COMM_PORT]
    kept = machine.read("/proc/sys/net/ipv4/ip_local_reserved_ports")
    low, high = ([int(n) for n in machine.read("/proc/sys/net/ipv4/ip_local_port_range").split()] or [0, 0])[
        :2
    ]
    open_to_others = [port for port in wanted if low <= port <= high and not _covers(kept, port)]
    if open_to_others:
        text = ",".join([*([kept] if kept else []), *map(str, open_to_others)])
        fact = f"ports {', '.join(map(str, open_to_others))} may be taken by any outgoing connection"
        line = f"sudo sysctl -w net.ipv4.ip_local_reserved_ports={text}"
        yield Finding("network.reserved", "warn", fact, (line,))
    else:
        yield Finding("network.reserved", "ok", f"ports {', '.join(map(str, wanted))} are kept for the run")
    name = machine.host_name()
    if len(name) > 63:
        fact = f"host name of {len(name)} characters; collectives start with 63 at most"
        yield Finding("network.name", "fail", fact, advice="give the host a shorter name")
    else:
        yield Finding("network.name", "ok", f"host name {name}")


def _covers(ranges: str, port: int) -> bool:
    """Whether '41000,44000-44010' holds a port."""
    for part in ranges.split(","):
        first, _, last = part.strip().partition("-")
        if first.isdigit() and int(first) <= port <= int(last or first):
            return True
    return False


def _variables(machine: Machine) -> Finding:
    try:
        check_variables(machine.environ)
    except UserError as error:
        lines = () if error.where == "NEURON_CC_FLAGS" else (f"unset {error.where}",)
        return Finding("variables", "fail", f"{error.where}: {error.what}", lines, error.fix)
    return Finding("variables", "ok", "no variable that contradicts every recipe")


def _clock(machine: Machine, case: Case) -> Finding:
    error = machine.clock_error()
    if error is None:
        return Finding("clock", "ok", "synchronisation of the clock is not known on this system")
    if error <= _CLOCK_SECONDS:
        return Finding("clock", "ok", f"clock is synchronised (error below {error * 1e3:,.0f} ms)")
    fact = "clock is not synchronised" if error == float("inf") else f"clock may be wrong by {error:.0f} s"
    if case.nodes == 1 and not case.neuron:
        return Finding("clock", "ok", f"{fact}, which matters only between machines")
    line = "sudo apt-get install -y chrony && sudo systemctl enable --now chrony"
    return Finding("clock", "warn", f"{fact}: logs of several nodes will not agree", (line,))


def _count(limit: float) -> str:
    return "unlimited" if limit == float("inf") else f"{limit:,.0f}"
