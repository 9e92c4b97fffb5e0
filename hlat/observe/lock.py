"""One training process a run folder.

The lock is a small file that names its holder by a random token. A process that finds one takes it for dead

- at once, where the two can be compared (same boot, same PID namespace, known start time) and the holder has
  ended, and where SLURM has requeued the holder's job: same job, fewer restarts;
- otherwise when it was not refreshed for five minutes. Its age is measured against a file made beside it, so
  the clocks of two machines do not matter. The holder refreshes it every half minute.

A holder that was stopped or cut off for so long may come back. So it asks the file again (`confirm`) before
whatever it writes, and stops for good when another token stands there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path

from hlat import process
from hlat.errors import FolderLost, UserError
from hlat.observe.claim import Claim
from hlat.observe.place import Place

LOCK_FILE = ".lock"
_HOOK = "HLAT_TEST_LOCK_SECONDS"  # tests cannot wait for so long


def _stale_seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (seconds := float(text)) < float("inf"):
            return seconds
    raise UserError(f"{text!r} is no number of seconds", where=_HOOK, fix="unset it: it is for tests")


STALE_SECONDS = _stale_seconds(os.environ.get(_HOOK) or "300")
REFRESH_SECONDS = STALE_SECONDS / 10
_POLL = min(1.0, STALE_SECONDS / 20)


@dataclass(frozen=True)
class Holder:
    """Who holds a lock.

    Attributes:
        host, pid: for people.
        birth, boot: start time of the process and boot of its machine; empty when unknown.
        job, restart: SLURM's number of its job, and how often that was requeued.
        since: when it took the lock, for people.
        inode: of the folder; former versions of HLAT take a lock without it for damaged, so it stays.
        token: random; empty in a lock that a former version wrote, as are the two below.
        namespace: of its process id.
        path: of the folder, as the holder sees it.
    """

    host: str
    pid: int
    birth: str
    boot: str
    job: str
    restart: str
    since: str
    inode: int = 0
    token: str = ""
    namespace: str = ""
    path: str = ""

    @classmethod
    def this_process(cls, folder: Path) -> Holder:
        """The current process as holder of `folder`, with a new token."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            birth=process.birth(os.getpid()),
            boot=process.boot(),
            job=os.environ.get("SLURM_JOB_ID", ""),
            restart=os.environ.get("SLURM_RESTART_COUNT", "0"),
            since=datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
            inode=folder.stat().st_ino,
            token=secrets.token_hex(16),
            namespace=process.namespace(),
            path=str(folder.resolve()),
        )


