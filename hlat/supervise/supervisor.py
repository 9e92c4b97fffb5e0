"""Starts a run, watches it, and starts it again from the newest complete checkpoint until it is done."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hlat.errors import FolderLost
from hlat.observe.heartbeat import STEP, Heartbeat
from hlat.observe.stopping import SPOT, handling, text_of
from hlat.supervise import processes
from hlat.supervise.attempt import Attempt, Outcome, Place
from hlat.supervise.attempts import claim, folder_of
from hlat.supervise.classify import Evidence, Verdict, classify, kernel_lines
from hlat.supervise.events import BAD_NODES, FOLDER, Events
from hlat.supervise.goodput import Timeline, goodput, table
from hlat.supervise.node import is_bad
from hlat.supervise.scratch import described, room
from hlat.supervise.team import Team
from hlat.supervise.watch import Limits, name_the_late

if TYPE_CHECKING:
    from hlat.doctor.finding import Finding

DONE, FAILED, REQUEUE, BAD_NODE = 0, 1, 75, 76
_CODES = {"recipe": 2, "anomaly": 3, "software": FAILED, "lost": FolderLost.exit_code}
_SAVED = re.compile(r"\bstopped by .{1,80} after step \d+; state saved")  # rank 0's last line
_WARNING = re.compile(r"Warning: |\bwarning: ")  # told, and survived: not why a rank ended
SPOT_NOTICE = text_of(SPOT)
_LONGEST_PAUSE = 300.0
_ELSEWHERE = "another machine's ranks have ended"
_TWICE = 2  # the same fault of the same machine, in a job of several: it is a bad one


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
        self.team, self.checks, self.lacking = team or Team(), checks, lacking
        self.attempt = 0
        self.logs = run / FOLDER
        self.events = Events(self.logs, quiet=place.node > 0)
        self.timeline = Timeline()
        self.received: int | None = None
        self._faults: Counter[tuple[str, str]] = Counter()  # (rule, machine)
        self._furthest, self._steps = 0, False  # highest step seen; whether this attempt trains yet
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
        fault = _faults(findings)
        came = self.team.ready(number, socket.gethostname(), fault)
        if len(came) < self.team.count:
            missing = [str(node) for node in range(self.team.count) if node not in came]
            line = f"not all machines came to start; missing: node {', '.join(missing)}"
            self.events.add("no-start", line)
            return FAILED
        unfit = {host: what for host, what in came.values() if what}
        for host, what in unfit.items():
            if self.place.node == 0:
                self._exclude(host)
            self.events.add("no-start", f"{host} is unfit to train: {what}", node=host)
        return BAD_NODE if unfit else None

    def _one(self, number: int) -> dict[str, Any]:
        """This job's attempt of that number, and what all machines decide after it."""
        self.attempt = self.team.number(number, lambda: claim(self.logs, self.attempt))
        began, self._steps = time.time(), False
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
        if steps is not None and not self._steps:
            self._steps = True
            self.events.add("stepping", attempt=self.attempt, step=steps.first)

    def _report(self, outcome: Outcome, kernel: str) -> dict[str, Any]:
        """What the others must know of this machine's attempt."""
        report = asdict(outcome)
        report.pop("beats")
        facts = {"host": socket.gethostname(), "kernel": kernel, "reached": self._furthest, "fault": ""}
        report = {**report, **facts}
        if _accuses(classify(_evidence(report))) and not _accuses(classify(Evidence(kernel=kernel))):
            report["fault"] = _faults(self.checks())  # a rank says so; does the machine?
        return report

    def _decide(self, number: int, shared: dict[int, dict[str, Any]], logs: Path) -> dict[str, Any]:
        """On the first machine: {"exit": status or None, "pause": seconds, ...}."""
        reached = max(report["reached"] for report in shared.values())
        self._count_fruitless(reached)
        verdict, host = self._judge(shared)
        end: dict[str, Any] = {"attempt": self.attempt, "step": reached}
        end |= {"kind": verdict.kind, "rule": verdict.rule}
        end |= {"reason": verdict.reason, "rank": verdict.rank, "node": host}
        end["codes"] = {rank: code for report in shared.values() for rank, code in report["codes"].items()}
        end["left"] = sum(report["left"] for report in shared.values())
        if verdict.kind == "done":
            self.events.add("end", **end)
            return {"exit": DONE}
        self.events.add("end", f"{verdict.reason}; output of all ranks: {logs}", **end)
        stopped = next((r["stopped"] for r in shared.values() if r["stopped"] is not None), None)
        if stopped is not None and verdict.kind != "lost":
            return {"exit": _after_signal(stopped)}
        if verdict.kind == "preempted":
            if any(_is_over(report) for report in shared.values()):
                return {"exit": REQUEUE}
            return self._again(number)  # nobody asked this job to end: a rank alone was sent a signal
        if verdict.action == "stop":
            return {"exit": _CODES.get(verdict.kind, FAILED)}
        if verdict.action == "exclude":
            self._exclude(host)
            return {"exit": BAD_NODE, "why": f"{host} is bad"}
        return self._again(number)

    def _count_fruitless(self, reached: int) -> None:
        """An attempt bears fruit when it comes further than those before, or began further on."""
        began = max((span.first for span in self.timeline.spans), default=0)
        fruit = reached > self._best[0] or began > self._best[1]
        self._best = max(reached, self._best[0]), began
        self._fruitless = 0 if fruit else self._fruitless + 1

    def _judge(self, shared: dict[int, dict[str, Any]]) -> tuple[Verdict, str]:
        """Why the attempt ended, and on which machine."""
        for report in shared.values():  # before all else: who has taken the run over must not be disturbed
            if FolderLost.exit_code in report["codes"].values():
                return self._classify(report), report["host"]
        missing = [node for node in range(self.team.count) if node not in shared]
        if missing:
            names = ", ".join(f"node {node}" for node in missing)
            return Verdict("peer", "restart", f"no answer from {names}", "silent-node", None), names
        early = self._early_end(shared) if all(r["code"] == 0 for r in shared.values()) else None
        if early == "":
            return Verdict("done", "stop", "", "", None), ""
        if any(r["stopped"] is not None for r in shared.values()):
            how = self._what_was_saved(shared, early)
            return Verdict("preempted", "stop", f"stopped by a signal; {how}", "signal", None), ""
        hung = any(r["hang"] for r in shared.values())
        if hung:
            return self._name_the_hang(shared)
        if early is not None:
            clean = classify(Evidence({0: 0}))
            return replace(clean, reason=f"{clean.reason}: {early}"), ""
        if mute := next((r for r in shared.values() if r["trouble"] and not r["codes"]), None):
            text = f"no account of the ranks; this machine's disk takes nothing: {mute['trouble']}"
            return Verdict("store", "restart", text, "scratch-disk", None), mute["host"]
        verdicts = [(self._classify(report), report["host"]) for report in shared.values()]
        rank = {"recipe": 0, "anomaly": 1, "node": 2, "software": 3, "store": 4}
        verdict, host = min(verdicts, key=lambda pair: rank.get(pair[0].kind, 9))
        return (self._again_bad(verdict, host) if verdict.kind == "node" else verdict), host

    def _what_was_saved(self, shared: dict[int, dict[str, Any]], early: str | None) -> str:
        """By an attempt that a signal to the supervisor ended. That ranks ended as they do after a save says
        little: before their first step they end so, too.
        """
        codes = {code for report in shared.values() for code in report["codes"].values()}
        late = next((r["why"] for r in shared.values() if r["stopped"] and r["why"]), "")
        if early is None and codes <= {128 + signal.SIGTERM, 128 + signal.SIGHUP} and not late:
            if any(_SAVED.search(report["text"]) for report in shared.values()):
                return "state saved"
            if not self._steps:
                return "no step was done, and nothing is saved that was not before"
        return f"{late or 'not all ranks saved'}: the newest checkpoint stands"

    def _early_end(self, shared: dict[int, dict[str, Any]]) -> str:
        """What is missing although all ranks ended with status 0; empty when the run is done. A library, or a
        plug-in, may end a process so at any time.
        """
        ranks = sorted(rank for report in shared.values() for rank in report["unfinished"])
        if lacking := self.lacking():
            return lacking
        return f"rank {', '.join(map(str, ranks))} had more to do" if ranks else ""

    def _again_bad(self, verdict: Verdict, host: str) -> Verdict:
        """A machine that shows the same fault again is excluded, where there are others."""
        self._faults[verdict.rule, host] += 1
        again = self._faults[verdict.rule, host] >= _TWICE and self.team.count > 1
        exclude = again and verdict.action == "restart" and host != ""
        return replace(verdict, action="exclude") if exclude else verdict

    def _classify(self, report: dict[str, Any]) -> Verdict:
        """What the evidence says. That a machine is bad is believed when its kernel or its checks say so: the
        ranks print what they like, their data and other people's errors too.
        """
        evidence = _evidence(report)
        verdict = classify(evidence)
        if verdict.rule == "disk-full":
            free = f"{self.run_folder}: {room(self.run_folder)}; {tempfile.gettempdir()}: "
            return replace(verdict, reason=f"{verdict.reason}; {free}{room(Path(tempfile.gettempdir()))}")
        if not _accuses(verdict) or _accuses(classify(Evidence(kernel=report["kernel"]))):
            return verdict
        if fault := report.get("fault"):
            return replace(verdict, reason=f"{verdict.reason}; the check of this machine: {fault}")
        other = classify(replace(evidence, believed=False))
        doubt = f"its output names {verdict.rule}, which neither the kernel's log nor the check of"
        return replace(other, reason=f"{other.reason}; {doubt} {report['host']} confirms")

    def _name_the_hang(self, shared: dict[int, dict[str, Any]]) -> tuple[Verdict, str]:
        """Who hung. A machine that does so again in a job of several is taken for a bad one."""
        signs = {r["host"]: (list(r["signs"][0]), list(r["signs"][1])) for r in shared.values() if r["signs"]}
        why = next(r["why"] for r in shared.values() if r["hang"])
        rank, text = name_the_late(signs, time.time())
        host = next((h for h, (_, s) in signs.items() if any(i["rank"] == rank for i in s)), "")
        hardware = [(self._classify(report), report["host"]) for report in shared.values()]
        if bad := next((pair for pair in hardware if pair[0].action == "exclude"), None):
            return bad
        named = rank if rank >= 0 else None
        return self._again_bad(Verdict("hang", "restart", f"{why}: {text}", "hang", named), host), host

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


def _evidence(report: Mapping[str, Any]) -> Evidence:
    return Evidence(
        exit_codes={int(rank): code for rank, code in report["codes"].items()},
        text="\n".join(line for line in report["text"].splitlines() if not _WARNING.search(line)),
        kernel=report["kernel"],
        hang=report["hang"],
    )


def _after_signal(number: int) -> int:
    """The exit status after a signal to the supervisor that stopped the run."""
    return 130 if number == signal.SIGINT else REQUEUE


def _accuses(verdict: Verdict) -> bool:
    """Whether it makes the machine a bad one, now or the second time."""
    return verdict.kind == "node" and verdict.action != "stop"


def _faults(findings: Iterable[Finding]) -> str:
    return "; ".join(f"{finding.check}: {finding.fact}" for finding in is_bad(findings))


def _is_over(report: Mapping[str, Any]) -> bool:
    """Whether ranks saved because the job's time ends or its machine is taken back."""
    return 128 + signal.SIGUSR1 in report["codes"].values() or SPOT_NOTICE in report["text"]
