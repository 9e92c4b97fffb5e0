"""Which process is which: what tells a process from another one of the same number, here or elsewhere.

A process id means something only in its PID namespace (a container has one of its own), and only until it is
used again; `/proc/<pid>/stat` has the start time that tells two users of a number apart, in ticks since boot.
"""

from __future__ import annotations

import os
from pathlib import Path


def boot() -> str:
    """A random text that this machine has had since it booted; empty where the system does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def namespace() -> str:
    """This process's PID namespace, as `pid:[4026531836]`; empty where the system does not say. The first one
    of every machine has the same name: compare the boot as well.
    """
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def space() -> str:
    """What makes process ids comparable: this boot and this container's numbering; empty where unknown."""
    names = boot(), namespace()
    return " ".join(names) if all(names) else ""


def look(pid: int) -> tuple[str, str]:
    """State letter and start time of a process here (fields 3 and 22 of /proc/pid/stat); "" and "" if there
    is none, "?" and "" if there is one of which nothing is known.
    """
    try:
        fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
        return fields[0], fields[19]
    except (OSError, IndexError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return "", ""
    except OSError:
        pass  # it belongs to somebody else: it lives
    return "?", ""


def birth(pid: int) -> str:
    """Start time of a process here, in ticks since boot; empty when there is none or it is not known."""
    return look(pid)[1]


def runs(pid: int, born: str) -> bool:
    """Whether the process of this number that started at `born` (empty: unknown) has not ended yet. One that
    has ended, but whose parent has not asked, counts as ended.
    """
    state, now = look(pid)
    return state not in ("", "Z", "X") and (not now or not born or now == born)
