"""Starts a run, watches it, and starts it again from the newest complete checkpoint until it is done."""

from __future__ import annotations

import contextlib
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hlat.observe.heartbeat import STEP, Heartbeat
from hlat.observe.stopping import handling
from hlat.supervise import processes
from hlat.supervise.attempt import Attempt, Outcome, Place
from hlat.supervise.attempts import claim, folder_of
from hlat.supervise.classify import kernel_lines
from hlat.supervise.events import BAD_NODES, FOLDER, Events
from hlat.supervise.exits import (
    BAD_NODE,
    DONE,
    FAILED,
    GUARD,
    INTERRUPTED,
    LOST,
    REQUEUE,
    WRONG,
    decisive,
)
from hlat.supervise.goodput import Timeline, goodput, table
from hlat.supervise.judge import Judge, faults, is_over, report_fault
from hlat.supervise.scratch import described
from hlat.supervise.team import Team
from hlat.supervise.traces import Traces
from hlat.supervise.watch import Limits

if TYPE_CHECKING:
    from hlat.doctor.finding import Finding

_CODES = {"recipe": WRONG, "anomaly": GUARD, "software": FAILED, "lost": LOST}
_LONGEST_PAUSE = 300.0
_ELSEWHERE = "another machine's ranks have ended"


@dataclass(frozen=True)
class Budget:
    """restarts: in all. fruitless: in a row that end no further than the one before. pause: seconds before
    the first restart, doubled with each fruitless one.
    """

    restarts: int = 100
    fruitless: int = 3
    pause: float = 1.0


