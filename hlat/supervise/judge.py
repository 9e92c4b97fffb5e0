"""Why an attempt ended, from what all machines of a job say of it."""

from __future__ import annotations

import re
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hlat.errors import FolderLost
from hlat.observe.stopping import SPOT, text_of
from hlat.supervise.classify import Evidence, Verdict, classify
from hlat.supervise.failure_table import TABLE
from hlat.supervise.node import is_bad
from hlat.supervise.scratch import room
from hlat.supervise.watch import name_the_late

if TYPE_CHECKING:
    from hlat.doctor.finding import Finding

_SAVED = re.compile(r"\bstopped by .{1,80} after step \d+; state saved")  # rank 0's last line
_WARNING = re.compile(r"Warning: |\bwarning: ")  # told, and survived: not why a rank ended
_SPOT_NOTICE = text_of(SPOT)
_TWICE = 2  # the same fault of the same machine, in a job of several: it is a bad one
_ORDER = {row.name: number for number, row in enumerate(TABLE)}
_FOLLOW = ("signal", "late-start")  # what is left on a machine when ranks of another have ended, or not come


class Judge:
    """Remembers which machines were at fault.

    Args:
        count: of machines.
        run: the run folder.
        lacking: what the run lacks to be done when all ranks have ended with status 0; empty: nothing.
    """

    def __init__(self, count: int, run: Path, lacking: Callable[[], str]) -> None:
        self.count, self.run_folder, self.lacking = count, run, lacking
        self.stepped = False  # whether this attempt has begun to train
        self._faults: Counter[tuple[str, str]] = Counter()  # (rule, machine)

    def judge(self, shared: dict[int, dict[str, Any]]) -> tuple[Verdict, str]:
        """Why the attempt ended, and on which machine. The order of these questions, then of the rows of the
        table, is that of docs/operations/node-checks.md.
        """
        for report in shared.values():  # before all else: who has taken the run over must not be disturbed
            if FolderLost.exit_code in report["codes"].values():
                return self._classify(report), report["host"]
        missing = [node for node in range(self.count) if node not in shared]
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
        verdict, host = min(verdicts, key=lambda pair: _precedence(pair[0]))
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
            if not self.stepped:
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
        again = self._faults[verdict.rule, host] >= _TWICE and self.count > 1
        exclude = again and verdict.action == "restart" and host != ""
        return replace(verdict, action="exclude") if exclude else verdict

    def _classify(self, report: dict[str, Any]) -> Verdict:
        """What the evidence says. That a machine is bad is believed when its kernel or its checks say so: the
        ranks print what they like, their data and other people's errors too.
        """
        evidence = evidence_of(report)
        verdict = classify(evidence)
        if verdict.rule == "disk-full":
            free = f"{self.run_folder}: {room(self.run_folder)}; {tempfile.gettempdir()}: "
            return replace(verdict, reason=f"{verdict.reason}; {free}{room(Path(tempfile.gettempdir()))}")
        if not accuses(verdict) or accuses(classify(Evidence(kernel=report["kernel"]))):
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


def report_fault(report: Mapping[str, Any], findings: Callable[[], Iterable[Finding]]) -> str:
    """What the checks of a machine say against it, asked where only its ranks' output does."""
    if accuses(classify(evidence_of(report))) and not accuses(classify(Evidence(kernel=report["kernel"]))):
        return faults(findings())
    return ""


def _precedence(verdict: Verdict) -> tuple[bool, int]:
    """As the rows of the table stand, but last what follows from the end of another machine's ranks."""
    return verdict.rule in _FOLLOW, _ORDER[verdict.rule]


def evidence_of(report: Mapping[str, Any]) -> Evidence:
    """What one machine knows of an attempt that ended."""
    return Evidence(
        exit_codes={int(rank): code for rank, code in report["codes"].items()},
        text="\n".join(line for line in report["text"].splitlines() if not _WARNING.search(line)),
        kernel=report["kernel"],
        hang=report["hang"],
    )


def accuses(verdict: Verdict) -> bool:
    """Whether it makes the machine a bad one, now or the second time."""
    return verdict.kind == "node" and verdict.action != "stop"


def faults(findings: Iterable[Finding]) -> str:
    """The findings that speak against the machine itself, in one line."""
    return "; ".join(f"{finding.check}: {finding.fact}" for finding in is_bad(findings))


def is_over(report: Mapping[str, Any]) -> bool:
    """Whether ranks saved because the job's time ends or its machine is taken back."""
    return 128 + signal.SIGUSR1 in report["codes"].values() or _SPOT_NOTICE in report["text"]
