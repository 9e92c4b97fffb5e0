"""Why a run ended, from what is left of it: exit statuses, logs, the kernel's lines. Pure; imports no torch.

    verdict = classify(Evidence({0: 1, 1: -9}, text, kernel_lines(started)))
    if verdict.action == "restart": ...

`action` is what to do, `kind` says whose fault it is. The rules and their order are in
`hlat.supervise.failure_table`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from hlat.observe.redact import redact
from hlat.observe.terminal import escaped
from hlat.supervise.failure_rows import Action, Kind, Row
from hlat.supervise.failure_table import (
    BENIGN,
    CHOSEN,
    CLEAN,
    DEFECT,
    DEVICE_ECHOES,
    HOST_ECHOES,
    LOST,
    PREEMPTED,
    TABLE,
)
from hlat.supervise.kernel import kernel_lines
from hlat.supervise.patterns import compiled

__all__ = ["Evidence", "Verdict", "classify", "kernel_lines"]

_MOST_TEXT = 1 << 20  # characters, from the end
_LONGEST_LINE, _LONGEST_REASON = 2000, 400
_RANK = re.compile(r"\brank\W?(\d{1,6})\b", re.IGNORECASE)
_TRACEBACK = "Traceback (most recent call last):"
_CHAINED = ("During handling of the above exception", "The above exception was the direct cause")
_FAILED = re.compile(r"\brank \d+ \([^)]{0,200}\)(?= failed:)")
_EXCEPTION = re.compile(r"[A-Za-z_][\w.]*(?::|$)")
# The launcher's summary of its workers, and the ends of a rank that was told to end.
_NO_CAUSE = re.compile(r"ChildFailedError|SignalException|^(?:KeyboardInterrupt|SystemExit)\b")
_ECHO = {row.name for row in (*DEVICE_ECHOES, *HOST_ECHOES)}


@dataclass(frozen=True)
class Evidence:
    """What is known of an attempt that ended.

    exit_codes: status by rank as subprocess gives it, negative for a signal. text: the end of the ranks'
    logs. kernel: its messages since the start (`kernel_lines`). hang: a rank came no further within its
    phase's limit. believed: whether what ranks print may make their machine a bad one; they print
    their data, too.
    """

    exit_codes: Mapping[int, int] = field(default_factory=dict)
    text: str = ""
    kernel: str = ""
    hang: bool = False
    believed: bool = True


@dataclass(frozen=True)
class Verdict:
    """Whose fault (kind), what to do (action), why in one line without secrets, the rule that says so, and
    the rank to name if there is one.

    A node with action "restart" is excluded when the same rule names it again.
    """

    kind: Kind
    action: Action
    reason: str
    rule: str
    rank: int | None = None


def classify(evidence: Evidence) -> Verdict:
    """The verdict of the first rule of the table that matches. Never raises for any text and any statuses."""
    codes = {rank: code for rank, code in sorted(evidence.exit_codes.items()) if code}
    if evidence.exit_codes and not codes and not evidence.hang:
        return _verdict(CLEAN, None, "")
    lines = {"kernel": _lines(evidence.kernel), "text": _lines(evidence.text)}
    lines["both"] = [*lines["kernel"], *lines["text"]]
    for row in TABLE:
        found: tuple[int | None, str] | None = None
        if row is PREEMPTED:
            if not evidence.hang and all(code in row.codes for code in codes.values()):
                found = _status(row, codes, lines["text"])
        elif row is DEFECT:
            found = _defect(lines["text"], codes)
        elif row.where == "status":
            found = _status(row, codes, lines["text"])
        elif row.where == "flag":
            if evidence.hang or row.name != "hang":
                found = _suspect(codes), ""
        elif line := _search(row, lines[_place(row, evidence)]):
            found = _rank(row, line, codes, line in lines["kernel"]), line
        if found is not None:
            return _verdict(row, *found)
    raise AssertionError("the last row of the table matches everything")


def _lines(text: str) -> list[str]:
    """The lines that may say something: printable, not too long, without the benign ones."""
    lines = (line[:_LONGEST_LINE] for line in text[-_MOST_TEXT:].splitlines())
    benign = compiled(tuple(pattern for pattern, _ in BENIGN))
    return [line for line in lines if line.strip() and not benign.search(line)]


def _place(row: Row, evidence: Evidence) -> str:
    accuses = row.kind == "node" and row.action != "stop"
    return "kernel" if accuses and not evidence.believed else row.where


def _search(row: Row, lines: list[str]) -> str:
    pattern = compiled(row.patterns)
    return next((line for line in lines if pattern.search(line)), "")


def _status(row: Row, codes: Mapping[int, int], lines: list[str]) -> tuple[int | None, str] | None:
    """The rank with such a status, None for several of them, and what HLAT printed for a status it chose."""
    found = [rank for rank, code in codes.items() if code in row.codes]
    if not found:
        return None
    who = f"status {codes[found[0]]}" + (f" of ranks {', '.join(map(str, found[:8]))}" if found[1:] else "")
    said = next((line for line in lines if "hlat: error: " in line), "") if row in (*CHOSEN, LOST) else ""
    return found[0] if len(found) == 1 else None, f"{who}; {said}" if said else who


def _defect(lines: list[str], codes: Mapping[int, int]) -> tuple[int | None, str] | None:
    """The first exception that no row with patterns explains; only where a rank ended with status 1."""
    if codes and 1 not in codes.values():
        return None
    explained = compiled(tuple(pattern for row in TABLE for pattern in row.patterns))
    for line in _exceptions(lines):
        if not explained.search(line) and not _NO_CAUSE.search(line):
            return _rank(DEFECT, line, codes), line
    return None


def _exceptions(lines: list[str]) -> list[str]:
    """The last line of every traceback, whatever a launcher puts before it; of a chain only the last."""
    found, at = [], 0
    while at < len(lines):
        column = lines[at].find(_TRACEBACK)
        prefix = lines[at][: max(column, 0)]
        if name := _FAILED.search(lines[at - 1]) if at else None:
            prefix = f"{prefix}{name[0]}: "
        at += 1
        if column < 0:
            continue
        while at < len(lines) and not _EXCEPTION.match(lines[at][column:]):
            at += 1
        if at < len(lines):
            follows = " ".join(lines[at + 1 : at + 2])
            if not any(text in follows for text in _CHAINED):
                found.append(f"{prefix}{lines[at][column:]}".strip())
    return found


def _rank(row: Row, line: str, codes: Mapping[int, int], kernel: bool = False) -> int | None:
    """The rank a line names, else the one that failed by itself. An echo is of who was left."""
    named = _RANK.search(line.rpartition(" because ")[2])
    if named and row.name not in _ECHO:
        return int(named[1])
    return _suspect(codes, killed=kernel)


def _suspect(codes: Mapping[int, int], killed: bool = False) -> int | None:
    """The only rank that was killed, else (unless `killed`) the only one that was not merely told to end."""
    own = [rank for rank, code in codes.items() if code not in PREEMPTED.codes]
    dead = [rank for rank in own if codes[rank] < 0 or codes[rank] > 128]
    for alone in (dead,) if killed else (dead, own):
        if len(alone) == 1:
            return alone[0]
    return None


def _verdict(row: Row, rank: int | None, detail: str) -> Verdict:
    who = f"rank {rank}: " if rank is not None else ""
    text = f"{who}{row.name}: {row.meaning}" + (f" ({detail.strip()})" if detail else "")
    reason = " ".join(redact(escaped(text)).split())
    if len(reason) > _LONGEST_REASON:
        reason = f"{reason[: _LONGEST_REASON - 1]}…"
    return Verdict(row.kind, row.action, reason, row.name, rank)
