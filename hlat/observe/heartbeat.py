"""A rank's heartbeat under `hlat supervise`: one small file on its own machine, rewritten twice a second.

The supervisor there reads it: where the rank is, since when, and how long a step takes. It lies in a folder
of the machine (not of the run), so that a slow or full disk says nothing about the rank, and is rewritten
in its place, for which a full disk has room. Times are CLOCK_MONOTONIC, which all processes of a machine
share.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FOLDER = "HLAT_HEARTBEATS"  # variable that names the folder; set by the supervisor
INTERVAL = 0.5
PARENT = "HLAT_PARENT"  # variable that names the process with which a run ends; set by a sweep
STACKS_SIGNAL = signal.SIGUSR2
FIRST_STEP, STEP = "first step", "training"  # phases of the loop; the first may compile
_PR_SET_PDEATHSIG = 1
_UNFINISHED = ".unfinished"
SLOT = 8192  # bytes of the file: a heartbeat, blanks, and a checksum at the end
_SUM = 10


@dataclass(frozen=True)
class Heartbeat:
    """What a rank says of itself.

    step, phase: where its main thread is. began: when it came there; stamp: when this was written, both in
    monotonic seconds. first: the first step that this process trains, 0 before it. patient: whether the phase
    may last long by its nature. pace: seconds of the slowest of the last steps, -1 while too few are known.
    where, waiting: innermost line of HLAT, and whether it waits for other ranks. spent: seconds by phase
    until `stamp`. rewinds, back_to: how often it went back in the run, and to which step the last time.
    """

    rank: int
    pid: int
    step: int
    phase: str
    began: float
    stamp: float
    first: int = 0
    patient: bool = False
    pace: float = -1.0
    where: str = ""
    waiting: bool = False
    spent: dict[str, float] = field(default_factory=dict)
    rewinds: int = 0
    back_to: int = 0


class Pace:
    """Seconds by phase, and of the last steps. `begin` belongs to one thread; others only read."""

    def __init__(self) -> None:
        self.first = self.rewinds = self.back_to = self._last = 0
        self._state: tuple[tuple[int, str, float], dict[str, float]] = ((0, "start", time.monotonic()), {})
        self.window(1)

    def window(self, steps: int) -> None:
        """How many steps may be queued before one waits for them all (`log.every`): the longest step is known
        after two such windows.
        """
        self._enough = 2 * steps
        self._recent: deque[float] = deque(maxlen=max(64, 4 * steps))

    def begin(self, step: int, phase: str) -> None:
        """The phase before ends, this one begins."""
        now = time.monotonic()
        (number, before, began), spent = self._state
        if (number, before) == (step, phase):
            return
        if before == STEP:
            self._recent.append(now - began)
        if phase == FIRST_STEP:
            self.first = step
        if phase == STEP:
            if step < self._last:
                self.rewinds, self.back_to = self.rewinds + 1, step
            self._last = step
        # In one assignment, for the thread that reads it.
        self._state = ((step, phase, now), {**spent, before: spent.get(before, 0.0) + now - began})

    @property
    def now(self) -> tuple[int, str, float]:
        """Step, phase, and when it began."""
        return self._state[0]

    def look(self, now: float) -> dict[str, Any]:
        """The same as values of a `Heartbeat`, and seconds by phase until `now`."""
        (step, phase, began), spent = self._state
        spent = {**spent, phase: spent.get(phase, 0.0) + now - began}
        back = {"rewinds": self.rewinds, "back_to": self.back_to}
        return {"step": step, "phase": phase, "began": began, "first": self.first, "spent": spent, **back}

    def slowest(self) -> float:
        """Seconds of the slowest of the recent steps but one, which may have compiled; -1 while too few are
        known. On an accelerator most steps are only queued, hence not the mean.
        """
        recent = sorted(self._recent)
        return recent[-2] if len(recent) >= self._enough else -1.0


class Pulse:
    """The thread that writes the file.

    Args:
        folder: of the heartbeats on this machine.
        rank: this process.

    Attributes:
        pace: where the main thread is; whoever tells it has this one.
        look: gives the other values of a `Heartbeat` at a time; may be replaced by one that knows more.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path, self.rank, self.pace = heartbeat_file(folder, rank), rank, Pace()
        self.look: Callable[[float], Mapping[str, Any]] = self.pace.look
        self._mark = folder / f"rank-{rank:05}{_UNFINISHED}"
        with contextlib.suppress(OSError):
            self._mark.touch()
        threading.Thread(target=self._run, name="heartbeat", daemon=True).start()

    def finish(self) -> None:
        """This rank has done all it had to do: its mark goes away (see `unfinished`)."""
        with contextlib.suppress(OSError):
            self._mark.unlink()

    def write(self) -> None:
        """Write it now. Raises OSError."""
        now = time.monotonic()
        beat = Heartbeat(self.rank, os.getpid(), stamp=now, **self.look(now))
        data = encode(beat)
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            if os.pwrite(handle, data, 0) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        finally:
            os.close(handle)

    def _run(self) -> None:
        told = False
        while True:
            try:
                self.write()
            except OSError as error:
                if not told:  # the supervisor finds it out by itself; who reads this log does not
                    told = True
                    with contextlib.suppress(OSError, ValueError):
                        sys.stderr.write(f"hlat: rank {self.rank}: no heartbeat can be written: {error}\n")
            time.sleep(INTERVAL)