class Supervisor:
    """Of one machine.

    Args:
        command: what each rank runs: module and arguments.
        again: arguments that a restart adds.
        run: the run folder.
        place: of this machine. limits, grace: see `Attempt`.
        budget: how often to start again.
        team: the other machines.
        checks: what speaks for and against starting on this machine, asked before each attempt.
        lacking: what the run lacks to be done when all ranks have ended with status 0; empty: nothing.

    Attributes:
        attempt: the number of the newest one, over all jobs of the run; 0 before it.
    """

    def __init__(
        self,
        command: Sequence[str],
        run: Path,
        place: Place,
        *,
        limits: Limits,
        grace: float = 300.0,
        budget: Budget | None = None,
        team: Team | None = None,
        again: Sequence[str] = (),
        checks: Callable[[], list[Finding]] = list,
        lacking: Callable[[], str] = str,
    ) -> None:
        self.command, self.again, self.run_folder, self.place = list(command), list(again), run, place
        self.limits, self.grace, self.budget = limits, grace, budget or Budget()
        self.team, self.checks = team or Team(), checks
        self.attempt = 0
        self.logs, self._traces = run / FOLDER, Traces(run)
        self.events = Events(self.logs, quiet=place.node > 0)
        self.timeline = Timeline()
        self.received: int | None = None
        self.judge = Judge(place.nnodes, run, lacking)
        self._furthest = 0  # highest step seen
        self._best, self._fruitless = (0, 0), 0

    def run(self) -> int:
        """Until the run is done or nothing more can be done here. Returns the exit status."""
        processes.adopt_orphans()
        with self._signals():
            number = 0
            while True:
                number += 1
                refused = self._refuse_start(number)
                if refused is not None:
                    return refused
                decision = self._one(number)
                if decision["exit"] is not None:
                    self._finish(decision)
                    if decision.get("bare") and self.place.node == 0:
                        self._traces.remove()
                    return int(decision["exit"])
                self._pause(decision["pause"])
                if self.received is not None and self.team.count == 1:
                    why = "stopped by a signal between two attempts; the newest checkpoint stands"
                    status = _after_signal(self.received)
                    self._finish({"exit": status, "why": why})
                    return status

    def _refuse_start(self, number: int) -> int | None:
        """Check this machine, wait for the others. Returns the exit status when not all are fit to start."""
        findings = [finding for finding in self.checks() if finding.status == "fail"]
        for finding in findings:
            self.events.add(
                "check", f"{finding.check}: {finding.fact}", check=finding.check, fact=finding.fact
            )
        fault = faults(findings)
        came = self.team.ready(number, socket.gethostname(), fault)
        if len(came) < self.team.count:
            missing = [str(node) for node in range(self.team.count) if node not in came]
            line = f"not all machines came to start; missing: node {', '.join(missing)}"
            self.events.add("no-start", line)
            return FAILED if number == 1 else REQUEUE  # those that were there once are gone
        unfit = {host: what for host, what in came.values() if what}
        for host, what in unfit.items():
            if self.place.node == 0:
                self._exclude(host)
            self.events.add("no-start", f"{host} is unfit to train: {what}", node=host)
        return BAD_NODE if unfit else None

    def _one(self, number: int) -> dict[str, Any]:
        """This job's attempt of that number, and what all machines decide after it."""
        self.attempt = self.team.number(number, lambda: claim(self.logs, self.attempt))
        began, self.judge.stepped = time.time(), False
        self.timeline.start(time.monotonic())
        self.events.add("start", "" if self.attempt == 1 else f"attempt {self.attempt}", attempt=self.attempt)
        logs = folder_of(self.logs, self.attempt)
        outcome = self._train(number, logs)
        self.timeline.finish(time.monotonic())
        shared = self.team.share(number, self._report(outcome, kernel_lines(began)))
        return self.team.decide(number, lambda: self._decide(number, shared, logs))

    def _train(self, number: int, logs: Path) -> Outcome:
        """The ranks of this machine, from their start to their end."""
        try:
            attempt = Attempt(
                self.place,
                [*self.command, *(self.again if number > 1 else ())],
                logs,
                limits=self.limits,
                grace=self.grace,
                received=lambda: self.received,
                others=lambda: _ELSEWHERE if self.team.ended_elsewhere(number) else "",
                compiling=lambda here: self.team.compiling(number, here),
                on_look=self._look,
                on_trouble=self._tell_trouble,
            )
        except OSError as error:  # no process was started
            return Outcome(trouble=described(error, Path(error.filename or tempfile.gettempdir())))
        return attempt.run()

    def _tell_trouble(self, text: str) -> None:
        line = f"this machine's own disk takes nothing: {text}; ranks whose heartbeats stop do not hang"
        self.events.add("disk", line if text else "this machine's own disk has room again", trouble=text)

    def _look(self, beats: Mapping[int, Heartbeat]) -> None:
        self.timeline.look(beats)
        self._furthest = max([self._furthest, *(beat.step for beat in beats.values())])
        steps = next((beat for beat in beats.values() if beat.phase == STEP), None)
        if steps is not None and not self.judge.stepped:
            self.judge.stepped = True
            self.events.add("stepping", attempt=self.attempt, step=steps.first)

    def _report(self, outcome: Outcome, kernel: str) -> dict[str, Any]:
        """What the others must know of this machine's attempt."""
        report = asdict(outcome)
        report.pop("beats")
        facts = {"host": socket.gethostname(), "kernel": kernel, "reached": self._furthest, "fault": ""}
        report = {**report, **facts}
        report["fault"] = report_fault(report, self.checks)  # a rank says so; does the machine?
        return report

    def _decide(self, number: int, shared: dict[int, dict[str, Any]], logs: Path) -> dict[str, Any]:
        """On the first machine: {"exit": status or None, "pause": seconds, ...}."""
        reached = max(report["reached"] for report in shared.values())
        self._count_fruitless(reached)
        verdict, host = self.judge.judge(shared)
        end: dict[str, Any] = {"attempt": self.attempt, "step": reached}
        end |= {"kind": verdict.kind, "rule": verdict.rule}
        end |= {"reason": verdict.reason, "rank": verdict.rank, "node": host}
        end["codes"] = {rank: code for report in shared.values() for rank, code in report["codes"].items()}
        end["left"] = sum(report["left"] for report in shared.values())
        if verdict.kind == "done":
            self.events.add("end", **end)
            return {"exit": DONE}
        bare = verdict.kind == "recipe" and self._traces.are_all()
        where = "" if bare else f"; output of all ranks: {logs}"
        self.events.add("end", f"{verdict.reason}{where}", **end)
        stopped = [_after_signal(r["stopped"]) for r in shared.values() if r["stopped"] is not None]
        if stopped and verdict.kind != "lost":
            return {"exit": decisive(stopped)}
        # A signal that nobody sent to this job, but to a rank alone, is a reason to start again.
        if verdict.kind == "preempted" or verdict.action == "restart":
            over = any(is_over(report) for report in shared.values())
            return {"exit": REQUEUE} if over else self._again(number)
        if verdict.action == "stop":
            return {"exit": _CODES.get(verdict.kind, FAILED), "bare": bare}
        if verdict.action == "exclude":
            self._exclude(host)
            return {"exit": BAD_NODE, "why": f"{host} is bad"}
        raise AssertionError(f"{verdict.action} is no action")

    def _count_fruitless(self, reached: int) -> None:
        """An attempt bears fruit when it comes further than those before, or began further on."""
        began = max((span.first for span in self.timeline.spans), default=0)
        fruit = reached > self._best[0] or began > self._best[1]
        self._best = max(reached, self._best[0]), began
        self._fruitless = 0 if fruit else self._fruitless + 1

    def _again(self, number: int) -> dict[str, Any]:
        """Start again, unless the budget is spent."""
        if number > self.budget.restarts:
            return {"exit": FAILED, "why": f"{number - 1} restarts are the budget (--max-restarts)"}
        if self._fruitless >= self.budget.fruitless:
            why = f"{self._fruitless} attempts in a row came no further than step {self._best[0]}"
            return {"exit": FAILED, "why": why}
        pause = min(_LONGEST_PAUSE, self.budget.pause * 2.0 ** min(self._fruitless, 30))
        return {"exit": None, "pause": pause}

    def _exclude(self, host: str) -> None:
        path = self.logs / BAD_NODES
        with contextlib.suppress(OSError, ValueError):
            known = path.read_text(encoding="utf-8").split() if path.exists() else []
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(f"{name}\n" for name in dict.fromkeys([*known, host])), encoding="utf-8")

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.received is None:
            time.sleep(0.1)

    def _finish(self, decision: dict[str, Any]) -> None:
        spans = self.timeline.spans
        share, seconds = goodput(spans), {kind: round(s, 3) for kind, s in table(spans).items()}
        wall = spans[-1].end - spans[0].start
        line = f"{len(spans)} attempt{'s' * (len(spans) > 1)}, goodput {share:.1%} of {wall:.0f} s"
        if decision["exit"]:
            why = f": {decision['why']}" if "why" in decision else ""
            line = f"stopped with exit code {decision['exit']}{why}; {line}"
        values = {
            "node": self.place.node,
            "exit": decision["exit"],
            "why": decision.get("why", ""),
            "goodput": share,
        }
        if decision.get("bare"):
            self.events.say(line)
        else:
            self.events.add("finish", line, attempts=len(spans), wall=wall, seconds=seconds, **values)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM, SIGUSR1, SIGHUP and Ctrl-C stop the run; a second Ctrl-C at once."""

        def note(number: int, _frame: Any) -> None:
            if number == signal.SIGINT and self.received is not None:
                raise KeyboardInterrupt
            self.received = number

        with handling(note):
            yield


def _after_signal(number: int) -> int:
    """The exit status after a signal to the supervisor that stopped the run."""
    return INTERRUPTED if number == signal.SIGINT else REQUEUE
