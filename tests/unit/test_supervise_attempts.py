"""When a run is done, and what is left of its attempts: their numbers over jobs, their logs."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from hlat.checkpoint.codec import seal, write_bytes
from hlat.checkpoint.finished import lacking
from hlat.checkpoint.folder import FORMAT, MARKER, step_folder
from hlat.commands.sweep import reason
from hlat.observe.heartbeat import Pulse, unfinished
from hlat.observe.jsonl import read_rows
from hlat.observe.runfolder import RunFolder
from hlat.supervise.attempt import Attempt, Outcome, Place
from hlat.supervise.attempts import claim
from hlat.supervise.events import FILE
from hlat.supervise.logs import LogMirror
from hlat.supervise.supervisor import Budget, Supervisor
from hlat.supervise.watch import Limits


def test_the_mark_of_a_rank_that_is_not_done(tmp_path: Path) -> None:
    marks = [Pulse(tmp_path, rank) for rank in (0, 7)]
    assert unfinished(tmp_path) == [0, 7]
    marks[0].finish()
    marks[0].finish()
    assert unfinished(tmp_path) == [7]


@pytest.mark.parametrize(("writes", "code"), [("", 1), ('{"codes": {}}', 0)])
def test_a_launcher_that_gives_no_account_of_its_ranks_has_not_ended_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writes: str, code: int
) -> None:
    script = "import sys; sys.argv[2] and open(sys.argv[1], 'w').write(sys.argv[2])"
    monkeypatch.setattr(
        "hlat.supervise.attempt.module",
        lambda name, result, *rest: [sys.executable, "-c", script, result, writes],
    )
    monkeypatch.setattr("hlat.supervise.processes.end_all", lambda but: [])
    attempt = Attempt(Place(), ["hlat", "train"], tmp_path / "logs", limits=Limits(), grace=1.0)
    (attempt.scratch / "rank-00004.unfinished").touch()
    outcome = attempt.run()
    assert (outcome.code, outcome.codes, outcome.unfinished) == (code, {}, [4])


def checkpoint(root: Path, step: int) -> Path:
    """A complete one with a single file."""
    folder = step_folder(root, step)
    folder.mkdir(parents=True)
    facts = {"data.bin": write_bytes(folder / "data.bin", b"abc")}
    (folder / MARKER).write_bytes(seal({"format": FORMAT, "step": step, "files": facts}))
    return folder


def test_a_run_is_done_with_a_complete_checkpoint_of_its_last_step(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert lacking(run, 20) == "there is no complete checkpoint; the last step is 20"
    checkpoint(run.checkpoints, 10)
    last = checkpoint(run.checkpoints, 20)
    (run.checkpoints / ".step-00000030.partial-1-host").mkdir()
    assert lacking(run, 20) == lacking(run, 15) == "", "one that went further needs nothing either"
    assert lacking(run, 2100) == "the newest complete checkpoint is of step 20 of 2,100"
    (last / "data.bin").write_bytes(b"ab")
    assert lacking(run, 20) == "the newest complete checkpoint is of step 10 of 20"
    (run.checkpoints / "step-00000010" / MARKER).unlink()
    assert lacking(run, 10) == "there is no complete checkpoint; the last step is 10"
    nxd = run.nxd_checkpoints / "step-000000020"
    nxd.mkdir(parents=True)
    assert lacking(run, 20) and not (nxd / "done").touch() and not lacking(run, 20)
    assert reason(0, "") == "clean: every rank ended with status 0 before the run was done"  # of a sweep


def test_attempts_are_numbered_over_jobs(tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    assert [claim(logs), claim(logs), claim(logs)] == [1, 2, 3]
    (logs / "attempt-3").rmdir()
    (logs / FILE).write_text('{"event": "start", "attempt": 11}\n{"attempt": "x"}\n{"attempt": true}\n{torn')
    (logs / "attempt-12").write_text("a file")
    assert claim(logs) == 13 and (logs / "attempt-13").is_dir()
    assert claim(logs, after=20) == 21
    (tmp_path / "file").write_text("")
    assert claim(tmp_path / "file") == 1 and claim(tmp_path / "file", after=1) == 2  # no room: a guess


def test_two_supervisors_never_have_the_same_number(tmp_path: Path) -> None:
    numbers: list[int] = []
    threads = [
        threading.Thread(target=lambda: numbers.extend(claim(tmp_path / "logs") for _ in range(20)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 81))


def test_a_job_that_starts_again_keeps_the_logs_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two jobs of two attempts each; a rank prints a line, and leaves stacks."""

    class Fake:
        def __init__(self, place: Place, command: list[str], logs: Path, **values: Any) -> None:
            self.logs, self.mirror = logs, LogMirror(tmp_path / "scratch", logs)

        def run(self) -> Outcome:
            source = tmp_path / "scratch" / "0" / "stdout.log"
            source.parent.mkdir(parents=True, exist_ok=True)
            source.write_text(f"line {next(count)}\n")
            self.mirror.sync(last=True)
            return next(ends)

    count, ends = iter(range(1, 9)), iter([Outcome(codes={0: -9}), Outcome(code=0)] * 2)
    monkeypatch.setattr("hlat.supervise.supervisor.Attempt", Fake)
    for _ in range(2):
        made = Supervisor(["hlat"], tmp_path, Place(), limits=Limits(), budget=Budget(pause=0.0))
        assert made.run() == 0
    kept = {path.parent.name: path.read_text() for path in made.logs.glob("*/rank-00000-stdout.log")}
    assert kept == {f"attempt-{n}": f"line {n}\n" for n in (1, 2, 3, 4)}
    rows = list(read_rows(made.events.path))
    for event in ("start", "end"):
        assert [row["attempt"] for row in rows if row["event"] == event] == [1, 2, 3, 4]
    assert [row["attempts"] for row in rows if row["event"] == "finish"] == [2, 2]


def test_a_copy_that_is_there_already_is_added_to(tmp_path: Path) -> None:
    source = tmp_path / "scratch" / "0" / "stderr.log"
    source.parent.mkdir(parents=True)
    for text in ("one\n", "two\n"):  # the number was a guess, and the same
        source.write_text(text)
        mirror = LogMirror(tmp_path / "scratch", tmp_path / "logs")
        mirror.sync()
        mirror.sync(last=True)
    assert (tmp_path / "logs" / "rank-00000-stderr.log").read_text() == "one\ntwo\n"
