"""metrics.jsonl between two processes, under an editor's hands and in a power cut."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest

from hlat.errors import FolderLost, SaveFailed
from hlat.observe import durable, jsonl
from hlat.observe.claim import Claim
from hlat.observe.jsonl import MetricsFile, append, encode, read_rows, truncate_after
from hlat.observe.metrics import MetricBuffer
from hlat.observe.sinks import JsonlSink
from hlat.supervise.events import Events

FILE = "metrics.jsonl"


class Named(Claim):
    """A claim that is lost when a test says so."""

    def __init__(self, name: str) -> None:
        self.name, self.lost = name, False

    def confirm(self) -> None:
        if self.lost:
            raise FolderLost("another process has the folder")


def write(file: MetricsFile, *steps: int) -> None:
    for step in steps:
        file.row({"kind": "train", "step": step, "loss": step / 3})
    file.flush()


def steps(path: Path) -> list[tuple[int, str]]:
    return [(row["step"], row["by"]) for row in read_rows(path) if row["kind"] == "train"]


def span(first: int, last: int, by: str) -> list[tuple[int, str]]:
    return [(step, by) for step in range(first, last + 1)]


def late(path: Path, *rows: dict) -> None:
    """What a stopped process was about to write."""
    with path.open("ab") as file:
        file.write(b"".join(encode({**row, "by": "one"}) for row in rows))


LATE = [{"kind": "train", "step": step} for step in (11, 12, 13)]


@pytest.mark.parametrize("when", ["before", "begun", "after", "start", "all"])
def test_rows_of_a_process_that_had_lost_the_folder_do_not_count(tmp_path: Path, when: str) -> None:
    """Written in the moment the successor had cut the file, or amid its rows: 40 windows of it."""
    path = tmp_path / FILE
    one = JsonlSink(tmp_path, 0, Named("one"))
    write(one, *range(1, 11))
    if when in ("before", "all"):
        late(path, *LATE)
    two = JsonlSink(tmp_path, 6, Named("two"), warn=lambda line: None)
    assert steps(path) == span(1, 6, "one")
    if when in ("begun", "all"):
        late(path, *LATE)
    for step in range(7, 87, 2):
        write(two, step, step + 1)
        if when in ("after", "all") and step % 3 == 0:
            late(path, *LATE)
        if when in ("start", "all") and step == 21:
            late(path, {"kind": "start", "step": 0}, *LATE)
    whole = [*span(1, 6, "one"), *span(7, 86, "two")]
    assert steps(path) == whole, "readers pass over them"
    three = JsonlSink(tmp_path, 80, Named("three"))
    write(three, *range(81, 90))
    raw = [json.loads(line) for line in path.read_text().splitlines()]
    kept = [(row["step"], row["by"]) for row in raw if row["kind"] == "train"]
    assert kept == [*whole[:80], *span(81, 89, "three")], "a resume removes them"
    assert [row["by"] for row in raw if row["kind"] == "start"][0] == "one"


def test_who_has_lost_the_folder_writes_no_row_and_moves_none(tmp_path: Path) -> None:
    claim = Named("one")
    file = JsonlSink(tmp_path, 0, claim)
    write(file, 1, 2, 3)
    before = file.path.read_bytes()
    claim.lost = True
    with pytest.raises(FolderLost):
        write(file, 4)
    for act in (lambda: file.rewind(1), file.sync, file.close):
        with pytest.raises(FolderLost):
            act()
    file.close()
    assert file.path.read_bytes() == before and not list(tmp_path.glob("logs/*"))
    with pytest.raises(FolderLost):
        JsonlSink(tmp_path, 0, claim)
    assert file.path.read_bytes() == before


def test_going_back_behind_the_own_start_loses_no_later_row(tmp_path: Path) -> None:
    write(JsonlSink(tmp_path, 0, Named("one")), *range(1, 11))
    two = JsonlSink(tmp_path, 8, Named("two"))
    write(two, 9, 10, 11)
    two.rewind(4)
    write(two, *range(5, 15))
    assert steps(tmp_path / FILE) == [*span(1, 4, "one"), *span(5, 14, "two")]
    moved = [json.loads(line) for line in (tmp_path / "logs/rewound.jsonl").read_text().splitlines()]
    assert [(row["step"], row["by"]) for row in moved] == [*span(5, 8, "one"), *span(9, 11, "two")]
    truncate_after(tmp_path / FILE, 12)
    assert steps(tmp_path / FILE)[-1] == (12, "two")


def rename(path: Path) -> None:
    path.rename(path.with_name(f"{path.name}.{len(list(path.parent.iterdir()))}"))


def edit(path: Path) -> None:
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes().replace(b'"kind"', b'"kind" '))
    copy.rename(path)


def edit_without_last_newline(path: Path) -> None:
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes()[:-1])
    copy.rename(path)


def edit_torn(path: Path) -> None:
    copy = path.with_name("copy")
    copy.write_bytes(path.read_bytes()[:-5])
    copy.rename(path)


CHANGES = {
    "rotated": rename,
    "removed": Path.unlink,
    "edited": edit,
    "no newline": edit_without_last_newline,
    "torn": edit_torn,
    "copytruncate": lambda path: os.truncate(path, 0),
    "cut inside a line": lambda path: os.truncate(path, path.stat().st_size - 3),
    "shorter": lambda path: path.write_bytes(encode({"kind": "train", "step": 0, "by": "one"})),
}


@pytest.mark.parametrize("how", CHANGES)
def test_rows_go_to_the_file_at_the_path(tmp_path: Path, how: str) -> None:
    """Six times in a run: each time later rows are there, in whole lines, and one line says so."""
    path, said = tmp_path / FILE, []
    file = MetricsFile(path, Named("one"), warn=said.append)
    for turn in range(6):
        first = 100 * turn
        write(file, first + 1, first + 2)
        write(file, first + 3)
        CHANGES[how](path)
        assert len(said) == turn
        write(file, *range(first + 4, first + 8))
        write(file, first + 8)
        assert len(said) == turn + 1 and str(path) in said[-1] and "rows" in said[-1]
        content = path.read_bytes()
        assert content.endswith(b"\n") and all(json.loads(line) for line in content.splitlines())
        assert steps(path)[-5:] == span(first + 4, first + 8, "one")
        assert not how.startswith("no") or steps(path)[-6:] == span(first + 3, first + 8, "one")
    assert file.sync() is None
    file.close()


def test_a_folder_at_the_path_keeps_rows_waiting(tmp_path: Path) -> None:
    path = tmp_path / FILE
    file = MetricsFile(path, warn=lambda line: None)
    file.row({"kind": "train", "step": 1, "by": ""})
    file.flush()
    path.rename(tmp_path / "away")
    path.mkdir()
    file.row({"kind": "train", "step": 2, "by": ""})
    with pytest.warns(UserWarning, match="Is a directory.*rows wait in memory"):
        file.flush()
    assert file.sync() is not None, "no checkpoint meanwhile"
    path.rmdir()
    assert file.sync() is None and file.trouble is None and steps(path) == [(2, "")]


@pytest.mark.parametrize("what", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path.name)])
def test_what_is_no_file_is_refused_before_the_first_row(
    tmp_path: Path, what: Callable[[Path], None]
) -> None:
    what(tmp_path / FILE)
    with pytest.raises(SaveFailed, match="cannot write metrics"):
        JsonlSink(tmp_path, 0, Named("one"))
    (tmp_path / "device").mkdir()
    (tmp_path / "device" / FILE).symlink_to("/dev/zero")  # it has no end
    with contextlib.suppress(SaveFailed):
        JsonlSink(tmp_path / "device", 0, Named("one"))


def test_own_changes_are_none(tmp_path: Path) -> None:
    """Full disks, going back and reopening are not taken for somebody else's hand."""
    file = JsonlSink(tmp_path, 0, Named("one"), warn=lambda line: pytest.fail(line))
    for turn in range(5):
        write(file, *range(1, 9))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "write", half)
            file.row({"kind": "train", "step": 9, "text": "x" * 100})
            with warnings.catch_warnings(action="ignore"):
                file.flush()
        file.flush()
        assert file.trouble is None and [step for step, _ in steps(file.path)] == list(range(1, 10)), turn
        file.rewind(0)
    assert file.sync() is None
    file.close()