class Lock(Claim):
    """The lock on a run folder, held from construction to `release`.

    Where it cannot be known at once whether the holder lives, this waits until the lock is refreshed or old.

    Args:
        folder: an existing one.
        say: receives a line before such a wait.

    Attributes:
        name: the beginning of the token, for rows.
        latest: token of the process that has last begun to train in the folder; None: there is no record. A
            lock that was deleted is put back only if that is this process.

    Raises:
        UserError: a living process holds it.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda line: None) -> None:
        self._path = folder / LOCK_FILE
        self._me = Holder.this_process(folder)
        self._content = json.dumps(asdict(self._me)).encode()
        self.token, self.name = self._me.token, self._me.token[:8]
        self.latest: Callable[[], str] | None = None
        self._installing = threading.Lock()
        self._acquire(folder, say)
        self._place = Place(folder)
        self._stop = threading.Event()
        threading.Thread(target=self._refresh, name="run-folder-lock", daemon=True).start()

    def confirm(self) -> None:
        """See `Claim`. A lock that was deleted or damaged is put back, if nobody else has begun to train."""
        if self._stop.is_set():  # an upload, say, whose end nobody waits for any more
            what = "this process has given the run folder back, and writes nothing more"
            raise FolderLost(what, where=str(self._path.parent))
        content = self._read()
        if content != self._content and (content is None or _parse(content) is None):
            self._put_back(content)
            content = self._read()
        if content == self._content:
            return
        change = self._place.change()
        if not self._path.parent.is_dir():  # moved away, or its disk is: nobody else has it
            why = f"the run folder {change}" if change else os.strerror(errno.ENOENT)
            raise FileNotFoundError(errno.ENOENT, why, str(self._path.parent))
        if change:
            self._refuse(change)
        holder = None if content is None else _parse(content)
        who = f"process {holder.pid} on {holder.host}" if holder else "another process"
        when = f" at {holder.since}" if holder else ""
        raise FolderLost(
            f"{who} has taken the run folder over{when}, as this one was silent for too long or its lock was "
            "deleted; it writes nothing more",
            where=str(self._path.parent),
            fix="do not start it again while the other one trains",
        )

    def check_place(self) -> None:
        """See `Claim`."""
        if change := self._place.change():
            self._refuse(change)

    def _refuse(self, change: str) -> None:
        instead = ", and another folder is in its place" if self._path.parent.exists() else ""
        raise FolderLost(
            f"the run folder {change}{instead} while the run trains; this process writes nothing more, and "
            "what it has not saved is lost",
            where=str(self._path.parent),
            fix="put it back, or name its new place by run.dir, and start again",
        )

    def holds(self) -> bool:
        """Whether `confirm` passes."""
        try:
            self.confirm()
        except (FolderLost, OSError):
            return False
        return True

    def release(self) -> None:
        """Give the folder back; calling it again does nothing."""
        with self._installing:  # nothing puts it back from here on
            self._stop.set()
        try:
            if self._read() == self._content:
                self._take_away(self._content)
        finally:
            self._place.close()

    def _acquire(self, folder: Path, say: Callable[[str], None]) -> None:
        first: tuple[bytes | None, float] | None = None
        while True:
            with _one_at_a_time(folder):
                content = self._read()
                holder = None if content is None else _parse(content)
                changed, silence = _age(self._path, self.token)
                alive: bool | None = False
                if holder is not None and not _is_copy(holder, self._me, folder):
                    alive = judge(holder, self._me, silence)
                if alive is False and self._install(content):
                    return
            if alive is False:
                continue  # another process was faster: look again
            assert holder is not None
            if alive or first not in (None, (content, changed)):
                raise UserError(
                    f"process {holder.pid} on {holder.host} trains in this folder since {holder.since}",
                    where=str(folder),
                    fix=f"wait for it, choose another run.dir, or delete {self._path} if it is gone",
                )
            if first is None:
                first = content, changed
                say(
                    f"process {holder.pid} on {holder.host} has the lock of {folder} and cannot be seen "
                    f"from here: waiting up to {STALE_SECONDS - abs(silence):.0f} s for a sign of it"
                )
            time.sleep(_POLL)

    def _install(self, former: bytes | None) -> bool:
        """Make the lock this process's, in place of one of that content. Returns False when another one was
        faster.
        """
        own = self._path.with_name(f"{LOCK_FILE}.{self.token}")
        try:
            own.write_bytes(self._content)
            if former is not None and not self._take_away(former):
                return False
            try:
                os.link(own, self._path)  # fails where there is one, unlike a rename
            except FileExistsError:
                pass
            except OSError:  # a file system without hard links
                if not self._path.exists():
                    os.rename(own, self._path)
        finally:
            own.unlink(missing_ok=True)
        return self._read() == self._content

    def _take_away(self, content: bytes) -> bool:
        """Remove the lock if it has this content. Moved aside first, it is this process's to look at."""
        aside = self._path.with_name(f"{LOCK_FILE}.{self.token}.former")
        try:
            os.rename(self._path, aside)
        except FileNotFoundError:
            return True
        try:
            if aside.read_bytes() == content:
                return True
            with contextlib.suppress(OSError):  # somebody has taken it in the meantime: give it back
                os.link(aside, self._path)
            return False
        finally:
            aside.unlink(missing_ok=True)

    def _put_back(self, content: bytes | None) -> None:
        with self._installing:  # the two threads use one name for the new file
            if (
                self._stop.is_set()
                or self._place.change()
                or self._read() != content
                or not self._is_latest()
                or not self._install(content)
            ):
                return
            if not self._is_latest():  # it was stopped here while another process began, trained and ended
                self._take_away(self._content)

    def _is_latest(self) -> bool:
        return self.latest is None or self.latest() == self.token

    def _read(self) -> bytes | None:
        """What the file holds, by a new open(): that makes a network file system look again."""
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            if self._path.is_symlink():  # to nothing: there is a file of that name, and none can be made
                raise
            return None

    def _refresh(self) -> None:
        """Touch the file, as long as it is this process's own. Whoever writes finds out when it is not."""
        while not self._stop.wait(REFRESH_SECONDS):
            try:
                with self._path.open("rb") as file:
                    content = file.read()
                    if content == self._content:
                        os.utime(file.fileno())  # of this very file, even if another one is there by now
            except FileNotFoundError:
                with contextlib.suppress(OSError):
                    self._put_back(None)
            except OSError:
                continue  # a shared file system may be away for a while


