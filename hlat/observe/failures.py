"""How a job of several processes ends when something fails: the cause first and once, then who waited for it.

Each rank that fails says so in the job's store before it lets go of its connections. A rank whose collective
breaks then looks there for the cause, and prints one line in place of its own traceback.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hlat.errors import TrainingStopped, UserError
from hlat.observe.redact import redact, redact_all
from hlat.observe.terminal import escaped
from hlat.observe.torchelastic import leave_message, told

ECHO_SECONDS = 12.0  # for the cause to show: a silent rank on another machine takes longest
ALIKE_SECONDS = 5.0  # for the same mistake to show on a rank before this one
CLEANUP_SECONDS = 15.0  # for a failed rank to close its files
LINGER_SECONDS = 5.0  # the rank that holds the store lets the others read it
_STAMP_SECONDS = 1.0  # torchrun takes the first failure for the cause, and its clock has whole seconds
# What gloo, nccl and the store say when another rank has gone or is late.
_ECHOES = re.compile(
    r"gloo|nccl|closed by peer|reset by peer|broken pipe|timed out|socket|connection (closed|refused|reset)"
    r"|store->|c10d",
    re.IGNORECASE,
)
_LATE = re.compile(r"timed? ?out", re.IGNORECASE)


class Terminated(BaseException):
    """A signal that ends the process before a first step is done; later the training loop handles it."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        super().__init__(number)
        self.number = int(number)

    def line(self) -> str:
        """What is said of it."""
        name = signal.Signals(self.number).name
        return f"stopped by {name} before a first step was done; there is nothing new to save"


class PeerFailed(Exception):
    """Another rank has failed; this one has nothing to wait for."""


@dataclass(frozen=True)
class Record:
    """One failure. kind: "user" (one line was printed), "error" (a traceback was), "gone" (the process is no
    longer there), "late" (no progress). rank: whose failure. text: what happened. code: exit status.
    """

    kind: str
    rank: int
    text: str
    code: int = 1


class Board:
    """Failures of the job, in order, in its store; threads have a board with a connection each.

    Args:
        store: with set, get, add and check.
        rank: this process.
        names: of all ranks, as "rank 2 (node-b)".
    """

    def __init__(self, store: Any, rank: int, names: Sequence[str]) -> None:
        self.store, self.rank, self.names = store, rank, names
        self.known: list[Record] = []
        self.complete = True  # whether the last `read` met none that was still being written
        self._reading = threading.Lock()

    def post(self, record: Record) -> None:
        """Tell all ranks."""
        number = self.store.add("failures/count", 1)
        self.store.set(f"failures/{number}", json.dumps(asdict(record)))
        if record.rank == self.rank:
            self.note_end()

    def note_end(self) -> None:
        """Say that this rank ends of its own accord, so that nobody reports it as gone."""
        with contextlib.suppress(Exception):  # without a store there is nobody to tell
            self.store.set(f"ended/{self.rank}", "1")

    def has_ended(self, rank: int) -> bool:
        """Whether a rank has said that it ends."""
        return bool(self.store.check([f"ended/{rank}"]))

    def read(self) -> list[Record]:
        """All failures so far. What was read once is remembered, should the store go."""
        with self._reading:
            count = self.store.add("failures/count", 0)
            for number in range(len(self.known) + 1, count + 1):
                if not self.store.check([f"failures/{number}"]):
                    break  # being written
                self.known.append(Record(**json.loads(self.store.get(f"failures/{number}"))))
            self.complete = len(self.known) == count
        return self.known

    def cause(self) -> Record | None:
        """The first failure that is not this rank's own doing."""
        self.read()
        return self.known_cause()

    def known_cause(self) -> Record | None:
        """`cause` from what has been read."""
        return next((r for r in self.known if r.rank != self.rank or r.kind in ("gone", "late")), None)


def is_echo(error: BaseException) -> bool:
    """Whether an exception only says that another rank has gone, is late, or ended this one."""
    if isinstance(error, Terminated | PeerFailed):
        return True
    if type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError"):
        return True
    return isinstance(error, RuntimeError | OSError) and bool(_ECHOES.search(str(error)))


