"""Processes that are stopped in the middle of something, folders that go away, and locks that are none."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from hlat.errors import FolderLost, UserError
from hlat.observe import durable, lock
from hlat.observe.jsonl import read_rows
from hlat.observe.lock import LOCK_FILE, Holder, Lock
from hlat.observe.runfolder import RunFolder
from hlat.observe.sinks import JsonlSink


def test_who_is_stopped_while_it_puts_its_lock_back_has_lost_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = RunFolder(tmp_path / "run").start("", "", description={})
    (stopped.path / LOCK_FILE).unlink()
    install = Lock._install

    def after_another(self: Lock, former: bytes | None) -> bool:
        monkeypatch.setattr(Lock, "_install", install)
        with RunFolder(tmp_path / "run").start("", "", description={}):
            pass
        return install(self, former)

    monkeypatch.setattr(Lock, "_install", after_another)
    with pytest.raises(FolderLost, match="another process has taken"):
        stopped.claim.confirm()
    assert not (stopped.path / LOCK_FILE).exists()


def test_what_is_no_lock_file_ends_in_a_line_or_counts_as_none(tmp_path: Path) -> None:
    path = tmp_path / LOCK_FILE
    mine = dataclasses.asdict(Holder.this_process(tmp_path))
    for content in ("[" * 200_000, json.dumps({**mine, "pid": 1.5}), json.dumps({**mine, "restart": 5})):
        path.write_text(content)
        Lock(tmp_path).release()
    for make in (lambda: path.mkdir(), lambda: path.symlink_to("nowhere")):
        make()
        with pytest.raises(UserError, match=r"cannot use the run folder: \.lock: "):
            RunFolder(tmp_path).start("", "", description={})
        path.rmdir() if path.is_dir() else path.unlink()
    path.write_text(json.dumps({**mine, "path": "/a\0b"}))
    with pytest.raises(UserError, match="trains in this folder"):
        Lock(tmp_path)
    for text in ("nan", "soon", "0", "-1"):
        with pytest.raises(UserError, match="HLAT_TEST_LOCK_SECONDS: .* is no number of seconds"):
            lock._stale_seconds(text)


def test_who_was_stopped_while_it_took_the_lock_is_not_waited_for_without_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.1)
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    began = time.monotonic()
    Lock(tmp_path).release()
    assert time.monotonic() - began >= 0.1
    os.close(handle)


def test_a_folder_that_is_moved_away_is_waited_for(tmp_path: Path) -> None:
    """Nobody has taken it: the run ends with rows or a checkpoint unwritten, not as one that has lost it."""
    folder = RunFolder(tmp_path / "run").start("", "", description={})
    sink = JsonlSink(folder.path, 0, folder.claim)
    folder.path.rename(tmp_path / "away")
    sink.row({"kind": "train", "step": 1})
    with pytest.warns(UserWarning, match="rows wait in memory"):
        sink.flush()
    assert not folder.path.exists() and sink.sync() is not None
    (tmp_path / "away").rename(folder.path)
    assert sink.sync() is None and [row["kind"] for row in read_rows(sink.path)] == ["start", "train"]
    folder.close()


STOPPED = [("confirm", act) for act in ("open", "first rows", "rows", "back")]


@pytest.mark.parametrize(("where", "act"), [*STOPPED, *(("write", act) for _, act in STOPPED[1:])])
def test_who_comes_back_in_the_middle_of_its_rows_costs_its_successor_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, act: str
) -> None:
    """It was stopped after a look at the lock, or on its way to the disk; another trained to the end."""
    path, trained = tmp_path / "metrics.jsonl", act in ("rows", "back")
    first, pending = RunFolder(tmp_path).start("", "", description={}), [True]

    def write(into: JsonlSink, steps: range) -> None:
        for step in steps:
            into.row({"kind": "train", "step": step})
            into.flush()

    def stopped(function: Any) -> Any:
        def call(*arguments: Any) -> None:
            if where == "confirm":
                function(*arguments)
            if pending:
                pending.clear()
                os.utime(tmp_path / LOCK_FILE, (1000, 1000))
                with RunFolder(tmp_path).start("", "", description={}) as folder:
                    step = 3 if trained else 0
                    write(JsonlSink(tmp_path, step, folder.claim), range(step + 1, 21))
            if where == "write":
                function(*arguments)

        return call

    sink = None if act == "open" else JsonlSink(tmp_path, 0, first.claim, warn=lambda line: None)
    if trained:
        write(sink, range(1, 6))
    owner = first.claim if where == "confirm" else durable
    name = "confirm" if where == "confirm" else "write_all"
    monkeypatch.setattr(owner, name, stopped(getattr(owner, name)))
    with contextlib.suppress(FolderLost):
        if act == "open":
            JsonlSink(tmp_path, 0, first.claim)
        elif act == "back":
            sink.rewind(2)
        else:
            write(sink, range(6, 7))
    assert not pending
    assert [row["step"] for row in read_rows(path) if row["kind"] == "train"] == list(range(1, 21))
    JsonlSink(tmp_path, 20)
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 21))