def read_holder(path: Path) -> Holder | None:
    """The holder a lock file names; None when there is no file or it is not a lock file."""
    try:
        return _parse(path.read_bytes())
    except FileNotFoundError:
        return None


def _parse(content: bytes) -> Holder | None:
    try:
        found = json.loads(content)
        holder = Holder(**{field.name: found[field.name] for field in fields(Holder) if field.name in found})
    except (ValueError, TypeError, RecursionError):
        return None
    known = {field.name: getattr(holder, field.name) for field in fields(Holder)}
    typed = all(type(value) is (int if name in ("pid", "inode") else str) for name, value in known.items())
    return holder if typed and 0 < holder.pid < 1 << 31 else None


def judge(holder: Holder, me: Holder, silence: float) -> bool | None:
    """Whether the holder lives, as `me` sees it `silence` seconds after the lock was refreshed; None: it may,
    for now.
    """
    if holder.job and holder.job == me.job and _count(holder.restart) < _count(me.restart):
        return False
    old = abs(silence) >= STALE_SECONDS  # one from the future was refreshed by a clock that was put back
    if _comparable(holder, me):
        return not old and process.runs(holder.pid, holder.birth)
    return False if old else None


def _comparable(holder: Holder, me: Holder) -> bool:
    """Whether the holder's process id and start time mean here what they mean there."""
    return bool(holder.boot and holder.birth) and (holder.boot, holder.namespace) == (me.boot, me.namespace)


def _count(restart: str) -> int:
    return int(restart) if restart.isdecimal() else 0


def _is_copy(holder: Holder, me: Holder, folder: Path) -> bool:
    """Whether the lock was copied with its folder: the holder's own is still where it took it, in a folder
    that is not this one. Inode numbers do not tell that, as they may differ from mount to mount, so a file
    made here is looked for there. On another machine the same name may be another folder: age decides.
    """
    original = Path(holder.path)
    if not _comparable(holder, me) or holder.path == me.path or not original.is_absolute():
        return False
    with contextlib.suppress(OSError, ValueError):
        there = read_holder(original / LOCK_FILE)
        if there is not None and there.token == holder.token:
            with _probe(folder, me.token) as probe:
                return not (original / probe.name).exists()
    return False


@contextlib.contextmanager
def _probe(folder: Path, token: str) -> Iterator[Path]:
    """A new empty file in the folder, inside."""
    probe = folder / f"{LOCK_FILE}.{token}.probe"
    try:
        probe.touch()
        yield probe
    finally:
        probe.unlink(missing_ok=True)


def _age(path: Path, token: str) -> tuple[float, float]:
    """When the lock file was refreshed, and how many seconds ago, by the clock of the file system that holds
    it. Without a file it was never.
    """
    with _probe(path.parent, token) as probe:
        try:
            changed = path.stat().st_mtime
        except FileNotFoundError:
            return 0.0, float("inf")
        return changed, probe.stat().st_mtime - changed


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Keep two processes from finding one lock stale at the same moment (as far as the file system can). One
    that was stopped inside is not waited for longer than a lock is believed.
    """
    handle, end = os.open(folder, os.O_RDONLY), time.monotonic() + STALE_SECONDS
    try:
        with contextlib.suppress(OSError):  # some network file systems have no flock
            while time.monotonic() < end:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.01)
        yield
    finally:
        os.close(handle)