def heartbeat_file(folder: Path, rank: int) -> Path:
    """Where a rank writes its heartbeat."""
    return folder / f"rank-{rank:05}.json"


def encode(beat: Heartbeat) -> bytes:
    """A heartbeat as its file holds it: whoever reads while it is written sees that by its checksum."""
    data = json.dumps(asdict(beat)).encode()
    if len(data) > SLOT - _SUM:
        data = json.dumps({**asdict(beat), "where": beat.where[:200], "spent": {}}).encode()
    return data.ljust(SLOT - _SUM) + f"{zlib.crc32(data):0{_SUM}d}".encode()


def decode(data: bytes) -> Heartbeat:
    """The heartbeat in a file. Raises ValueError for one that is being written, or is none."""
    text = data[:-_SUM].rstrip(b" ")
    if not data[-_SUM:].isdigit() or int(data[-_SUM:]) != zlib.crc32(text):
        raise ValueError("no heartbeat")
    return Heartbeat(**json.loads(text))


def read_all(folder: Path) -> dict[int, Heartbeat]:
    """The newest heartbeat of each rank on this machine; what cannot be read is left out."""
    found = {}
    for path in sorted(folder.glob("rank-*.json")):
        for _ in range(2):  # the first may have met it half written
            with contextlib.suppress(OSError, ValueError, TypeError):
                beat = decode(path.read_bytes())
                found[beat.rank] = beat
                break
    return found


def unfinished(folder: Path) -> list[int]:
    """The ranks on this machine that began and did not say that they are done, whatever their exit status. A
    mark that is taken away says so, which a full disk allows too.
    """
    names = (path.name for path in sorted(folder.glob(f"rank-*{_UNFINISHED}")))
    return [int(name.removeprefix("rank-").removesuffix(_UNFINISHED)) for name in names]


def stacks_file(folder: Path, rank: int) -> Path:
    """Where a rank writes its stacks when it is sent `STACKS_SIGNAL`."""
    return folder / f"stacks-rank-{rank:05}.txt"


def supervised(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The folder of heartbeats; None without a supervisor."""
    return Path(environ[FOLDER]) if environ.get(FOLDER) else None


def prepare(environ: MutableMapping[str, str] = os.environ) -> None:
    """Call first in a rank that a launcher started: it dies with its launcher, whose workers live in sessions
    of their own; and a supervisor can ask for its stacks, even when Python itself hangs. A run of a sweep
    saves and stops when the sweep is gone.
    """
    if environ.get("TORCHELASTIC_RUN_ID"):
        die_with_parent(signal.SIGKILL)
    if parent := environ.pop(PARENT, None):
        die_with_parent(signal.SIGTERM)
        if parent != str(os.getppid()):  # gone before this process could ask for its signal
            os.kill(os.getpid(), signal.SIGTERM)
    folder = supervised(environ)
    if folder is not None:
        with contextlib.suppress(OSError, ValueError):
            file = stacks_file(folder, int(environ.get("RANK", "0"))).open("w", encoding="utf-8")
            faulthandler.register(STACKS_SIGNAL, file=file, all_threads=True)


def die_with_parent(number: int) -> None:
    """Let the kernel send this process a signal when its parent ends (Linux; elsewhere nothing happens)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0)
