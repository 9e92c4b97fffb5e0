"""Why a run stops before its last step: a signal, the end of the job's time, a spot instance taken back.

Each cause is a number, so that ranks can agree on one by its maximum: a signal's own, or one of those below.
"""

from __future__ import annotations

import os
import signal
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from hlat.observe.failures import Terminated

REBALANCE = 1  # a spot instance may soon be taken back: save, and go on
WALLTIME, SPOT, HANGUP = 65, 66, 67  # above every signal's number; SIGHUP's own is that of REBALANCE
# The first two: what would have come a little later.
_AS_SIGNAL = {WALLTIME: signal.SIGUSR1, SPOT: signal.SIGTERM, HANGUP: signal.SIGHUP}
_TEXT = {WALLTIME: "the end of its time", SPOT: "a spot interruption notice"}
HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
_RECENT, _SAVES = 50, 5  # steps, and saves, whose longest is what the next one may take
_SLACK = 5.0  # seconds, for what is not measured: the last rows, the processes' end


class Asked(Exception):
    """A stop was asked for."""


def name_of(cause: int) -> str:
    """`SIGTERM`, `the end of its time`, `a spot interruption notice`."""
    return _TEXT.get(cause) or signal.Signals(_AS_SIGNAL.get(cause, cause)).name


def text_of(cause: int) -> str:
    """The cause as the end of "stopped by ...": a signal with its number."""
    return _TEXT.get(cause) or f"signal {int(_AS_SIGNAL.get(cause, cause))}"


def exit_status(cause: int) -> int:
    """128 + the signal; the end of the job's time counts as SIGUSR1, a spot notice as SIGTERM."""
    return 128 + int(_AS_SIGNAL.get(cause, cause))


@contextmanager
def handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle the signals that stop a run inside; put the former handlers back after. A SIGHUP that is
    ignored, as under nohup, stays so.
    """

    def handle(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        handler(number, frame)

    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    numbers = [number for number in HANDLED if not (ignored and number == signal.SIGHUP)]
    former = {number: signal.signal(number, handle) for number in numbers}
    try:
        yield
    finally:
        for number, old in former.items():
            if signal.getsignal(number) is handle:  # else a rank that leaves ignores it by now
                signal.signal(number, old)


def leave_terminal() -> None:
    """Let what is printed to a terminal go nowhere from now on: SIGHUP says that it is gone, and the next
    line would fail, before the save. Files and pipes stay.
    """
    nowhere = os.open(os.devnull, os.O_RDWR)
    for number in (0, 1, 2):
        with suppress(OSError):
            facts = os.fstat(number)
            if stat.S_ISCHR(facts.st_mode) and facts.st_rdev != os.fstat(nowhere).st_rdev:
                os.dup2(nowhere, number)
    os.close(nowhere)


class Signals:
    """Turns SIGTERM, SIGUSR1, SIGHUP and the first Ctrl-C into a request that the training loop reads after a
    step.

    Until `hold`, which comes with the first step done, there is nothing to save, and a compilation may be
    under way: SIGTERM, SIGUSR1 and SIGHUP raise Terminated, Ctrl-C KeyboardInterrupt.
    After it the first request stands and others change nothing, but a second Ctrl-C interrupts at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.began = time.time()
        self._holding = False

    def hold(self) -> None:
        """From now on requests wait for the loop."""
        self._holding = True

    def note(self, cause: int) -> None:
        """Ask the loop to stop for a cause, or for REBALANCE to save. Any thread may call it."""
        if self.received is None or self.received == REBALANCE:
            self.received = cause

    def check(self) -> None:
        """Raise Asked where the loop is asked to stop: for what may take long and can be left undone."""
        if self.received not in (None, REBALANCE):
            raise Asked

    def done(self, cause: int) -> None:
        """A request is fulfilled."""
        if self.received == cause:
            self.received = None

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and (not self._holding or self.received == signal.SIGINT):
            raise KeyboardInterrupt
        if not self._holding:
            raise Terminated(number)
        self.note(HANGUP if number == signal.SIGHUP else number)

    @contextmanager
    def watch(self) -> Iterator[Signals]:
        """Handle the signals inside; put the former handlers back after."""
        with handling(self._handle):
            yield self


class Deadline:
    """When to stop so that the last save is complete before the job's time is over.

    Args:
        ends: that moment, in seconds since 1970; None: never.
        save_seconds: what a save takes, until one has been measured.
        clock: seconds since 1970.
    """

    def __init__(
        self, ends: float | None, save_seconds: float, clock: Callable[[], float] = time.time
    ) -> None:
        self.ends, self.clock = ends, clock
        self._steps: dict[bool, deque[float]] = {}
        self._before = save_seconds
        self._saves: deque[float] = deque(maxlen=_SAVES)
        self.window(1)

    def window(self, steps: int) -> None:
        """How many steps may be queued before one waits for them all (`log.every`): one that waited is always
        among the recent ones. Call it before the first step.
        """
        self._recent = max(_RECENT, 2 * steps)

    def save(self, seconds: float) -> None:
        """Take what a save took."""
        self._saves.append(seconds)

    @property
    def save_seconds(self) -> float:
        """The longest of the recent saves."""
        return max(self._saves, default=self._before)

    def step(self, seconds: float, evaluated: bool) -> None:
        """Take what a step took; those with an evaluation are counted apart."""
        self._steps.setdefault(evaluated, deque(maxlen=self._recent)).append(seconds)

    def longest(self, evaluated: bool = False) -> float:
        """The longest of the recent steps, in seconds; 0 before there is one."""
        return max(self._steps.get(evaluated) or self._steps.get(False) or (0.0,))

    def due(self, ahead: Sequence[bool]) -> bool:
        """Whether a save after the next steps would end too late.

        Args:
            ahead: for each of these steps, whether it ends with an evaluation.
        """
        if self.ends is None:
            return False
        seconds = sum(map(self.longest, ahead)) + self.save_seconds
        return self.clock() + 1.2 * seconds + _SLACK >= self.ends


def end_of_time(environ: Mapping[str, str], max_hours: float | None, began: float) -> float | None:
    """When the job's time is over, in seconds since 1970: what SLURM says, or `run.max_hours` after `began`,
    whichever is first; None when neither says.
    """
    ends = [] if max_hours is None else [began + 3600 * max_hours]
    with suppress(ValueError):
        ends.append(float(environ.get("SLURM_JOB_END_TIME", "")))
    return min((end for end in ends if end > began), default=None)
