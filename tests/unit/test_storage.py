"""Copies of checkpoints in a store, on fsspec's own memory:// and file://, and the thread that makes them."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hlat.checkpoint import uploader as uploads
from hlat.checkpoint.folder import Broken, step_folder
from hlat.checkpoint.mirror import Gone, Mirror, Owner, newer
from hlat.checkpoint.store import CheckpointStore
from hlat.checkpoint.uploader import Uploader
from hlat.errors import UserError
from hlat.storage.journal import Journal
from hlat.storage.remote import Remote, StoreError
from hlat.storage.transfer import side_by_side


@pytest.fixture(params=["memory", "file"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Remote:
    return Remote(
        f"memory://{tmp_path.name}/run" if request.param == "memory" else f"file://{tmp_path}/store/run"
    )


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run" / "checkpoints", keep=2)


def save(store: CheckpointStore, step: int, value: float | None = None) -> Path:
    store.save(step, {"a": torch.full((50,), float(step if value is None else value))}, {}, step, wait=True)
    return step_folder(store.root, step)


# -- a folder in a store


def test_a_file_in_place_of_the_folder_is_not_waited_for(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="File exists"):
        Remote(f"file://{tmp_path}/run").probe()
    assert (tmp_path / "run").read_text(encoding="utf-8") == "mine"


def test_what_is_written_is_read_listed_and_deleted(remote: Remote, tmp_path: Path) -> None:
    assert remote.files() == {}
    file = tmp_path / "file"
    file.write_bytes(os.urandom(1000))
    assert remote.upload(file, "a/b/c") == 1000
    remote.write("a/d", b"text")
    assert remote.files() == {"a/b/c": 1000, "a/d": 4} and remote.files("a/b") == {"a/b/c": 1000}
    assert remote.read("a/d") == b"text"
    remote.download("a/b/c", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == file.read_bytes()
    with pytest.raises(FileNotFoundError):
        remote.read("a/none")
    with pytest.raises(FileNotFoundError):
        remote.download("a/none", tmp_path / "none")
    remote.delete("a", "d")
    assert remote.files() == {}
    remote.delete("a", "d")
    remote.probe()
    assert remote.files() == {} and remote.abort_uploads() == 0


def test_a_store_that_changes_bytes_is_found_out(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"0123456789")
    put = remote._fs.put_file

    def spoiled(source: str, target: str, **options: Any) -> None:
        put(source, target, **options)
        remote._fs.pipe_file(target, b"012345678X")

    monkeypatch.setattr(remote._fs, "put_file", spoiled)
    with pytest.raises(StoreError, match="holds other bytes than were written"):
        remote.upload(file, "file")


def test_side_by_side_does_all_or_tells_the_first_failure() -> None:
    done: list[int] = []
    side_by_side(done.append, list(range(20)))
    assert sorted(done) == list(range(20))

    def fail(item: int) -> None:
        raise ValueError(item)

    with pytest.raises(ValueError, match="3"):
        side_by_side(fail, [3])
    side_by_side(fail, [])


# -- copies of checkpoints


def test_a_copy_comes_back_as_it_was(remote: Remote, store: CheckpointStore, tmp_path: Path) -> None:
    path = save(store, 3)
    mirror = Mirror(remote, store.root, keep=2)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"kind":"train","step":3}\n{"kind":"tr')
    copy = mirror.upload(path)
    assert copy is not None and copy.entry.step == 3 and mirror.upload(path) is None, "once is enough"
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    other = Mirror(remote, tmp_path / "other" / "checkpoints", keep=2)
    (found,) = other.copies()
    assert found == copy and other.meta(found)["step"] == 3
    back = other.fetch(found)
    assert {file.name: file.read_bytes() for file in back.iterdir()} == before
    assert (tmp_path / "other" / "metrics.jsonl").read_text() == '{"kind":"train","step":3}\n', "whole lines"


def test_without_its_marker_there_is_no_checkpoint(
    remote: Remote, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off after any number of files: invisible; the next attempt sends only what is missing."""
    path, mirror = save(store, 3), Mirror(remote, store.root, keep=2)
    names = list(json.loads((path / "complete.json").read_text())["files"])
    upload, sent = remote.upload, []

    def cut(file: Path, target: str) -> int:
        if len(sent) == allowed:
            raise StoreError("cut off")
        sent.append(target.partition("/")[2])
        return upload(file, target)

    monkeypatch.setattr(remote, "upload", cut)
    for allowed in range(len(names)):  # noqa: B007 (read in `cut`)
        with pytest.raises(StoreError):
            mirror.upload(path)
        assert mirror.copies() == []
    allowed = len(names)
    assert mirror.upload(path) is not None and len(mirror.copies()) == 1
    assert sorted(sent) == sorted(names), "no file went twice"


