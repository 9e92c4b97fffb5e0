"""How many checkpoints lie on the disk at once, at every moment of many saves."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hlat.checkpoint import folder as folders
from hlat.checkpoint.mirror import Mirror
from hlat.checkpoint.retention import most_at_once
from hlat.checkpoint.store import CheckpointStore
from hlat.checkpoint.uploader import Uploader
from hlat.storage.journal import Journal
from hlat.storage.remote import Remote

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def rolling(root: Path) -> int:
    """Folders of checkpoints, hidden ones included, but for the permanent."""
    count = 0
    for path in (p for p in root.glob("*") if p.is_dir()):
        marker = path / folders.MARKER
        count += not (marker.exists() and json.loads(marker.read_text())["permanent"])
    return count


@pytest.fixture
def most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number there was before and after every step of a save."""
    seen: list[int] = []
    root = tmp_path / "run/checkpoints"

    def watched(work: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            seen.append(rolling(root))
            try:
                return work(*arguments)
            finally:
                seen.append(rolling(root))

        return call

    for name in ("begin", "seal_folder", "commit", "remove", "abandon"):
        monkeypatch.setattr(folders, name, watched(getattr(folders, name)))
    return seen


@pytest.mark.parametrize("every", [None, 30])
@pytest.mark.parametrize("async_", [False, True])
@pytest.mark.parametrize("keep", [1, 3])
def test_one_more_than_are_kept(
    tmp_path: Path, most: list[int], keep: int, async_: bool, every: int | None
) -> None:
    root = tmp_path / "run/checkpoints"
    store = CheckpointStore(root, keep=keep, async_=async_, permanent_every_tokens=every)
    for step in range(1, 4 * keep + 2):
        store.save(step, {"a": torch.ones(9)}, {}, tokens=9 * step)
        store.wait()
        assert rolling(root) <= keep
    assert max(most) == most_at_once(keep, remote=False) == keep + 1


@pytest.mark.parametrize("keep", [1, 3])
def test_and_one_that_is_being_uploaded(
    tmp_path: Path, most: list[int], keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, remote = tmp_path / "run/checkpoints", Remote(f"file://{tmp_path}/store/run")
    store = CheckpointStore(root, keep=keep)
    uploader = Uploader(Mirror(remote, root, keep), Journal(lambda line: None))
    store.keep_back = uploader.keeps
    upload, begun, go_on = remote.upload, threading.Event(), threading.Semaphore(0)

    def slow(file: Path, target: str) -> int:
        begun.set()
        assert go_on.acquire(timeout=20)
        return upload(file, target)

    monkeypatch.setattr(remote, "upload", slow)
    for step in range(1, 4 * keep + 3):
        store.save(step, {"a": torch.ones(9)}, {}, tokens=step)
        uploader.submit(folders.step_folder(root, step))
        assert begun.wait(20)
        if step == 2 * keep + 1:
            go_on.release(3)  # the files of one: it goes on to another
    go_on.release(1000)
    assert uploader.wait(20) is None
    store.save(step + 1, {"a": torch.ones(9)}, {}, tokens=step + 1)
    assert rolling(root) == keep
    assert max(most) == most_at_once(keep, remote=True) == keep + 2


def test_uploads_that_go_on_to_the_next_one_meanwhile_keep_back_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    uploaded = [1]

    def keeps(step: int) -> bool:
        answer = step == uploaded[0]
        if answer:
            uploaded[0] += 1  # between two questions
        return answer

    store.keep_back = lambda step: step == 1
    for step in (1, 2):
        store.save(step, {"a": torch.ones(9)}, {}, tokens=step)
    store.keep_back = keeps
    store.save(3, {"a": torch.ones(9)}, {}, tokens=3)
    assert store.steps() == [1, 3]


def test_the_copy_of_a_save_in_the_background_is_made_once_and_as_large_as_the_state(
    tmp_path: Path,
) -> None:
    tensors = {"model/a": torch.ones(100, 7), "optim/b": torch.ones(50, dtype=torch.bfloat16)}
    store = CheckpointStore(tmp_path, keep=1, async_=True)
    copies = []
    for step in range(1, 6):
        store.save(step, tensors, {}, tokens=step)
        store.wait()
        copies.append({copy.data_ptr() for copy in store._buffers.values()})
        size = sum(copy.numel() * copy.element_size() for copy in store._buffers.values())
        assert size == sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert all(found == copies[0] for found in copies)
    store = CheckpointStore(tmp_path, keep=1, async_=True)
    store.save(6, tensors, {}, tokens=6, wait=True)
    assert not store._buffers, "whoever waits needs none"
