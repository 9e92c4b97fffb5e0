"""One attempt: the ranks of this machine from their start to the end of the last of them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hlat.host.limits import cores
from hlat.host.python import environment, module, torchrun_module
from hlat.observe.heartbeat import FOLDER, STACKS_SIGNAL, Heartbeat, read_all, stacks_file, unfinished
from hlat.supervise import processes
from hlat.supervise.logs import LogMirror, Shown
from hlat.supervise.scratch import Scratch
from hlat.supervise.watch import Limits, kind_of, overdue, sign

POLL = 0.2
SAMPLE = 2.5  # seconds between two looks at heartbeats: a living rank has written in between
_STACKS_SECONDS = 1.0
_LOOK_AT_DISK, _SILENT = 2.0, 5.0
_COPY_SECONDS, _SHOW_SECONDS = 60.0, 5.0  # for the last of the output, when a disk or a pipe hangs


@dataclass(frozen=True)
class Place:
    """Where this machine stands among those of the job, and how many ranks it has."""

    nproc: int = 1
    nnodes: int = 1
    node: int = 0
    address: str = "127.0.0.1"
    port: int = 29500

    def torchrun(self) -> list[str]:
        """torchrun's arguments. It does not restart by itself: an attempt is one start of all ranks."""
        return [
            f"--nnodes={self.nnodes}",
            f"--node-rank={self.node}",
            f"--nproc-per-node={self.nproc}",
            f"--master-addr={self.address}",
            f"--master-port={self.port}",
            "--max-restarts=0",
            "--monitor-interval=0.2",
            "--redirects=3",
        ]


@dataclass
class Outcome:
    """How an attempt ended.

    codes: status of each rank that failed, as far as torchrun knows. hang: whether it was ended because a
    rank hung; why: in words; signs: what the ranks here said of themselves, twice, when that was found.
    stopped: the signal that the supervisor was sent. text: the end of the ranks' output. beats: their last
    heartbeats. left: descendants that outlived their launcher and were ended. unfinished: ranks that did not
    say that they are done. trouble: with this machine's own disk, as it was at the end.
    """

    code: int = 1
    codes: dict[int, int] = field(default_factory=dict)
    hang: bool = False
    why: str = ""
    signs: tuple[list[dict[str, Any]], list[dict[str, Any]]] | None = None
    stopped: int | None = None
    text: str = ""
    beats: dict[int, Heartbeat] = field(default_factory=dict)
    left: int = 0
    unfinished: list[int] = field(default_factory=list)
    trouble: str = ""


