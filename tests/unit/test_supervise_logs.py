"""Ranks' output under a supervisor: bounded on both disks, without secrets, and no disk is waited for."""

from __future__ import annotations

import os
import random
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hlat.supervise import bounded, cleaner, logs
from hlat.supervise.aside import Aside
from hlat.supervise.bounded import BoundedFile, GrowingFile
from hlat.supervise.cleaner import Cleaner
from hlat.supervise.events import Events
from hlat.supervise.logs import LogMirror, Shown

LEFT_OUT = re.compile(rb"\[hlat: ([\d,]+) bytes of output left out here\]\n")
SECRETS = {
    "HF_TOKEN": "hf_PLANTED3abcdefghijklmnopqrstuv",
    "MY_PIN_TOKEN": "4929123412341234",
    "SIGNING_KEY": "-----BEGIN EC PRIVATE KEY-----\nMHcCAQEEplantedline1\nplantedline2AoGCCqGSM49\n"
    "-----END EC PRIVATE KEY-----",
}


def left_out(data: bytes) -> int:
    return sum(int(match[1].replace(b",", b"")) for match in LEFT_OUT.finditer(data))


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(0, 30), st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_a_bounded_file_keeps_its_beginning_and_its_end(sizes: list[int], head: int, tail: int) -> None:
    path = Path(os.environ["HYPOTHESIS_FOLDER"]) / "log"
    path.write_bytes(b"of another job\n")
    file, whole = BoundedFile(path, head, tail), b""
    for number, size in enumerate(sizes):
        piece = f"{number:x}".encode().ljust(size, b".") + b"\n"
        file.add(piece)
        whole += piece
    found = path.read_bytes().removeprefix(b"of another job\n")
    assert len(found) <= head + 2 * tail + 64
    if not left_out(found):
        assert found == whole
        return
    (note,) = LEFT_OUT.finditer(found)
    before, after = found[: note.start()], found[note.end() :]
    assert whole.startswith(before) and whole.endswith(after)
    assert len(before) + len(after) + left_out(found) == len(whole)


@pytest.fixture(autouse=True)
def folder_for_hypothesis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYPOTHESIS_FOLDER", str(tmp_path))


def test_what_was_missing_counts_when_it_is_left_out_itself(tmp_path: Path) -> None:
    file = BoundedFile(tmp_path / "log", 10, 200)
    file.add(b"first\n")
    file.add(b"second\n", missing=1000)
    assert left_out((tmp_path / "log").read_bytes()) == 1000
    for _ in range(100):
        file.add(b"another line\n")
    data = (tmp_path / "log").read_bytes()
    assert data.startswith(b"first\n[hlat: ") and data.endswith(b"another line\n")
    kept = len(data) - sum(len(match[0]) for match in LEFT_OUT.finditer(data))
    written = len(b"first\nsecond\n") + 100 * len(b"another line\n") + 1000
    assert abs(kept + left_out(data) - written) <= 64, "the line about the 1,000 was left out, and counted"


def test_a_file_that_another_process_appends_to_is_bounded(tmp_path: Path) -> None:
    path, whole = tmp_path / "log", b"".join(b"line %d\n" % number for number in range(2000))
    path.write_bytes(b"before\n")
    bounds = GrowingFile(path, 7, 100, 100)
    with path.open("ab", buffering=0) as file:
        for start in range(0, len(whole), 150):
            file.write(whole[start : start + 150])
            bounds.bound()
            assert path.stat().st_size < 7 + 100 + 200 + 150 + 60
    data = path.read_bytes().removeprefix(b"before\n")
    (note,) = LEFT_OUT.finditer(data)
    before, after = data[: note.start()], data[note.end() :]
    assert whole.startswith(before) and whole.endswith(after) and len(before) > 80
    assert len(before) + len(after) + left_out(data) == len(whole)


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """All bounds 64 times smaller."""
    for module, names in ((logs, ("_BLOCK", "_BEHIND", "_RELEASED", "_KEPT", "HEAD")),
                          (bounded, ("HEAD", "TAIL")), (cleaner, ("LONGEST_LINE",))):  # fmt: skip
        for name in names:
            monkeypatch.setattr(module, name, getattr(module, name) >> 6)
    monkeypatch.setattr(BoundedFile.__init__, "__defaults__", (bounded.HEAD, bounded.TAIL))


