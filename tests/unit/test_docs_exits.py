"""Exit codes in the documentation and in launch templates are those of the code."""

from __future__ import annotations

import re
import signal
import sys
from pathlib import Path

import pytest

from hlat import errors
from hlat.observe import stopping
from hlat.supervise import supervisor

sys.path.insert(0, str(Path(__file__).parent))
from docs_pages import ROOT, number, prose, table

OF_ERRORS = {
    item.exit_code
    for item in vars(errors).values()
    if isinstance(item, type) and issubclass(item, errors.UserError)
}
OF_SIGNALS = {
    stopping.exit_status(cause) for cause in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, stopping.HANGUP)
}


def numbers(cell: str) -> list[int]:
    """The exit codes in a cell."""
    return [int(word) for word in re.findall(r"\b\d{1,3}\b", re.sub(r"\]\([^)]*\)", "", cell))]


def test_codes_of_supervise() -> None:
    told = {int(row[0]) for row in table("docs/operations.md", "exit code", "meaning").rows}
    own = {supervisor.DONE, supervisor.FAILED, supervisor.REQUEUE, supervisor.BAD_NODE, 128 + signal.SIGINT}
    # A rank that could not save is started again; what is left is that the budget is spent.
    assert told == own | OF_ERRORS - {errors.StorageFailed.exit_code}


def test_codes_of_ranks() -> None:
    told = {
        code
        for row in table("docs/failures.md", "what happened", "on stderr", "exit").rows
        for code in numbers(row[2])
    }
    assert told == OF_ERRORS | OF_SIGNALS | {1}


CAUSES = {
    "SIGTERM": signal.SIGTERM,
    "SIGUSR1": signal.SIGUSR1,
    "SIGHUP": stopping.HANGUP,
    "the first Ctrl-C": signal.SIGINT,
    "the end of the job's time": stopping.WALLTIME,
    "EC2 will take": stopping.SPOT,
}


def test_codes_of_signals() -> None:
    rows = {
        row[0]: row[2]
        for row in table("docs/operations/signals.md", "what comes", "what happens", "exit").rows
    }
    for start, cause in CAUSES.items():
        found = [code for what, code in rows.items() if what.startswith(start)]
        assert found == [str(stopping.exit_status(cause))], start
    assert {what for what, code in rows.items() if not code} == {"EC2 recommends to rebalance"}
    assert len(rows) == len(CAUSES) + 1


def test_codes_of_manifests() -> None:
    """What fails a Job of Kubernetes, and what becomes a signal's status for PyTorchJobs."""
    job = (ROOT / "launch/templates/job.yaml").read_text(encoding="utf-8")
    values = re.search(r"onExitCodes: .*values: \[([\d, ]+)\]", job)
    page = prose(ROOT / "docs/operations/launch.md")
    told = re.search(r"Exit codes ([\d, and]+) of any pod\s+fail the Job at once", page)
    assert values is not None and told is not None
    assert numbers(values[1]) == numbers(told[1])
    assert set(numbers(values[1])) == {supervisor.FAILED} | OF_ERRORS - {errors.StorageFailed.exit_code}
    turned = re.search(
        r"case \$code in ([\d |]+)\) code=(\d+)", (ROOT / "launch/templates/exitcode.sh").read_text()
    )
    again = re.search(r"so ([\d and]+) become\s+(\d+) there", page)
    assert turned is not None and again is not None
    assert numbers(turned[1]) == numbers(again[1]) == [supervisor.REQUEUE, supervisor.BAD_NODE]
    assert int(turned[2]) == int(again[2]) == 128 + signal.SIGTERM


@pytest.mark.parametrize("page", ["docs/operations/storage.md", "docs/checkpoints.md", "docs/run-folder.md"])
def test_codes_in_the_text(page: str) -> None:
    """A code that a sentence names is one that HLAT chooses."""
    known = OF_ERRORS | OF_SIGNALS | {supervisor.FAILED, supervisor.REQUEUE, supervisor.BAD_NODE}
    text = prose(ROOT / page)
    told = [
        number(code) for code in re.findall(r"(?:exit code|ends? with|status)\s+(?:is )?\**(\d{1,3})\b", text)
    ]
    assert told and set(told) <= known