def half(handle: int, block: bytes, write=os.write) -> int:
    return write(handle, block[:7]) if len(block) > 99 else full()


def full() -> int:
    raise OSError(28, "No space left on device")


# -- what a power cut leaves


class Disk:
    """Which bytes of which file have been flushed, in order with other events."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.events: list[tuple[str, int]] = []
        real = os.fsync

        def fsync(handle: int) -> None:
            name = os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))
            self.events.append((name, os.fstat(handle).st_size))
            real(handle)

        monkeypatch.setattr(os, "fsync", fsync)


def test_rows_are_flushed_to_the_disk_for_a_checkpoint_and_not_for_each_window(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = MetricBuffer([file := JsonlSink(tmp_path)])
    disk = Disk(monkeypatch)
    for step in range(1, 301):
        buffer.add(step, {"loss": 1.0})
        if step % 100 == 0:
            before = len(disk.events)
            assert buffer.trouble() is None
            assert disk.events[before:] == [(FILE, file.path.stat().st_size)]
            assert buffer.trouble() is None and len(disk.events) == before + 1, "nothing new"
    assert len(disk.events) == 3
    monkeypatch.setattr(
        durable, "sync", lambda handle: (_ for _ in ()).throw(OSError(5, "Input/output error"))
    )
    buffer.add(301, {"loss": 1.0})
    assert buffer.trouble().errno == 5, "no checkpoint then"


def test_other_logs_are_on_the_disk_line_by_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    append(tmp_path / "log.jsonl", b'{"a":1}\n')
    assert disk.events == [("log.jsonl", 8), (tmp_path.name, os.stat(tmp_path).st_size)], "and its name"
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write(b'{"torn":')
    append(tmp_path / "log.jsonl", b'{"a":2}\n')
    assert disk.events[2:] == [("log.jsonl", 16)]
    assert (tmp_path / "log.jsonl").read_bytes() == b'{"a":1}\n{"a":2}\n'
    events = Events(tmp_path / "supervisor", quiet=True)
    disk.events.clear()
    events.add("start", attempt=1)
    assert disk.events[0] == ("events.jsonl", events.path.stat().st_size)


def test_what_is_taken_back_is_on_the_disk_before_it_is_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = JsonlSink(tmp_path, 0, Named("one"))
    write(file, *range(1, 9))
    disk, cut = Disk(monkeypatch), os.truncate

    def truncate(path: Path, size: int) -> None:
        disk.events.append(("cut", size))
        cut(path, size)

    monkeypatch.setattr(os, "truncate", truncate)
    file.rewind(3)
    assert [name for name, _ in disk.events] == ["rewound.jsonl", "logs", "cut"]


def test_a_line_that_cannot_be_flushed_is_not_half_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(tmp_path / "log.jsonl", b"{}\n")
    monkeypatch.setattr(durable.os, "write", lambda *arguments: full())
    with pytest.raises(SaveFailed, match="No space left"):
        append(tmp_path / "log.jsonl", b'{"a":2}\n')
    assert (tmp_path / "log.jsonl").read_bytes() == b"{}\n"
    assert jsonl.MOST_WAITING > 1 << 20
