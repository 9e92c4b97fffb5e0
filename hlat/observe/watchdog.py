"""Sees that a job of several processes goes on: a thread on each rank, and signs of life in the job's store.

The main thread only writes down where it is (`beat`). The thread posts that every two seconds, looks after
the other ranks, and ends this process when it is held up for good: when the main thread makes no progress,
when another rank is gone, and when another rank has failed and this one does not notice (a GPU that waits for
a collective does not).
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from hlat.observe.failures import (
    CLEANUP_SECONDS,
    LINGER_SECONDS,
    Board,
    Record,
    describe,
    first_line,
    leave_at_once,
    say,
    write_error_file,
)
from hlat.observe.heartbeat import Pace

INTERVAL = 2.0  # between signs of life
SILENT = 6.0  # without a sign: not merely slow
GONE = 45.0  # without a sign on another machine: taken for dead
NO_STORE = 30.0  # without an answer from the store
_WAITING = ("torch/distributed/", "hlat/backend/groups.py", "hlat/backend/collectives.py")


class Peer(Protocol):
    """Another process, as `hlat.backend.cluster.Member`."""

    @property
    def rank(self) -> int:
        """Its rank."""
        ...

    @property
    def host(self) -> str:
        """Name of its machine."""
        ...

    @property
    def pid(self) -> int:
        """Its process id there."""
        ...

    def exists(self) -> bool | None:
        """Whether it runs; None when that cannot be seen from here."""
        ...


@dataclass(frozen=True)
class Sign:
    """A rank's sign of life. stamp: when it was posted, by its own clock; since: seconds in this phase;
    where: innermost line of HLAT it was at; waiting: whether it was in a collective.
    """

    number: int
    stamp: float
    step: int
    phase: str
    since: float
    where: str
    waiting: bool


class Watchdog:
    """See the module text. Before `start` (and in a job of one process) it only takes beats.

    Args:
        rank: this process.
        members: all processes, by rank.
        limit: seconds without a beat after which the main thread counts as held up; may be changed. A
            patient phase has the limit of the beginning.
        logs: where the stacks go.
    """

    def __init__(
        self, rank: int = 0, members: Sequence[Peer] = (), limit: float = 3600.0, logs: Path | None = None
    ) -> None:
        self.rank, self.members, self.limit, self.logs = rank, members, limit, logs
        self.before_exit: Callable[[], None] = lambda: None
        self.store_holder = "the holder of the job's store"
        self.long_limit = limit
        self.pace, self._patient = Pace(), False
        self._main = threading.main_thread().ident
        self._stop, self._reporting = threading.Event(), threading.Lock()
        self._resting = self._suspicious = self._stacks_written = False
        self._board: Board | None = None
        self._linger = 0.0
        self._count = 0
        self._answered = time.monotonic()
        self._seen: dict[int, tuple[int, float]] = {}
        self._cause_since: float | None = None

    def beat(self, step: int, phase: str, patient: bool = False) -> None:
        """Note that the main thread begins `phase` of step `step`; a `patient` one may last `long_limit`."""
        self._patient = False
        self.pace.begin(step, phase)
        self._patient = patient

    def look(self, now: float) -> dict[str, Any]:
        """Where the main thread is, as a `hlat.observe.heartbeat.Heartbeat` has it."""
        where, waiting = _position(sys._current_frames().get(self._main or 0))
        place = {"where": where, "waiting": waiting, "patient": self._patient}
        return {**self.pace.look(now), **place, "pace": self.pace.slowest()}

    def start(self, board: Board, store_holder: str, serves_store: bool = False) -> None:
        """Start the thread, and another that sees whether the store answers.

        Args:
            board: with a connection to the store of its own.
            store_holder: which process holds the store. serves_store: whether it is this one.
        """
        self._board, self.store_holder = board, store_holder
        self._linger = LINGER_SECONDS if serves_store else 0.0
        self._answered = time.monotonic()
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()
        threading.Thread(target=self._watch_store, name="watchdog-store", daemon=True).start()

    def stop(self) -> None:
        """End the thread; the job is over."""
        self._stop.set()

    def rest(self) -> None:
        """This rank ends by itself: go on looking after the others, but do not end it."""
        self._resting = True

    def suspect(self) -> None:
        """A collective broke: take a few seconds' silence on another machine for death."""
        self._suspicious = True

    def cause_seen(self) -> Record | None:
        """The cause of the job's failure as far as the thread has read it; needs no store."""
        return self._board.known_cause() if self._board else None

    def report_late(self) -> None:
        """Write this process's stacks; the first rank to come here also finds out who is late and tells
        all.
        """
        with self._reporting:
            board = self._board
            if board is None or board.cause() is not None:
                return
            self._write_stacks()
            if board.store.add("late/reporters", 1) > 1:
                return
            before = self._signs()
            time.sleep(SILENT)
            self._post_sign()  # when this is the thread that does so
            rank, text = who_is_late(self.members, before, self._signs())
            where = f"; stacks of all ranks: {self.logs}/stacks-rank-*.txt" if self.logs else ""
            board.post(Record("late", rank, text + where))

    def _run(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(Exception):  # the store does not answer: see _watch_store
                self._tick()
                self._answered = time.monotonic()
            self._stop.wait(INTERVAL)

    def _watch_store(self) -> None:
        """A store whose host hangs keeps whoever asks it waiting, so this asks nothing."""
        while not self._stop.wait(INTERVAL):
            if time.monotonic() - self._answered > NO_STORE:
                say(f"hlat: rank {self.rank} stopped because {self.store_holder} does not answer")
                self._write_stacks()
                self.before_exit()
                leave_at_once(1)

    def _tick(self) -> None:
        board = self._board
        assert board is not None
        self._post_sign()
        if gone := self._find_gone():
            board.post(gone)
        idle = time.monotonic() - self.pace.now[2]
        limit = max(self.limit, self.long_limit) if self._patient else self.limit
        if idle > limit and not self._resting:
            self.report_late()
            if idle > limit + NO_STORE:  # the rank that was to report has ended as well
                self._exit(f"it made no progress for {idle:.0f} s")
        cause = board.cause()
        if cause is not None and cause.kind == "late":
            self._write_stacks()
            write_error_file(TimeoutError(cause.text))
            self._exit(cause.text)
        elif cause is not None:
            self._cause_since = self._cause_since or time.monotonic()
            if time.monotonic() - self._cause_since > CLEANUP_SECONDS + LINGER_SECONDS:
                line = "" if cause.kind == "user" else describe(cause, board.names)
                self._exit(line, cause.code)
        elif board.store.add("late/reporters", 0):
            self._write_stacks()

    def _post_sign(self) -> None:
        assert self._board is not None
        self._count += 1
        step, phase, since = self.pace.now
        where, waiting = _position(sys._current_frames().get(self._main or 0))
        seconds = time.monotonic() - since
        sign = (self._count, time.time(), step, phase, seconds, where, waiting)
        self._board.store.set(f"sign/{self.rank}", json.dumps(sign))

    def _signs(self, ranks: Sequence[int] | None = None) -> dict[int, Sign]:
        """The newest sign of each rank that has given one."""
        assert self._board is not None
        keys = {rank: f"sign/{rank}" for rank in (range(len(self.members)) if ranks is None else ranks)}
        present = [rank for rank, key in keys.items() if self._board.store.check([key])]
        found = self._board.store.multi_get([keys[rank] for rank in present]) if present else []
        return {rank: Sign(*json.loads(text)) for rank, text in zip(present, found, strict=True)}

    def _find_gone(self) -> Record | None:
        """A rank that has ended without a word: any on this machine; elsewhere the next one, or all of them
        once something broke.
        """
        board, now = self._board, time.monotonic()
        assert board is not None
        if any(record.kind == "gone" for record in board.known):
            return None
        far = []
        for member in self.members:
            exists = member.exists() if member.rank != self.rank else True
            if exists is None:
                far.append(member.rank)
            elif not exists and not board.has_ended(member.rank):
                return self._gone(member, self._signs([member.rank]).get(member.rank))
        following = (self.rank + 1) % len(self.members)
        watched = far if self._suspicious else [rank for rank in far if rank == following]
        for rank, sign in self._signs(watched).items():
            number, since = self._seen.get(rank, (-1, now))
            if number != sign.number:
                self._seen[rank] = (sign.number, now)
            elif now - since > (SILENT if self._suspicious else GONE) and not board.has_ended(rank):
                return self._gone(self.members[rank], sign)
        return None

    def _gone(self, member: Peer, sign: Sign | None) -> Record:
        text = f"{named(member)} is gone: {last_sign(sign)}; killed, out of memory, or its machine is down"
        return Record("gone", member.rank, text)

    def _write_stacks(self) -> None:
        """Once: later the main thread may have left the place where it hung."""
        if self.logs is None or self._stacks_written:
            return
        self._stacks_written = True
        path = self.logs / f"stacks-rank-{self.rank:05}.txt"
        step, phase, since = self.pace.now
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as file:  # after those of an earlier start
                seconds, now = time.monotonic() - since, time.strftime("%Y-%m-%d %H:%M:%S %z")
                file.write(f"rank {self.rank}, step {step} ({phase}) for {seconds:.1f} s, {now}\n\n")
                file.write(_main_stack())
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            say(f"hlat: rank {self.rank} could not write {path}: {first_line(error)}")

    def _exit(self, reason: str, status: int = 1) -> None:
        """End this process, with a line if there is a reason to give."""
        if self._resting or self._stop.is_set():
            return
        self._resting = True
        if reason:
            say(f"hlat: rank {self.rank} stopped because {reason}")
        try:
            assert self._board is not None
            self._board.note_end()
            self.before_exit()
        except Exception as trouble:
            say(f"hlat: rank {self.rank}: {first_line(trouble)}")
        time.sleep(self._linger)
        leave_at_once(status)


def who_is_late(members: Sequence[Peer], before: dict[int, Sign], after: dict[int, Sign]) -> tuple[int, str]:
    """The rank that holds up the others (-1 for none in particular), and a sentence about it.

    Args:
        members: all processes.
        before, after: their signs of life, `SILENT` seconds apart.
    """
    silent = [m for m in members if m.rank not in after or before.get(m.rank) == after[m.rank]]
    if silent:
        return _list(silent, lambda m: f"no sign of life, {last_sign(after.get(m.rank))}")
    furthest = max(sign.step for sign in after.values())
    behind = [m for m in members if after[m.rank].step < furthest]
    if behind:
        return _list(behind, lambda m: f"{_where(after[m.rank])}, the others in step {furthest}")
    busy = [m for m in members if not after[m.rank].waiting]
    if 0 < len(busy) < len(members):
        return _list(busy, lambda m: f"{_where(after[m.rank])}, the others wait")
    places: dict[str, list[Peer]] = {}
    for member in members:
        places.setdefault(f"{after[member.rank].phase}{_at(after[member.rank])}", []).append(member)
    few, many = min(places.values(), key=len), max(places.values(), key=len)
    if len(few) < len(many):
        return _list(few, lambda m: f"{_where(after[m.rank])}, others {_where(after[many[0].rank])}")
    return -1, f"all ranks wait in step {furthest}: {'; '.join(places)}"


def _main_stack() -> str:
    """The main thread's stack as faulthandler writes one. It ends after a hundred threads, and the main
    thread, which tells where a rank hangs, would be its last.
    """
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    lines = [
        f'  File "{at.f_code.co_filename}", line {number} in {at.f_code.co_name}\n'
        for at, number in traceback.walk_stack(frame)
    ]
    return f"Main thread (most recent call first):\n{''.join(lines)}\n"


def _list(late: Sequence[Peer], about: Callable[[Peer], str]) -> tuple[int, str]:
    shown = "; ".join(f"{named(member)} is late: {about(member)}" for member in late[:4])
    more = f"; and {len(late) - 4} more ranks" if len(late) > 4 else ""
    return late[0].rank, shown + more


def _where(sign: Sign) -> str:
    return f"in step {sign.step} ({sign.phase}) for {sign.since:.1f} s{_at(sign)}"


def _at(sign: Sign) -> str:
    return f", at {sign.where}" if sign.where else ""


def named(member: Peer) -> str:
    """`rank 2 (node-b, pid 4711)`."""
    return f"rank {member.rank} ({member.host}, pid {member.pid})"


def last_sign(sign: Sign | None) -> str:
    """When and where a rank was last heard of."""
    if sign is None:
        return "no sign since it joined"
    ago = max(0.0, time.time() - sign.stamp)
    return f"last sign {ago:.1f} s ago in step {sign.step} ({sign.phase})"


def _position(frame: Any) -> tuple[str, bool]:
    """The innermost line of HLAT in a stack, as `train/run.py:agree`, and whether it waits for others."""
    waiting = False
    while frame is not None:
        file = frame.f_code.co_filename.replace(os.sep, "/")
        waiting = waiting or any(part in file for part in _WAITING)
        _, inside, rest = file.rpartition("/hlat/")
        if inside and "/backend/" not in file:
            return f"{rest}:{frame.f_code.co_name}", waiting
        frame = frame.f_back
    return "", waiting
