"""A full disk of a machine is told as that: heartbeats have room, what is not written accuses nobody."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from hlat.observe.heartbeat import SLOT, Heartbeat, Pulse, decode, encode, heartbeat_file, read_all
from hlat.observe.jsonl import read_rows
from hlat.supervise import attempt as attempts
from hlat.supervise.attempt import Attempt, Place
from hlat.supervise.scratch import Scratch, room, write_result
from hlat.supervise.supervisor import Budget, Supervisor
from hlat.supervise.watch import Limits

LIMITS = Limits(0.2, 0.2, 0.2, 0.2, 0.2)


def test_a_heartbeat_is_rewritten_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "rank-00002.json").write_bytes(bytes(SLOT))
    assert read_all(tmp_path) == {}, "set aside, not written yet"
    pulse = Pulse(tmp_path, 2)
    pulse.write()
    before = pulse.path.stat()
    pulse.pace.begin(7, "training")
    pulse.write()
    after = pulse.path.stat()
    assert (before.st_ino, before.st_size) == (after.st_ino, after.st_size) and after.st_size == SLOT
    assert read_all(tmp_path)[2].step == 7


def test_a_heartbeat_that_is_half_written_is_none() -> None:
    old, new = (
        encode(Heartbeat(0, 1, step, "training", stamp, stamp)) for step, stamp in ((7, 199.9), (8, 200.1))
    )
    assert decode(new).step == 8 and decode(old).stamp == 199.9
    torn = {new[:cut] + old[cut:] for cut in range(SLOT)} - {old, new}
    assert torn
    for data in (*torn, b"", bytes(SLOT), new[:-1]):
        with pytest.raises(ValueError):
            decode(data)
    long = encode(Heartbeat(0, 1, 3, "x", 0.0, 0.0, where="w" * SLOT, spent={"p" * SLOT: 1.0}))
    assert len(long) == SLOT and decode(long).step == 3


def test_the_room_that_is_set_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = Scratch(range(8, 10))
    assert made.path.parent == tmp_path and made.trouble(silent=True) == "" and made.read_result() is None
    files = [heartbeat_file(made.path, rank) for rank in (8, 9)]
    assert all(file.stat().st_blocks * 512 >= SLOT for file in files)
    size = made.result.stat().st_size
    write_result(made.result, {"codes": {"1": -9}})
    assert made.read_result() == {"codes": {"1": -9}} and made.result.stat().st_size == size
    made.remove()
    assert str(made.path) in made.trouble() and "No such file" in made.trouble()
    assert " free" in room(tmp_path / "not" / "there") and "files" in room(tmp_path)


@pytest.mark.parametrize("kind", ["no room", "read-only", "quota"])
def test_what_a_disk_refuses_is_said_with_what_is_free(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made, facts = Scratch([0]), os.statvfs(tmp_path)
    number = {"no room": errno.ENOSPC, "read-only": errno.EROFS, "quota": errno.EDQUOT}[kind]

    class Facts:
        f_bavail = 0 if kind == "no room" else facts.f_bavail
        f_flag = facts.f_flag | (os.ST_RDONLY if kind == "read-only" else 0)
        f_frsize, f_files, f_favail, f_blocks = facts.f_frsize, 1000, 7, facts.f_blocks

    monkeypatch.setattr(os, "statvfs", lambda path: Facts)
    assert made.trouble() == "", "root may have room where others have none: it is tried"

    def refuse(self: Path, *arguments: Any, **more: Any) -> None:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "open", refuse)
    assert (made.trouble() == "") == (kind == "quota"), "a quota shows only where something is written"
    text = made.trouble(silent=True)
    assert os.strerror(number) in text and str(made.path) in text and "7 of 1,000 files" in text


@pytest.mark.parametrize(("trouble", "hang"), [("/tmp/x: No space left on device", False), ("", True)])
def test_heartbeats_that_cannot_be_written_are_no_hang(
    trouble: str, hang: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "import sys, time; time.sleep(0.7); open(sys.argv[1], 'w').write('{\"codes\": {}}')"
    monkeypatch.setattr(
        attempts, "module", lambda name, result, *rest: [sys.executable, "-c", script, result]
    )
    monkeypatch.setattr(attempts.processes, "end_all", _end)
    for name in ("SAMPLE", "POLL", "_STACKS_SECONDS", "_LOOK_AT_DISK"):
        monkeypatch.setattr(attempts, name, 0.02)
    monkeypatch.setattr(Scratch, "trouble", lambda self, silent=False: trouble)
    told: list[str] = []
    made = Attempt(
        Place(),
        ["hlat"],
        tmp_path / "logs",
        limits=LIMITS,
        grace=1.0,
        on_trouble=lambda text: told.append(text),
    )
    long_ago = time.monotonic() - 100
    silent = Heartbeat(0, 2**30, 7, "checkpoint", long_ago, long_ago)  # no such process
    heartbeat_file(made.scratch, 0).write_bytes(encode(silent))
    outcome = made.run()
    assert outcome.hang is hang and told == ([trouble] if trouble else [])
    assert ("no progress for 1" in outcome.why) == hang


def _end(but: int) -> list[Any]:
    with contextlib.suppress(ProcessLookupError):
        os.kill(but, 9)
    return []


def test_a_machine_without_room_for_an_attempt_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def refuse(*arguments: Any, **more: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "hlat-x"))

    monkeypatch.setattr("hlat.supervise.supervisor.Attempt", refuse)
    made = Supervisor(["hlat"], tmp_path, Place(), limits=LIMITS, budget=Budget(restarts=1, pause=0.0))
    assert made.run() == 1
    ends = [row for row in read_rows(made.events.path) if row["event"] == "end"]
    assert [(row["kind"], row["rule"]) for row in ends] == [("store", "scratch-disk")] * 2
    said = capsys.readouterr().err
    assert "disk takes nothing" in said and "No space left on device (" in said and " free" in said
