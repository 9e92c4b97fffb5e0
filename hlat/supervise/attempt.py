"""One attempt: the ranks of this machine from their start to the end of the last of them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hlat.host.limits import cores
from hlat.host.python import environment, module, torchrun_module
from hlat.observe.heartbeat import FOLDER, STACKS_SIGNAL, Heartbeat, read_all, stacks_file, unfinished
from hlat.supervise import processes
from hlat.supervise.logs import LogMirror
from hlat.supervise.watch import Limits, kind_of, overdue, sign

POLL = 0.2
SAMPLE = 2.5  # seconds between two looks at heartbeats: a living rank has written in between
_STACKS_SECONDS = 1.0


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
            "--tee=3",
        ]


@dataclass
class Outcome:
    """How an attempt ended.

    codes: status of each rank that failed, as far as torchrun knows. hang: whether it was ended because a
    rank hung; why: in words; signs: what the ranks here said of themselves, twice, when that was found.
    stopped: the signal that the supervisor was sent. text: the end of the ranks' output. beats: their last
    heartbeats. left: descendants that outlived their launcher and were ended. unfinished: ranks that did not
    say that they are done.
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
    ) -> None:
        self.place, self.limits, self.grace = place, limits, grace
        self.received, self.others, self.on_look = received, others, on_look
        self.compiling = compiling
        self.scratch = Path(tempfile.mkdtemp(prefix="hlat-"))  # on this machine, never on the run's disk
        self.mirror = LogMirror(self.scratch / "logs", logs, place.node * place.nproc)
        self.logs = logs
        self._result = self.scratch / "result.json"
        arguments = [*place.torchrun(), f"--log-dir={self.scratch / 'logs'}", *torchrun_module(command)]
        words = module("hlat.supervise.agent", str(self._result), *arguments)
        self._process = subprocess.Popen(words, env=self._environment(os.environ), start_new_session=True)

    def _environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        chosen = {**environment(environ), FOLDER: str(self.scratch)}
        chosen.setdefault("OMP_NUM_THREADS", str(max(1, cores() // self.place.nproc)))
        chosen.setdefault("TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE", "[${rank}] ")
        return chosen

    def run(self) -> Outcome:
        """Wait for the end. Nothing that was started here runs after it."""
        outcome = Outcome()
        try:
            self._wait(outcome)
            outcome.beats = read_all(self.scratch)
            self.on_look(outcome.beats)
            outcome.code = self._process.poll() if self._process.poll() is not None else 1  # type: ignore[assignment]
            outcome.codes = self._codes()
            outcome.unfinished = unfinished(self.scratch)
            if outcome.code == 0 and not self._result.exists():
                outcome.code = 1  # whatever ended so was not the agent, or not at its end
        finally:
            outcome.left = len(processes.end_all(self._process.pid))
            self._process.wait()
            self.mirror.sync(last=True)
            outcome.text = self.mirror.tail()
            self._keep_stacks()
            shutil.rmtree(self.scratch, ignore_errors=True)
        return outcome

    def _wait(self, outcome: Outcome) -> None:
        end, synced = float("inf"), 0.0
        while self._process.poll() is None:
            now = time.monotonic()
            if now - synced > 1.0:
                self.mirror.sync()
                synced = now
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
            if outcome.stopped is None and self._find_hang(beats, outcome):
                return
            time.sleep(POLL)

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
        if not self._late(second, again) or self._process.poll() is not None:
            return False
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

    def _late(self, beats: Mapping[int, Heartbeat], now: float) -> list[Heartbeat]:
        def elsewhere() -> bool:
            return self.compiling(any(processes.compiles(beat.pid) for beat in beats.values()))

        late = overdue(beats, now, self.limits, processes.compiles, processes.halted, elsewhere)
        if not late and any(now - beat.began > self.limits.of_beat(beat) for beat in beats.values()):
            elsewhere()  # the ranks of other machines wait for ours
        return late

    def _codes(self) -> dict[int, int]:
        try:
            codes = json.loads(self._result.read_text(encoding="utf-8"))["codes"]
        except (OSError, ValueError, KeyError):
            return {}
        return {int(rank): int(code) for rank, code in codes.items()}

    def _keep_stacks(self) -> None:
        for path in sorted(self.scratch.glob(stacks_file(self.scratch, 0).name.replace("00000", "*"))):
            if path.stat().st_size:
                try:
                    self.logs.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, self.logs / path.name)
                except OSError:
                    return