def source_of(tmp_path: Path, name: str = "stdout.log") -> Path:
    path = tmp_path / "scratch" / "a" / "attempt_0" / "0" / name
    path.parent.mkdir(parents=True)
    return path


@pytest.mark.parametrize("kind", ["lines", "one line", "binary", "carriage returns"])
def test_a_flood_is_bounded_here_and_in_the_run_folder(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch)
    path, copy = source_of(tmp_path), tmp_path / "run" / "rank-00000-stdout.log"
    mirror = LogMirror(tmp_path / "scratch", tmp_path / "run")
    ends = {"lines": b"\n", "one line": b"", "binary": b"\n", "carriage returns": b"\r"}
    random.seed(1)
    blob = random.randbytes(997) if kind == "binary" else b"x" * 997
    total = most = 0
    with path.open("wb", buffering=0) as file:
        file.write(b"the first line\n")
        for _ in range(24):
            total += file.write((blob.replace(b"\n", b".") + ends[kind]) * 1000)
            mirror.sync()
            most = max(most, path.stat().st_blocks * 512)
        total += file.write(b"\nthe last line\n")
        mirror.sync(last=True)
    data = copy.read_bytes()
    assert data.startswith(b"the first line\n") and data.endswith(b"the last line\n")
    assert len(data) <= bounded.HEAD + 2 * bounded.TAIL + 4096 < total / 10
    assert b"left out" in data
    if kind == "lines":
        marks = sum(len(match[0]) for match in LEFT_OUT.finditer(data))
        assert abs(len(data) - marks + left_out(data) - total) <= 25 * 998, "but for a torn line at each gap"
    assert most <= 4 << 20, "what has been copied gives its room back"
    assert mirror.tail().endswith("the last line\n")


def test_the_watch_waits_for_no_disk(tmp_path: Path) -> None:
    """A run folder that hangs holds up a thread and no other; what `tail` gives comes from this machine."""
    path = source_of(tmp_path)
    path.write_text("hello\n")
    mirror, hangs = LogMirror(tmp_path / "scratch", tmp_path / "run"), threading.Event()
    mirror.sync = lambda last=False: hangs.wait(60)  # type: ignore[method-assign]
    mirror.start()
    assert mirror.finish(0.05) is False and "hello" in mirror.tail()
    hangs.set()


def test_a_full_disk_of_the_run_folder_keeps_order_and_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch)
    path, target = source_of(tmp_path), tmp_path / "run"
    mirror = LogMirror(tmp_path / "scratch", target)
    target.write_text("")  # nothing can be written below it
    with path.open("wb", buffering=0) as file:
        file.write(b"first\n")
        for _ in range(8):
            file.write(b"0123456789abcde\n" * 40000)
            mirror.sync()
        assert path.stat().st_blocks * 512 < 4 << 20
        target.unlink()
        file.write(b"last\n")
        mirror.sync(last=True)
    data = (target / "rank-00000-stdout.log").read_bytes()
    assert data.startswith(b"first\n") and data.endswith(b"last\n") and left_out(data) > 1 << 20


