"""What docs/operations/storage.md says of copies in a store: as folders, at the end, while a store fails."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from hlat.checkpoint import mirror as mirrors
from hlat.checkpoint.folder import step_folder
from hlat.checkpoint.mirror import Mirror
from hlat.checkpoint.reader import open_checkpoint
from hlat.checkpoint.store import CheckpointStore
from hlat.checkpoint.uploader import Uploader
from hlat.cli import main
from hlat.errors import SaveFailed
from hlat.recipe import load
from hlat.storage.journal import Journal
from hlat.storage.remote import Remote, StoreError
from hlat.train.remote import RemoteSaves

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    """With a checkpoint of step 1."""
    made = CheckpointStore(tmp_path / "run/checkpoints", keep=2)
    made.save(1, {"a": torch.ones(50)}, {}, 1, wait=True)
    return made


@pytest.mark.parametrize("name", [None, "step-00000001"])
def test_a_folder_of_the_store_copied_to_a_disk_opens(
    store: CheckpointStore, tmp_path: Path, name: str | None
) -> None:
    (tmp_path / "run/metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 1}) + "\n")
    copy = Mirror(Remote(f"file://{tmp_path}/store"), store.root, keep=2).upload(step_folder(store.root, 1))
    assert copy is not None and copy.name.startswith("step-00000001-")
    here = tmp_path / "disk" / (name or copy.name)
    shutil.copytree(tmp_path / "store" / copy.name, here)
    assert sorted(path.name for path in here.iterdir()) == [
        "complete.json",
        "data-00000.safetensors",
        "index.json",
        "meta.json",
        "run",
    ]
    checkpoint = open_checkpoint(here)
    checkpoint.verify()
    assert checkpoint.step == 1 and (checkpoint.read("a") == 1).all()


@pytest.mark.parametrize("keep", [1, 2])
def test_how_many_copies_there_are_at_once(
    tmp_path: Path, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more than are kept; and parts of those that were given up, as long as they are on the disk."""
    store = CheckpointStore(tmp_path / "run/checkpoints", keep=keep, permanent_every_tokens=5)
    remote, seen, upload, failing = Remote(f"file://{tmp_path}/store"), [], Remote.upload, [False]
    mirror = Mirror(remote, store.root, keep)

    def count() -> tuple[int, int]:
        found = mirror.look()
        return sum(not copy.entry.permanent for copy in found.whole), len(found.unfinished)

    def counted(self: Remote, file: Path, target: str) -> int:
        seen.append(count()[0])
        if failing[0] and target.endswith("index.json"):
            raise StoreError("no")
        return upload(self, file, target)

    monkeypatch.setattr(Remote, "upload", counted)
    for step in range(1, 4 * keep + 2):
        store.save(step, {"a": torch.ones(9)}, {}, step)
        mirror.upload(step_folder(store.root, step))
        seen.append(count()[0])
        mirror.tidy()
        assert count() == (min(step - step // 5, keep), 0)
    assert max(seen) == keep + 1
    failing[0] = True
    for step in range(21, 22 + keep):
        store.save(step, {"a": torch.ones(9)}, {}, 4 * keep + 1)
        with pytest.raises(StoreError):
            mirror.upload(step_folder(store.root, step))
    mirror.tidy()
    assert count()[1] == keep, "the one of them that is not on the disk any more has gone"
    failing[0] = False
    for step in range(31, 31 + keep):
        store.save(step, {"a": torch.ones(9)}, {}, 4 * keep + 1)
        mirror.upload(step_folder(store.root, step))
        mirror.tidy()
    assert count() == (keep, 0)


@pytest.mark.parametrize("stopped", [False, True])
def test_how_long_the_end_of_a_run_waits_for_the_store(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped: bool
) -> None:
    """After a signal for half of the grace time, and then there is a line; else as long as patience says."""
    go_on = threading.Event()

    def hangs(self: Remote, file: Path, target: str) -> int:
        assert go_on.wait(20)
        raise StoreError("at last")

    monkeypatch.setattr(Remote, "upload", hangs)
    seconds = {"patience": 60, "grace": 0.6} if stopped else {"patience": 0.6, "grace": 60}
    sections = [f"checkpoint.{key}={value}" for key, value in seconds.items()]
    lines: list[str] = []
    recipe = load("tiny", [f"checkpoint.remote=file://{tmp_path}/store", *sections])
    saves = RemoteSaves(recipe, store.root, Journal(lines.append))
    saves.start(step_folder(store.root, 1))
    begun = time.monotonic()
    try:
        if stopped:
            saves.finish(stopped=True)
            saves.journal.report()
            assert any("safe in" in line and "the next start goes on" in line for line in lines)
            assert 0.3 <= time.monotonic() - begun < 30
        else:
            with pytest.raises(SaveFailed, match=f"safe in {store.root} but not in the store"):
                saves.finish(stopped=False)
            assert time.monotonic() - begun >= 0.6
    finally:
        go_on.set()


def test_a_failing_store_is_asked_again_and_again_with_growing_pauses(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    attempts = iter([True] * 9 + [False])
    upload = mirrors.Mirror.upload

    def failing(self: Mirror, path: Path) -> Any:
        if next(attempts):
            raise StoreError("no")
        return upload(self, path)

    monkeypatch.setattr(Mirror, "upload", failing)
    monkeypatch.setattr(Uploader, "_pause", lambda self, seconds: bool(pauses.append(seconds)))
    lines: list[str] = []
    journal = Journal(lines.append)
    uploader = Uploader(Mirror(Remote(f"file://{tmp_path}/store"), store.root, 2), journal)
    uploader.submit(step_folder(store.root, 1))
    assert uploader.wait(20) is None and uploader.uploaded == 1
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    rows = [row for row in journal.rows if row["what"] == "upload"]
    assert [bool(row["error"]) for row in rows] == [True] * 9 + [False], "every attempt is a row"
    assert all({"step", "seconds", "bytes", "error"} <= set(row) for row in rows)
    journal.report()
    assert sum("it will be tried again" in line for line in lines) == 1, "each kind is told once"


def test_text_is_not_read_from_a_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("words")
    source = f"data.sources=[{{path: 'file://{tmp_path}/text'}}]"
    assert main(["train", "tiny", "run.dir=run", source]) == 2
    error = capsys.readouterr().err
    assert error.count("hlat: error:") == 1 and "no manifest.json" in error
    assert "hlat data tokenize" in error and not (tmp_path / "run").exists()
