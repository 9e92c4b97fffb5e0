"""What a check found: a status, the fact, and the lines that repair it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hlat.backend.neuron.release import pip_line

Status = Literal["ok", "warn", "fail"]
SCHEMA = 1


@dataclass(frozen=True)
class Finding:
    """One result.

    check: what was checked, a stable name such as 'package.torch-neuronx'.
    status: 'ok'; 'warn', training may work but should not be trusted to; 'fail', it will not.
    fact: what was found, in a few words, with the value.
    fix: commands for a shell, in order; empty when nothing is to be done or no command does it.
    advice: what to do where no command does it.
    """

    check: str
    status: Status
    fact: str
    fix: tuple[str, ...] = ()
    advice: str = ""
    requirement: str = ""  # what pip has to install; it makes the fix

    @property
    def commands(self) -> tuple[str, ...]:
        """The fix, with the pip line of a missing package."""
        return (*self.fix, pip_line([self.requirement])) if self.requirement else self.fix

    def to_dict(self) -> dict[str, Any]:
        """As `hlat doctor --json` prints it."""
        return {
            "check": self.check,
            "status": self.status,
            "fact": self.fact,
            "fix": list(self.commands),
            "advice": self.advice,
        }


def healthy(findings: list[Finding]) -> bool:
    """Whether nothing failed."""
    return all(finding.status != "fail" for finding in findings)


def plan(findings: list[Finding]) -> list[str]:
    """The commands of every finding that is not ok, in the order to run them, each once.

    Findings come in that order (system first, Python packages after). What pip has to install becomes one
    line at the place of the last such finding, so that placeholders are uninstalled before.
    """
    wrong = [finding for finding in findings if finding.status != "ok"]
    wanted = [finding.requirement for finding in wrong if finding.requirement]
    last = next((finding for finding in reversed(wrong) if finding.requirement), None)
    lines: list[str] = []
    for finding in wrong:
        lines += finding.fix
        if finding is last:
            lines.append(pip_line(wanted))
    return list(dict.fromkeys(lines))
