"""How many cores and how much memory this process may use: affinity, and the limits of its control groups.

A container, or a job of SLURM with cgroups, sees every core and all memory of its machine in /proc. What it
gets is in its control group and in those around it, of which the tightest holds. Sources: the kernel's
Documentation/admin-guide/cgroup-v2.rst (cpu.max, memory.max), scheduler/sched-bwc.rst (cpu.cfs_quota_us) and
cgroup-v1/memory.rst (memory.limit_in_bytes).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_ROOT = Path("/")
_V2 = "cgroup2"
_NO_LIMIT = 1 << 62  # version 1 writes the largest multiple of a page where there is none
_ESCAPED = re.compile(r"\\([0-7]{3})")  # how the kernel writes a space in a path


def cores(root: Path = _ROOT) -> int:
    """Cores this process may keep busy, 1 or more: those of its affinity, at most the whole cores of the CPU
    quota. More threads than that would be stopped by the kernel for a part of every period.
    """
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota(root)
    return own if quota is None else max(1, min(own, int(quota)))


def cpu_quota(root: Path = _ROOT) -> float | None:
    """The CPU quota in cores, the least of the control groups around this process; None without one."""
    quotas = [quota for group in _groups(root, "cpu") if (quota := group.cpu()) is not None]
    return min(quotas, default=None)


@dataclass(frozen=True)
class Memory:
    """Bytes: total, all that this process can ever have; available, without taking it from another.

    limited: whether a control group says so rather than the machine's size.
    """

    total: int
    available: int
    limited: bool = False


def memory(root: Path = _ROOT) -> Memory | None:
    """What the machine and the control groups around this process leave it; None where neither is known."""
    found = _machine_memory(root)
    for group in _groups(root, "memory"):
        limit = group.memory_limit()
        if limit is None or limit >= _NO_LIMIT:
            continue
        free = max(0, limit - group.memory_used())
        if found is None:
            found = Memory(limit, free, limited=True)
        else:
            tighter = limit < found.total
            found = Memory(min(limit, found.total), min(free, found.available), found.limited or tighter)
    return found


@dataclass(frozen=True)
class _Group:
    """The folder of a control group, with the files of version 1 or 2."""

    folder: Path
    v2: bool

    def cpu(self) -> float | None:
        if self.v2:
            quota, _, period = self._read("cpu.max").partition(" ")
        else:
            quota, period = self._read("cpu.cfs_quota_us"), self._read("cpu.cfs_period_us")
        try:
            cores = int(quota) / int(period)  # not "max", not -1
        except (ValueError, ZeroDivisionError):
            return None
        return cores if cores > 0 else None

    def memory_limit(self) -> int | None:
        return _integer(self._read("memory.max" if self.v2 else "memory.limit_in_bytes"))

    def memory_used(self) -> int:
        """Without pages of files that the kernel gives up before it runs out."""
        used = _integer(self._read("memory.current" if self.v2 else "memory.usage_in_bytes")) or 0
        name = "inactive_file" if self.v2 else "total_inactive_file"
        for line in self._read("memory.stat").splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                used -= _integer(value) or 0
        return max(0, used)

    def _read(self, name: str) -> str:
        with contextlib.suppress(OSError, ValueError):
            return (self.folder / name).read_text(encoding="utf-8", errors="replace").strip()
        return ""


def _groups(root: Path, controller: str) -> Iterator[_Group]:
    """The control groups of this process in which a controller may have limits, each with those around it as
    far as this container sees them.
    """
    paths = _own_paths(root, controller)
    for v2, path in paths.items():
        place = _place(_mounts(root, controller, v2), path)
        if place is None:
            continue
        top, inside = place
        for part in (inside, *inside.parents):
            yield _Group(root / top.lstrip("/") / part, v2)


def _own_paths(root: Path, controller: str) -> dict[bool, str]:
    """Path of this process's group, in version 2 (True) and in version 1's hierarchy of the controller."""
    found = {}
    for line in _lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:
            found[True] = path
        elif controller in names.split(","):
            found[False] = path
    return found


def _mounts(root: Path, controller: str, v2: bool) -> list[tuple[str, str]]:
    """(group at the top, mount point) of each mount of version 2, or of version 1's hierarchy of a
    controller.
    """
    found = []
    for line in _lines(root / "proc/self/mountinfo"):
        first, _, last = line.partition(" - ")
        fields, kind = first.split(), last.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        if (v2 and kind[0] == _V2) or (not v2 and kind[0] == "cgroup" and controller in kind[2].split(",")):
            found.append((_plain(fields[3]), _plain(fields[4])))
    return found


def _place(mounts: list[tuple[str, str]], path: str) -> tuple[str, Path] | None:
    """Where a group lies: a mount point and a path below it. A group that no mount shows is that at the top
    of the first one: a container sees its own there, under whatever name.
    """
    for top, point in mounts:
        if Path(path).is_relative_to(top):
            return point, Path(path).relative_to(top)
    return (mounts[0][1], Path()) if mounts else None


def _machine_memory(root: Path) -> Memory | None:
    facts = {}
    for line in _lines(root / "proc/meminfo"):
        name, _, value = line.partition(":")
        facts[name] = 1024 * (_integer(value.split()[0]) or 0) if value.split() else 0
    if facts.get("MemTotal"):
        return Memory(facts["MemTotal"], facts.get("MemAvailable", facts["MemTotal"]))
    if root == _ROOT:
        with contextlib.suppress(AttributeError, OSError, ValueError):
            total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            return Memory(total, total)
    return None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []


def _integer(text: str) -> int | None:
    return int(text) if text.isascii() and text.isdecimal() else None


def _plain(path: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 8)), path)
