"""Processes of this machine, by /proc: who descends from whom, who is stopped, who compiles."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# Names of programs that compile for a rank: a main thread that waits for one of them does not hang.
COMPILERS = frozenset(
    ("neuronx-cc", "neuron-cc", "neuronx-cc-backend", "walrus_driver", "hlo2penguin", "hlo-opt", "birsim")
    + ("tensorizer", "penguin", "cc1plus", "cc1", "c++", "g++", "gcc", "clang", "clang++", "ld")
    + ("nvcc", "cicc", "ptxas", "fatbinary", "ninja")
)
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Process:
    """state: as /proc has it: R, S, D, T (stopped), Z. name: of the program, at most 15 letters."""

    pid: int
    parent: int
    state: str
    name: str


def adopt_orphans() -> None:
    """Make this process the parent of every descendant whose own parent ends, so that none gets lost."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def every() -> dict[int, Process]:
    """All processes that can be seen, by id."""
    found = {}
    for entry in Path("/proc").iterdir() if Path("/proc").is_dir() else ():
        if entry.name.isdecimal() and (process := look(int(entry.name))):
            found[process.pid] = process
    return found


def look(pid: int) -> Process | None:
    """One process; None when there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    head, _, tail = text.rpartition(")")
    state, parent = tail.split()[:2]
    return Process(pid, int(parent), state, head.partition("(")[2])


def descendants(pid: int) -> list[Process]:
    """Children, their children and so on; zombies left out."""
    children: dict[int, list[Process]] = {}
    for process in every().values():
        children.setdefault(process.parent, []).append(process)
    found, waiting = [], [pid]
    while waiting:
        for child in children.get(waiting.pop(), []):
            waiting.append(child.pid)
            if child.state not in "ZX":
                found.append(child)
    return found


def halted(pid: int) -> bool:
    """Whether a process is stopped by a signal (or held by a debugger)."""
    process = look(pid)
    return process is not None and process.state in "Tt"


def compiles(pid: int) -> bool:
    """Whether a compiler works for this process."""
    return any(_program(process) in COMPILERS for process in descendants(pid))


def _program(process: Process) -> str:
    """The name of the program; of a script, that of the script."""
    if process.name in COMPILERS:
        return process.name
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{process.pid}/cmdline").read_bytes().split(b"\0")[:2]
        for word in words:
            name = os.path.basename(word.decode(errors="replace"))
            if name in COMPILERS:
                return name
    return process.name


def send(pids: Iterable[int], number: int) -> None:
    """Send a signal to those that are there."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def reap(but: int = 0) -> None:
    """Let go of ended children that nobody else waits for; `but` is one that somebody does."""
    me = os.getpid()
    for process in every().values():
        if process.parent == me and process.state == "Z" and process.pid != but:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(process.pid, os.WNOHANG)


def end_all(but: int = 0, seconds: float = 10.0) -> list[Process]:
    """Kill every descendant of this process, stopped ones too. Returns those that were there at first.

    but: a child whose status somebody else waits for; it is killed like the others.
    """
    first = left = descendants(os.getpid())
    deadline = time.monotonic() + seconds
    while left and time.monotonic() < deadline:
        send([process.pid for process in left], signal.SIGKILL)
        time.sleep(0.02)
        left = descendants(os.getpid())
    reap(but)
    return first