@pytest.mark.parametrize("seed", range(8))
def test_no_piece_of_output_shows_a_secret_that_the_next_one_ends(seed: int) -> None:
    """Cut anywhere; wrapped by a library; with torch's prefix; a private key line by line."""
    wrapped = "hf_PLANTED3abcdef\n[rank0]:     ghijklmnopqrstuv"
    key = SECRETS["SIGNING_KEY"].replace("\n", "\n[rank0]: ")
    other = "-----BEGIN RSA PRIVATE KEY-----\n" + "plantedQQQQ\n" * 30 + "-----END RSA PRIVATE KEY-----"
    text = (
        f"one {SECRETS['HF_TOKEN']}\ntwo {wrapped} x\npin 4929123412341234.\n{key}\n"
        f"password:\n  plantedword1\nAWS_SECRET_ACCESS_KEY=plantedword2\n{other}\nlast line\xff"
    )
    data, random_ = text.encode("latin-1"), random.Random(seed)
    made, out, at = Cleaner(SECRETS), b"", 0
    while at < len(data):
        size = random_.randint(1, 60)
        out += made.feed(data[at : at + size])
        at += size
        assert b"planted" not in out.lower() and b"ghijklmnop" not in out and b"492912341234" not in out
    out += made.feed(b"", last=True)
    assert (
        b"planted" not in out.lower() and out.endswith(b"last line\xff") and out.startswith(b"one ***\ntwo ")
    )
    assert out.count(b"\n") >= 6


@given(st.lists(st.binary(max_size=40), max_size=20))
def test_any_bytes_without_secrets_come_through_as_they_are(pieces: list[bytes]) -> None:
    made = Cleaner({})
    out = b"".join(made.feed(piece) for piece in pieces) + made.feed(b"", last=True)
    assert out == b"".join(pieces) or b"***" in out


def test_a_line_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaner, "LONGEST_LINE", 10000)
    made = Cleaner({})
    out = made.feed(b"begin " + b"y" * 30000) + made.feed(b"y" * 5000) + made.feed(b"end\nnext\n")
    assert out.startswith(b"begin ") and out.endswith(b" bytes of this line left out]\nnext\n")
    told = int(re.search(rb"hlat: ([\d,]+) bytes", out)[1].replace(b",", b""))  # type: ignore[index]
    assert out.index(b" [hlat") + told == len(b"begin ") + 35000 + len(b"end")


def test_a_reader_that_is_gone_or_slow_blocks_nobody(monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    blocked, shown = threading.Event(), Shown()
    monkeypatch.setattr(logs, "write_whole", lambda stream, text: blocked.wait(60))
    for _ in range(2000):
        shown(0, "stdout", b"a line\n")
    monkeypatch.undo()
    blocked.set()
    shown.finish(20)
    shown(0, "stdout", b"\x1b[2J\x07 at the end\rpart")
    shown(0, "stdout", b"")
    shown.finish(20)
    out = capfd.readouterr().out
    assert "bytes are not shown here: see the log of rank 0]" in out
    assert out.endswith("[0] \\x1b[2J\\x07 at the end\n[0] part\n")


def test_work_aside_is_refused_when_too_much_waits() -> None:
    hangs, done, aside = threading.Event(), [], Aside("test", most=2)
    began = time.monotonic()
    assert aside.do(lambda: hangs.wait(60) and None, seconds=0.01)
    taken = [aside.do(lambda: done.append(1), seconds=30) for _ in range(4)]
    assert taken.count(False) >= 1 and time.monotonic() - began < 25, "who is late is not waited for again"
    hangs.set()
    assert aside.wait(20) and len(done) == taken.count(True)


def test_a_restart_log_that_cannot_be_written_is_told_of_and_kept(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "logs").write_text("a file where the folder should be")
    events = Events(tmp_path / "logs")
    events.add("start", "attempt 2", attempt=2)
    events.add("end", attempt=2)
    said = capsys.readouterr().err
    assert said.count("the restart log cannot be written") == 1 and " free" in said and "attempt 2\n" in said
    (tmp_path / "logs").unlink()
    events.add("finish", "name \x1b]52;c;aGk=\x07\nsecond")
    assert len((tmp_path / "logs" / "events.jsonl").read_text().splitlines()) == 3
    assert "name \\x1b]52;c;aGk=\\x07\\nsecond\n" in capsys.readouterr().err