@pytest.mark.parametrize("victim", ["data-00000.safetensors", "index.json", "meta.json", "complete.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_a_damaged_copy_is_never_taken(
    remote: Remote, store: CheckpointStore, tmp_path: Path, victim: str, how: str
) -> None:
    mirror = Mirror(remote, store.root, keep=3)
    for step in (1, 2):
        mirror.upload(save(store, step))
    name = mirror.copies()[-1].name
    data = bytearray(remote.read(f"{name}/{victim}"))
    if how == "gone":
        remote._fs.rm(remote.at(f"{name}/{victim}"))
    else:
        data[len(data) // 2] ^= 1
        remote.write(f"{name}/{victim}", bytes(data if how == "flip" else data[:-1]))
    other = Mirror(remote, tmp_path / "other" / "checkpoints", keep=3)
    found = other.copies()
    if len(found) == 2:  # the size is right: it shows when it is fetched
        with pytest.raises(Broken):
            other.fetch(found[-1])
        assert not list((tmp_path / "other" / "checkpoints").iterdir())
    assert other.fetch(found[0]).name == "step-00000001"


def test_retention_is_that_of_the_disk(remote: Remote, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=2, permanent_every_tokens=3)
    mirror = Mirror(remote, store.root, keep=2)
    for step in range(1, 9):
        mirror.upload(save(store, step))
        mirror.tidy()
        assert [copy.entry.step for copy in mirror.copies()] == store.steps()
    assert store.steps() == [3, 6, 7, 8]
    mirror.upload(save(store, 7, 0.5))  # back at step 7: the old one goes, and 8 is older than this 7
    mirror.tidy()
    assert sorted(copy.entry.step for copy in mirror.copies()) == [3, 6, 7, 8]
    newest = newer(mirror.copies(), 0, set())[0]
    assert newest.entry.step == 7
    assert not newer(mirror.copies(), newest.entry.sequence, set())


def test_tidy_removes_what_killed_processes_left_but_not_what_may_go_on(
    remote: Remote, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, mirror = save(store, 3), Mirror(remote, store.root, 2, owner=Owner("me"))
    write = remote.write

    def no_marker(name: str, data: bytes) -> None:
        if name.endswith("complete.json"):
            raise StoreError("no marker")
        write(name, data)

    with monkeypatch.context() as patch:
        patch.setattr(remote, "write", no_marker)
        with pytest.raises(StoreError):
            mirror.upload(path)
    for number, mark in ((1, b'{"run": "other"}'), (2, b'{"run": "me"}'), (4, b"["), (5, b"[1]")):
        remote.write(f"step-0000000{number}-0123456789ab/meta.json", b"{}")
        remote.write(f"step-0000000{number}-0123456789ab/unfinished.json", mark)
    remote.write("notes.txt", b"mine")
    mirror.tidy()
    left = {name.partition("/")[0].partition("-0123")[0] for name in remote.files()}
    own = next(name for name in left if name.startswith("step-00000003"))
    assert left == {"notes.txt", "step-00000001", own, "step-00000004", "step-00000005"}


def test_a_checkpoint_damaged_on_the_disk_is_not_uploaded(remote: Remote, store: CheckpointStore) -> None:
    path, mirror = save(store, 3), Mirror(remote, store.root, keep=2)
    data = bytearray((path / "data-00000.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "data-00000.safetensors").write_bytes(data)
    with pytest.raises(Broken, match="damaged"):
        mirror.upload(path)
    assert mirror.copies() == []


@pytest.mark.parametrize("how", ["deleted", "replaced"])
def test_a_step_that_changes_under_the_upload_is_not_mixed(
    remote: Remote, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    path, mirror = save(store, 3), Mirror(remote, store.root, keep=2)
    upload = remote.upload

    def change(file: Path, target: str) -> int:
        monkeypatch.setattr(remote, "upload", upload)
        if how == "replaced":
            save(store, 3, 0.5)
        else:
            for item in path.iterdir():
                item.unlink()
            path.rmdir()
        return upload(file, target) if file.exists() else 0

    monkeypatch.setattr(remote, "upload", change)
    with pytest.raises((Gone, StoreError)):
        mirror.upload(path)
    assert mirror.copies() == []


# -- the thread


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "FIRST_PAUSE", 0.01)


def uploader_for(remote: Remote, store: CheckpointStore) -> tuple[Uploader, Journal, list[str]]:
    lines: list[str] = []
    journal = Journal(lines.append)
    uploader = Uploader(Mirror(remote, store.root, keep=2), journal)
    store.keep_back = uploader.keeps
    return uploader, journal, lines


def test_the_newest_wins_and_the_one_under_way_stays_on_the_disk(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep=1)
    uploader, journal, _ = uploader_for(remote, store)
    begun, go_on = threading.Event(), threading.Event()
    upload = remote.upload

    def slow(file: Path, target: str) -> int:
        begun.set()
        assert go_on.wait(20)
        return upload(file, target)

    monkeypatch.setattr(remote, "upload", slow)
    uploader.submit(save(store, 1))
    assert begun.wait(20)
    for step in (2, 3, 4):
        uploader.submit(save(store, step))
    assert store.steps() == [1, 4], "1 is on its way"
    assert uploader.wait(0.05) == "step 1 is still being uploaded, step 4 waits"
    go_on.set()
    assert uploader.wait(20) is None and uploader.uploaded == 4
    happened = [(row["what"], row["step"], (row["error"] or "")[:7]) for row in journal.rows]
    skipped = [("upload", 2, "skipped"), ("upload", 3, "skipped")]
    assert happened == [*skipped, ("upload", 1, ""), ("upload", 4, "")]
    save(store, 5)
    assert store.steps() == [5]


def test_failures_are_told_once_a_kind_and_the_upload_comes_through(
    remote: Remote, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, fast: None
) -> None:
    uploader, journal, lines = uploader_for(remote, store)
    kinds = iter([*["Slow"] * 3, *["Away"] * 3, "defect"])
    upload = remote.upload

    def flaky(file: Path, target: str) -> int:
        kind = next(kinds, None)
        if kind == "defect":
            raise ZeroDivisionError("a defect")
        if kind is not None:
            raise StoreError(f"planted {kind}", kind)
        return upload(file, target)

    monkeypatch.setattr(remote, "upload", flaky)
    uploader.submit(save(store, 1))
    assert uploader.wait(20) is None and len(uploader.mirror.copies()) == 1
    journal.report()
    assert [line.rpartition("uploaded: ")[2].split(";")[0] for line in lines[:-1]] == [
        "planted Slow",
        "planted Away",
        "ZeroDivisionError: a defect",
    ] and "trouble is over" in lines[-1]
    assert [row["error"] is None for row in journal.rows] == [False] * len(list(journal.rows)[:-1]) + [True]


def test_a_store_that_fails_gets_the_newest_when_it_is_back(
    remote: Remote, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, fast: None
) -> None:
    uploader, _, _ = uploader_for(remote, store)
    away = threading.Event()
    away.set()
    files = remote.files

    def listing(folder: str = "") -> dict[str, int]:
        if away.is_set():
            raise StoreError("away", "away")
        return files(folder)

    monkeypatch.setattr(remote, "files", listing)
    for step in (1, 2, 3):
        uploader.submit(save(store, step))
        time.sleep(0.05)
    assert uploader.wait(0.1) == "away"
    away.clear()
    assert uploader.wait(20) is None
    assert [copy.entry.step for copy in uploader.mirror.copies()] == [3]


def test_the_files_beside_a_copy_are_those_of_the_run_folder(
    remote: Remote, store: CheckpointStore, tmp_path: Path
) -> None:
    """A recipe to its last byte; of the metrics no half row."""
    recipe = b"\xef\xbb\xbfrun: {name: a}\r\n# the end"
    (tmp_path / "run" / "recipe.yaml").parent.mkdir(exist_ok=True)
    (tmp_path / "run" / "recipe.yaml").write_bytes(recipe)
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"st')
    copy = Mirror(remote, store.root, keep=2).upload(save(store, 1))
    assert copy is not None and remote.read(f"{copy.name}/run/recipe.yaml") == recipe
    assert remote.read(f"{copy.name}/run/metrics.jsonl") == b'{"step": 1}\n'
