"""One training process a run folder.

The lock is a small file that says who holds it. It is free again when its holder is gone, which is decided
without waiting where that can be known:

- same host: the process id no longer belongs to the process that took the lock (its start time and the boot
  are compared, so a reused id is not mistaken for it);
- same SLURM job, other restart count: the job was requeued, so its earlier processes have ended;
- another host: the holder refreshes the file every half minute; after five minutes without, it is taken for
  dead;
- the folder was copied (the file names another inode): a copy is not held by anyone.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path

from hlat.errors import UserError
from hlat.observe.jsonl import replace_file

LOCK_FILE = ".lock"
REFRESH_SECONDS = 30.0
STALE_SECONDS = 300.0


@dataclass(frozen=True)
class Holder:
    """Who holds a lock. `birth` and `boot` tell a reused process id from the original; empty when unknown."""

    host: str
    pid: int
    birth: str
    boot: str
    job: str
    restart: str
    inode: int
    since: str

    @classmethod
    def this_process(cls, folder: Path) -> Holder:
        """The current process as holder of `folder`."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            birth=_birth(os.getpid()),
            boot=_boot(),
            job=os.environ.get("SLURM_JOB_ID", ""),
            restart=os.environ.get("SLURM_RESTART_COUNT", "0"),
            inode=folder.stat().st_ino,
            since=datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
        )


class Lock:
    """The lock on a run folder, held from construction to `release`.

    Raises UserError when a living process holds it, OSError when the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK_FILE
        self._me = Holder.this_process(folder)
        with _one_at_a_time(folder):
            holder = read_holder(self._path)
            if holder is not None and is_alive(holder, self._me, _silence(self._path)):
                raise UserError(
                    f"process {holder.pid} on {holder.host} trains in this folder since {holder.since}",
                    where=str(folder),
                    fix=f"wait for it, choose another run.dir, or delete {self._path} if it is gone",
                )
            self._write()
        self._stop = threading.Event()
        threading.Thread(target=self._refresh, name="run-folder-lock", daemon=True).start()

    def release(self) -> None:
        """Give the folder back; calling it again does nothing."""
        self._stop.set()
        if read_holder(self._path) == self._me:
            self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        replace_file(self._path, json.dumps(asdict(self._me)).encode())

    def _refresh(self) -> None:
        while not self._stop.wait(REFRESH_SECONDS):
            try:
                os.utime(self._path)
            except FileNotFoundError:
                return
            except OSError:
                continue  # a shared file system may be away for a while


def read_holder(path: Path) -> Holder | None:
    """The holder a lock file names; None when there is no file or it is not a lock file."""
    try:
        content = json.loads(path.read_bytes())
        return Holder(**{field.name: content[field.name] for field in fields(Holder)})
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return None


def is_alive(holder: Holder, me: Holder, silence: float) -> bool:
    """Whether the holder may still be training, as `me` sees it `silence` seconds after its last sign."""
    if holder.inode != me.inode:
        return False
    if holder.job and holder.job == me.job and holder.restart != me.restart:
        return False
    if holder.host != me.host:
        return silence < STALE_SECONDS
    if holder.boot != me.boot or holder.pid == me.pid:
        return holder.boot == me.boot and holder.birth == me.birth
    if not _exists(holder.pid):
        return False
    birth = _birth(holder.pid)
    return not birth or not holder.birth or birth == holder.birth


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _stat(pid)[:1] not in (["Z"], ["X"])  # ended, but its parent has not asked yet


def _birth(pid: int) -> str:
    """Start of a process in ticks after boot (field 22 of /proc/pid/stat); empty where there is no /proc."""
    values = _stat(pid)
    return values[19] if len(values) > 19 else ""


def _stat(pid: int) -> list[str]:
    """/proc/pid/stat from its third field, the state; empty where there is none."""
    try:
        return (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return []


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _silence(path: Path) -> float:
    """Seconds since the lock file was refreshed, by the clock of the file system that holds it."""
    probe = path.with_name(f"{LOCK_FILE}.{os.getpid()}.probe")
    try:
        probe.touch()
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")
    finally:
        probe.unlink(missing_ok=True)


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Keep two processes from finding one lock stale at the same moment (as far as the file system can)."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems have no flock
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