class Attempt:
    """Starts torchrun and looks after it.

    Args:
        place: of this machine.
        command: what each rank runs, as `["hlat", "train", ...]`, a module and its arguments.
        logs: folder of this attempt in the run folder.
        limits: how long a rank may stay where it is.
        grace: seconds for a save after a signal.
        received: the signal that the supervisor was sent, or None.
        others: asked now and then; a text ends this attempt, as other machines have ended theirs.
        compiling: told whether a rank here has a compiler at work; says whether one elsewhere has.
        on_look: given all heartbeats of this machine at every look.
        on_trouble: told that no heartbeat can be written here, and why; empty: that they can be again.

    Raises OSError when this machine's own disk has no room for its files.
    """

    def __init__(
        self,
        place: Place,
        command: Sequence[str],
        logs: Path,
        *,
        limits: Limits,
        grace: float,
        received: Callable[[], int | None] = lambda: None,
        others: Callable[[], str] = lambda: "",
        compiling: Callable[[bool], bool] = lambda here: False,
        on_look: Callable[[Mapping[int, Heartbeat]], None] = lambda beats: None,
        on_trouble: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.place, self.limits, self.grace = place, limits, grace
        self.received, self.others, self.on_look = received, others, on_look
        self.compiling, self.on_trouble, self._trouble = compiling, on_trouble, ""
        first = place.node * place.nproc
        self._disk = Scratch(range(first, first + place.nproc))  # on this machine, never on the run's disk
        self.scratch, self.logs = self._disk.path, logs
        self.shown = Shown()
        self.mirror = LogMirror(self.scratch / "logs", logs, first, self.shown)
        arguments = [*place.torchrun(), f"--log-dir={self.scratch / 'logs'}", *torchrun_module(command)]
        words = module("hlat.supervise.agent", str(self._disk.result), *arguments)
        self._process = subprocess.Popen(words, env=self._environment(os.environ), start_new_session=True)

    def _environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        chosen = {**environment(environ), FOLDER: str(self.scratch)}
        chosen.setdefault("OMP_NUM_THREADS", str(max(1, cores() // self.place.nproc)))
        return chosen

    def run(self) -> Outcome:
        """Wait for the end. Nothing that was started here runs after it."""
        outcome = Outcome()
        self.mirror.start()
        try:
            self._wait(outcome)
            outcome.beats = read_all(self.scratch)
            self.on_look(outcome.beats)
            outcome.code = self._process.poll() if self._process.poll() is not None else 1  # type: ignore[assignment]
            result = self._disk.read_result()
            outcome.codes = {int(rank): int(code) for rank, code in (result or {}).get("codes", {}).items()}
            outcome.text = str((result or {}).get("refused", ""))
            outcome.unfinished = unfinished(self.scratch)
            outcome.trouble = self._disk.trouble(silent=outcome.code != 0)
            if outcome.code == 0 and result is None:
                outcome.code = 1  # whatever ended so was not the agent, or not at its end
        finally:
            outcome.left = len(processes.end_all(self._process.pid))
            self._process.wait()
            self.mirror.finish(_COPY_SECONDS)
            outcome.text = "\n".join(filter(None, (self.mirror.tail(), outcome.text)))
            self.shown.finish(_SHOW_SECONDS)
            self._keep_stacks()
            self._disk.remove()
        return outcome

    def _wait(self, outcome: Outcome) -> None:
        end, looked = float("inf"), 0.0
        while self._process.poll() is None:
            now = time.monotonic()
            number = self.received()
            if number is not None and outcome.stopped is None:
                outcome.stopped, end = number, now + self.grace
                self._ask_to_stop()
            if now > end:
                outcome.why = outcome.why or f"it did not stop within {self.grace:.0f} s"
                return
            if outcome.stopped is None and (why := self.others()):
                outcome.why, end = why, min(end, now + self.limits.stepping)
            beats = read_all(self.scratch)
            self.on_look(beats)
            if now - looked > _LOOK_AT_DISK:
                looked = now
                self._look_at_disk(any(now - beat.stamp > _SILENT for beat in beats.values()))
            if outcome.stopped is None and self._find_hang(beats, outcome):
                return
            time.sleep(POLL)

    def _look_at_disk(self, silent: bool) -> bool:
        """Whether heartbeats can be written here, tried if a rank is silent. What changes is told."""
        if (text := self._disk.trouble(silent)) != self._trouble:
            news = bool(text) != bool(self._trouble)
            self._trouble = text
            if news:
                self.on_trouble(text)
        return not text

    def _ask_to_stop(self) -> None:
        """The ranks save and leave together. Through torchrun they would be killed after 30 seconds."""
        ours = {process.pid for process in processes.descendants(self._process.pid)}
        pids = [beat.pid for beat in read_all(self.scratch).values() if beat.pid in ours]
        processes.send(pids or [self._process.pid], signal.SIGTERM)

    def _find_hang(self, first: Mapping[int, Heartbeat], outcome: Outcome) -> bool:
        """Whether a rank here has been too long in one place; then stacks are written."""
        now = time.monotonic()
        late = self._late(first, now)
        if not late:
            return False
        time.sleep(SAMPLE)
        second, again = read_all(self.scratch), time.monotonic()
        late = self._late(second, again)
        if not late or self._process.poll() is not None:
            return False
        if not self._look_at_disk(silent=True) and not self._heard_or_halted(late, again):
            return False  # what is not written says nothing of who should have written it
        outcome.hang = True
        outcome.signs = tuple(  # type: ignore[assignment]
            [sign(beat, at - beat.stamp) for beat in beats.values()]
            for beats, at in ((first, now), (second, again))
        )
        worst = late[0]
        seconds, limit = again - worst.began, self.limits.of_beat(worst)
        what = f"step {worst.step} ({kind_of(worst.phase)}"
        outcome.why = f"no progress for {seconds:.0f} s in {what}; limit {limit:.0f} s)"
        processes.send([beat.pid for beat in second.values()], STACKS_SIGNAL)
        time.sleep(_STACKS_SECONDS)
        return True

    def _heard_or_halted(self, late: Iterable[Heartbeat], now: float) -> bool:
        """Whether it is known, whatever the disk does, that one of them makes no progress."""
        return any(now - beat.stamp < SAMPLE or processes.halted(beat.pid) for beat in late)

    def _late(self, beats: Mapping[int, Heartbeat], now: float) -> list[Heartbeat]:
        def elsewhere() -> bool:
            return self.compiling(any(processes.compiles(beat.pid) for beat in beats.values()))

        late = overdue(beats, now, self.limits, processes.compiles, processes.halted, elsewhere)
        if not late and any(now - beat.began > self.limits.of_beat(beat) for beat in beats.values()):
            elsewhere()  # the ranks of other machines wait for ours
        return late

    def _keep_stacks(self) -> None:
        for path in sorted(self.scratch.glob(stacks_file(self.scratch, 0).name.replace("00000", "*"))):
            if path.stat().st_size:
                try:
                    self.logs.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, self.logs / path.name)
                except OSError:
                    return
