"""One writer a run folder: how the lock changes hands, and that who has lost it writes nothing more."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hlat.checkpoint import folder as folders
from hlat.checkpoint.mirror import Mirror
from hlat.checkpoint.store import CheckpointStore
from hlat.checkpoint.uploader import Uploader
from hlat.cli import main
from hlat.errors import FolderLost, SaveFailed, UserError
from hlat.observe import lock
from hlat.observe.lock import LOCK_FILE, Holder, Lock, read_holder
from hlat.observe.runfolder import RunFolder
from hlat.storage.journal import Journal
from hlat.storage.remote import Remote
from hlat.train import loop

FORMER = ("host", "pid", "birth", "boot", "job", "restart", "inode", "since")  # fields of the former version
TEXT = "hello world, hello run folder\n" * 400
RECIPE = """
run: {name: r, steps: 12, dir: run}
model: {layers: 1, hidden: 16, heads: 1, ffn: 32, vocab: 260, max_seq_len: 32}
data: {sources: [{path: text.txt}], tokenizer: bytes, seq_len: 16, micro_batch: 2, global_batch: 2,
  holdout: 0}
schedule: {name: constant}
eval: {every: 0}
checkpoint: {every: 2, keep: 2, async: false}
log: {every: 1}
compile: false
"""


def take_over(folder: Path) -> bytes:
    """As another machine does that finds the lock old."""
    other = dataclasses.replace(Holder.this_process(folder), host="node-b", boot="b", pid=4711)
    content = json.dumps(dataclasses.asdict(other)).encode()
    (folder / "new").write_bytes(content)
    os.replace(folder / "new", folder / LOCK_FILE)
    return content


def wait_for(what: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


# -- the lock


def test_another_token_is_noticed_and_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "REFRESH_SECONDS", 0.01)
    mine = Lock(tmp_path)
    mine.confirm()
    content = take_over(tmp_path)
    os.utime(tmp_path / LOCK_FILE, (1000, 1000))
    with pytest.raises(FolderLost, match="process 4711 on node-b has taken the run folder over") as caught:
        mine.confirm()
    assert caught.value.exit_code == 77 and not mine.holds()
    time.sleep(0.1)
    mine.release()
    assert (tmp_path / LOCK_FILE).read_bytes() == content, "neither removed"
    assert (tmp_path / LOCK_FILE).stat().st_mtime == 1000, "nor refreshed: its holder's death would not show"


@pytest.mark.parametrize("how", ["deleted", "emptied", "damaged"])
@pytest.mark.parametrize("who", ["main thread", "refreshing"])
def test_a_lock_that_is_gone_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, who: str
) -> None:
    monkeypatch.setattr(lock, "REFRESH_SECONDS", 0.01 if who == "refreshing" else 30)
    with RunFolder(tmp_path / "run").start("", "", description={}) as folder:
        path = folder.path / LOCK_FILE
        before = path.read_bytes()
        for _ in range(3):
            path.unlink()
            if how != "deleted":
                path.write_text("" if how == "emptied" else before.decode()[:40])
            if who == "main thread" or how != "deleted":
                folder.claim.confirm()
            wait_for(lambda: path.exists() and path.read_bytes() == before)
    assert not path.exists()


def test_who_finds_no_lock_after_another_has_trained_has_lost_it(tmp_path: Path) -> None:
    """It was stopped, the successor took over, ended and released the lock."""
    stopped = RunFolder(tmp_path / "run").start("", "", description={})
    (stopped.path / LOCK_FILE).unlink()
    with RunFolder(tmp_path / "run").start("", "", description={}):
        pass
    before = sorted(path.name for path in stopped.path.rglob("*"))
    with pytest.raises(FolderLost, match="another process has taken"):
        stopped.claim.confirm()
    stopped.note_stop(by="SIGTERM", step=1)
    stopped.undo()
    stopped.abandon()
    assert sorted(path.name for path in stopped.path.rglob("*")) == before
    assert len(stopped.starts()) == 2 and "stopped" not in stopped.starts()[-1]


def test_an_early_end_does_not_remove_a_folder_that_another_process_has(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run").start("", "", description={})
    take_over(folder.path)
    folder.abandon()
    assert (folder.path / LOCK_FILE).exists() and folder.recipe.exists()
    late = RunFolder(tmp_path / "other")
    late._create()  # it made the folder, and another process was faster to lock it
    (late.path / LOCK_FILE).write_text("theirs")
    late.abandon()
    assert (late.path / LOCK_FILE).exists()


def test_locks_of_the_former_version_are_understood_and_it_understands_ours(tmp_path: Path) -> None:
    there = dataclasses.asdict(Holder.this_process(tmp_path))
    path = tmp_path / LOCK_FILE
    path.write_text(json.dumps({name: there[name] for name in FORMER}))
    holder = read_holder(path)
    assert holder is not None and holder.token == "" and holder.pid == os.getpid()
    assert lock.judge(holder, Holder.this_process(tmp_path), 10.0) is None, "its PID namespace is not known"
    os.utime(path, (1000, 1000))
    mine = Lock(tmp_path)
    content = json.loads(path.read_bytes())
    assert all(name in content for name in FORMER) and content["inode"] == tmp_path.stat().st_ino
    mine.release()


@pytest.mark.parametrize("end", ["refreshed", "dead"])
def test_a_holder_that_cannot_be_asked_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setattr(lock, "STALE_SECONDS", 1.0)
    monkeypatch.setattr(lock, "_POLL", 0.02)
    take_over(tmp_path)
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        if end == "refreshed":
            os.utime(tmp_path / LOCK_FILE)

    if end == "refreshed":
        with pytest.raises(UserError, match="process 4711 on node-b trains in this folder since"):
            Lock(tmp_path, say)
    else:
        Lock(tmp_path, say).release()
    assert len(said) == 1 and "waiting up to 1 s" in said[0]
    assert sorted(os.listdir(tmp_path)) == ([LOCK_FILE] if end == "refreshed" else [])


def test_a_copied_folder_is_free_and_the_same_one_by_another_name_is_not(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    mine = Lock(tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    Lock(tmp_path / "copy").release()
    (tmp_path / "mount").symlink_to(tmp_path / "run")
    holder = read_holder(tmp_path / "run" / LOCK_FILE)
    assert holder is not None
    there = dataclasses.replace(holder, path=str(tmp_path / "mount"), inode=1)
    assert not lock._is_copy(there, Holder.this_process(tmp_path / "run"), tmp_path / "run")
    copied = Holder.this_process(tmp_path / "copy")
    assert lock._is_copy(holder, copied, tmp_path / "copy")
    elsewhere = dataclasses.replace(holder, boot="b")  # where that name is another folder, a copy of this one
    assert not lock._is_copy(elsewhere, copied, tmp_path / "copy")
    mine.release()


@pytest.mark.parametrize("missing", ["flock", "link"])
def test_file_systems_that_lack_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(fcntl if missing == "flock" else os, missing, refuse)
    mine = Lock(tmp_path)
    with pytest.raises(UserError, match="trains in this folder"):
        Lock(tmp_path)
    mine.confirm()
    (tmp_path / LOCK_FILE).unlink()
    mine.confirm()
    take_over(tmp_path)
    os.utime(tmp_path / LOCK_FILE, (1000, 1000))
    later = Lock(tmp_path)
    assert later.holds() and not mine.holds()
    later.release()
    assert os.listdir(tmp_path) == []


# -- what is written in the folder


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {"a": torch.full((8,), value)}


def test_a_checkpoint_is_not_begun_completed_or_deleted_without_the_lock(tmp_path: Path) -> None:
    mine = Lock(tmp_path)
    store = CheckpointStore(tmp_path / "checkpoints", keep=1, claim=mine)
    store.save(1, tensors(1), {}, 1)
    seal = folders.seal_folder
    with pytest.MonkeyPatch.context() as patch:  # it is stopped while it writes
        patch.setattr(folders, "seal_folder", lambda *values: (seal(*values), take_over(tmp_path)))
        with pytest.raises(FolderLost):
            store.save(2, tensors(2), {}, 2)
    with pytest.raises(FolderLost):
        store.save(3, tensors(3), {}, 3)
    assert os.listdir(store.root) == ["step-00000001"]
    with pytest.raises(FolderLost):
        CheckpointStore(tmp_path / "checkpoints", keep=1, claim=mine)


def test_a_checkpoint_that_was_under_way_cannot_get_its_name_any_more(tmp_path: Path) -> None:
    """The process was stopped after its last look at the lock; its successor has saved the same step."""
    root, commit = tmp_path / "checkpoints", folders.commit
    mine = Lock(tmp_path)
    store = CheckpointStore(root, keep=3, claim=mine)
    store.save(1, tensors(1), {}, 1)

    def stopped(partial: Path, final: Path) -> None:
        with pytest.MonkeyPatch.context() as inside:
            inside.setattr(folders, "commit", commit)
            inside.setattr(folders, "_writing", set())  # of another process,
            inside.setattr(folders.process, "namespace", lambda: "pid:[1]")  # which cannot see the first one
            os.utime(tmp_path / LOCK_FILE, (1000, 1000))
            successor = CheckpointStore(root, keep=3, claim=Lock(tmp_path))
            assert successor.newest().step == 1
            successor.save(2, tensors(20), {}, 2)
        commit(partial, final)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "commit", stopped)
        with pytest.raises(SaveFailed):
            store.save(2, tensors(2), {}, 2)
    assert sorted(os.listdir(root)) == ["step-00000001", "step-00000002"]
    found = CheckpointStore(root, keep=3).newest()
    assert found.step == 2 and found.read("a")[0] == 20, "the successor's"
    with pytest.raises(FolderLost):
        store.save(3, tensors(3), {}, 3)


def test_names_of_two_containers_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = folders.scratch(tmp_path / "step-00000001", "partial")
    monkeypatch.setattr(folders.process, "namespace", lambda: "pid:[1]")
    assert here != folders.scratch(tmp_path / "step-00000001", "partial")


def test_nothing_is_uploaded_or_deleted_in_the_store_without_the_lock(tmp_path: Path) -> None:
    mine = Lock(tmp_path)
    store = CheckpointStore(tmp_path / "checkpoints", keep=9, claim=mine)
    for step in (1, 2, 3):
        store.save(step, tensors(step), {}, step)
    remote = Remote(f"file://{tmp_path}/store/run")
    mirror = Mirror(remote, store.root, keep=1, claim=mine)
    uploader = Uploader(mirror, Journal(lambda line: None))
    uploader.submit(folders.step_folder(store.root, 1))
    assert uploader.wait(60) is None and uploader.uploaded == 1
    mirror.upload(folders.step_folder(store.root, 2))
    before = remote.files()
    take_over(tmp_path)
    uploader.submit(folders.step_folder(store.root, 3))
    assert uploader.wait(60) is None, "it ends without a wait"
    uploader.submit(folders.step_folder(store.root, 3))
    assert uploader.wait(60) is None
    for act in (mirror.tidy, lambda: mirror.upload(folders.step_folder(store.root, 3))):
        with pytest.raises(FolderLost):
            act()
    assert remote.files() == before


def test_a_run_that_loses_its_folder_ends_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("text.txt").write_text(TEXT)
    Path("r.yaml").write_text(RECIPE)
    step, taken = loop.train_step, []

    def train_step(run: Any) -> Any:
        if run.step == 7 and not taken:
            taken.append(take_over(tmp_path / "run"))
        return step(run)

    monkeypatch.setattr(loop, "train_step", train_step)
    assert main(["train", "r.yaml"]) == 77
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("tokenizing")]
    assert len(error) == 1 and "node-b has taken the run folder over" in error[0], error
    rows = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 8))
    assert sorted(os.listdir("run/checkpoints")) == ["step-00000004", "step-00000006"]
    assert Path("run", LOCK_FILE).read_bytes() == taken[0]
    assert "stopped" not in json.loads(Path("run/environment.json").read_text())["starts"][-1]