class Ending:
    """Ends this rank when it or another one fails: prints what is to be printed, once, and sets the status.

    Args:
        board: of the main thread.
        watchdog: knows the ranks' signs of life (see `hlat.observe.watchdog`).
        serves_store: whether the store ends with this process.
    """

    def __init__(self, board: Board, watchdog: Any, serves_store: bool) -> None:
        self.board, self.watchdog, self.serves_store = board, watchdog, serves_store
        self.before_print: Callable[[], None] = lambda: None
        self.status: int | None = None

    def on_wait(self) -> None:
        """Raises PeerFailed once another rank has failed: there is nothing to wait for."""
        if self.board.cause() is not None:
            raise PeerFailed

    def note(self, error: BaseException) -> None:
        """Report an exception that ends this rank, before anything is cleaned up. Only the first counts.

        Cleaning up may then take `CLEANUP_SECONDS`, after which the process ends in any case.
        """
        if self.status is not None:
            return
        self.status = 1
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):  # a launcher's, once a rank has ended
            signal.signal(number, signal.SIG_IGN)
        self.watchdog.rest()
        self.before_print()
        try:
            self.status = self._report(error)
        except Exception as trouble:  # the store has gone in the meantime
            say(f"hlat: {self._me()} has lost the job's store ({first_line(trouble)})")
            if isinstance(error, UserError):
                say(f"hlat: error: {self._me()}: {error.line()}")
            else:
                say_traceback(self._me(), error)
        healthy = isinstance(error, TrainingStopped)  # on all ranks: a save in the background may finish
        seconds = self.watchdog.limit if healthy else CLEANUP_SECONDS
        timer = threading.Timer(seconds, leave_at_once, (self.status,))
        timer.daemon = True
        timer.start()

    def end(self) -> None:
        """End the process with the status that `note` found."""
        if self.serves_store:
            time.sleep(LINGER_SECONDS)
        leave_at_once(self.status or 0)

    def _report(self, error: BaseException) -> int:
        if isinstance(error, UserError):
            return self._report_line(f"error: {error.line()}", error.exit_code)
        if isinstance(error, KeyboardInterrupt):
            return self._report_line("interrupted", 130)
        if is_echo(error):
            cause = self._find_cause(error)
            if cause is not None:
                if cause.kind != "user":
                    say(f"hlat: rank {self.board.rank} stopped because {describe(cause, self.board.names)}")
                self.board.note_end()
                time.sleep(_STAMP_SECONDS)
                return cause.code
            if isinstance(error, Terminated):
                return self._report_line(error.line(), 128 + error.number)
        record = Record("error", self.board.rank, f"{type(error).__name__}: {first_line(error)}")
        twin = next((r for r in self.board.read() if (r.kind, r.text) == (record.kind, record.text)), None)
        self.board.note_end()
        if twin is None:
            say_traceback(self._me(), error)
            write_error_file(error)
        else:
            say(
                f"hlat: rank {self.board.rank} stopped with the same error as rank {twin.rank}: {record.text}"
            )
        self.board.post(record)
        return 1

    def _report_line(self, line: str, code: int) -> int:
        """A mistake in one line: printed by the first of the ranks that have made it."""
        record, before = Record("user", self.board.rank, line, code), range(self.board.rank)
        self.board.post(record)
        end = time.monotonic() + ALIKE_SECONDS
        while not (alike := self._is_known(record)) and time.monotonic() < end:
            if all(self.board.has_ended(rank) for rank in before):
                alike = self._is_known(record)
                if self.board.complete:  # else one that another rank is writing may hide theirs
                    break
            time.sleep(0.05)
        wrong = line.startswith("error: ")
        if wrong:
            leave_message(redact(f"hlat: {line}"))
        if not alike:
            kind, _, rest = line.partition("error: ")
            named = f"{kind}error: {self._me()}: {rest}" if rest else f"{self._me()}: {line}"
            text = f"hlat: {named if self.board.rank else line}"
            say(told(text) if wrong else text)
        return code

    def _is_known(self, record: Record) -> bool:
        """Whether a rank before this one has made the same mistake."""
        return any(
            r.rank < record.rank and (r.kind, r.text) == (record.kind, record.text) for r in self.board.read()
        )

    def _find_cause(self, error: BaseException) -> Record | None:
        late = bool(_LATE.search(str(error))) and not isinstance(error, Terminated | PeerFailed)
        if late:
            self.watchdog.report_late()
        self.watchdog.suspect()
        end = time.monotonic() + (2.0 if isinstance(error, Terminated) else ECHO_SECONDS)
        while True:
            try:
                cause = self.board.cause()
            except Exception:  # the store has gone, and with it who held it
                gone = Record("gone", -1, f"{self.watchdog.store_holder} is gone")
                cause = self.watchdog.cause_seen() or gone
            if cause is not None or time.monotonic() > end:
                return cause
            time.sleep(0.1)

    def _me(self) -> str:
        return self.board.names[self.board.rank]


def describe(record: Record, names: Sequence[str]) -> str:
    """What another rank's failure was, as the end of "... stopped because"."""
    if record.kind in ("gone", "late"):
        return record.text
    return f"{names[record.rank]} failed first: {record.text}"


def first_line(error: BaseException) -> str:
    """An exception's message, shortened to a line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]


def say(line: str) -> None:
    """Print to stderr in one piece, without secrets: other ranks print to the same place."""
    with contextlib.suppress(OSError):  # nobody may read
        sys.stderr.write(f"{escaped(redact(line))}\n")
        sys.stderr.flush()


def say_traceback(name: str, error: BaseException) -> None:
    """Print an exception as Python does, under the rank's name."""
    text = "".join(traceback.format_exception(error)).rstrip()
    say(f"hlat: {name} failed:\n{text}")


def write_error_file(error: BaseException) -> None:
    """Let torchrun name this rank, and not one that failed because of it, as the root cause."""
    if not (file := os.environ.get("TORCHELASTIC_ERROR_FILE")):
        return
    try:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
        path = Path(file)
        if path.exists():  # it may lie in the run folder
            path.write_text(
                json.dumps(redact_all(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8"
            )
    except Exception as trouble:  # only torchrun's own summary is poorer for it
        say(f"hlat: no error file for torchrun: {first_line(trouble)}")


def leave_at_once(status: int) -> None:
    """End the process now, whatever its other threads wait for."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
