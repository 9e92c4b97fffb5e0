"""What a store holds may be all that is left of a run: nothing is deleted there but what is known not to be
needed, and no start takes damaged copies for none.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from hlat.checkpoint.folder import step_folder
from hlat.checkpoint.mirror import Mirror, Owner
from hlat.checkpoint.store import CheckpointStore
from hlat.errors import UserError
from hlat.observe.runfolder import RunFolder
from hlat.recipe import load
from hlat.storage.remote import Remote, StoreError
from hlat.train.resume import check_resume
from tests.unit import test_train_command as small

place, train, rows = small.place, small.train, small.rows  # `place` is a fixture


def unmark(copy: Path) -> None:
    (copy / "complete.json").unlink()


def empty(copy: Path) -> None:
    (copy / "complete.json").write_bytes(b"")


def cut(copy: Path, name: str = "data-00000.safetensors") -> None:
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[: len(data) // 2])


def flip(copy: Path, name: str = "data-00000.safetensors") -> None:
    data = bytearray((copy / name).read_bytes())
    data[-9] ^= 1
    (copy / name).write_bytes(data)


def lose(copy: Path) -> None:
    (copy / "index.json").unlink()


def swap(copy: Path) -> None:
    """The marker of another checkpoint, itself sound."""
    from hlat.checkpoint.codec import seal, unseal

    marker = unseal((copy / "complete.json").read_bytes())
    (copy / "complete.json").write_bytes(seal({**marker, "step": marker["step"] + 1}))


def strange(copy: Path) -> None:
    """Meta data of another kind, whose checksum is right."""
    from hlat.checkpoint.codec import seal, unseal

    marker = unseal((copy / "complete.json").read_bytes())
    (copy / "meta.json").write_bytes(b"[]")
    marker["files"]["meta.json"] = {"bytes": 2, "sha256": hashlib.sha256(b"[]").hexdigest()}
    (copy / "complete.json").write_bytes(seal(marker))


DAMAGES: list[Callable[[Path], None]] = [unmark, empty, cut, flip, lose, swap]
DAMAGES += [lambda copy: flip(copy, "meta.json"), lambda copy: flip(copy, "complete.json"), strange]
NAMES = [
    "unmarked",
    "emptied",
    "cut",
    "flipped",
    "file lost",
    "marker of another",
    "meta",
    "marker",
    "a list",
]


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def kept(before: dict[str, bytes], after: dict[str, bytes]) -> bool:
    return all(after.get(name) == data for name, data in before.items())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps and its store, with copies of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        small.make_place(folder, patch)
        remote = f"checkpoint.remote=file://{folder}/store"
        assert train(remote, "run.stop_at_step=2") == train(remote, "run.stop_at_step=4") == 0
    assert len(list((folder / "store" / "small").iterdir())) == 2
    return folder


@pytest.fixture
def stored(place: Path, made: Path) -> tuple[str, Path]:
    """The setting of a store, and the run's folder in it."""
    shutil.copytree(made / "store", place / "store")
    return f"checkpoint.remote=file://{place}/store", place / "store" / "small"


def refusal(remote: str, *overrides: str) -> str:
    """What a start says that is refused before anything is written."""
    recipe = load("small.yaml", [remote, "run.dir=new", *overrides])
    with pytest.raises(UserError) as caught:
        check_resume(recipe, "", RunFolder("new"), lambda line: None)
    return caught.value.line()


@pytest.mark.parametrize(
    "damage", [d for d in DAMAGES if d is not flip], ids=[n for n in NAMES if n != "flipped"]
)
def test_a_store_of_damaged_copies_is_not_started_over(
    stored: tuple[str, Path], damage: Callable[[Path], None]
) -> None:
    remote, folder = stored
    for copy in folder.iterdir():
        damage(copy)
    before = content(folder)
    error = refusal(remote)
    assert "in the store and none can be used (step-00000004-" in error and "; step-00000002-" in error
    assert "another run.name" in error
    assert "holds checkpoints of this run and run.resume is never" in refusal(remote, "run.resume=never")
    assert content(folder) == before


@pytest.mark.parametrize("damage", [unmark, flip], ids=["unmarked", "flipped"])
def test_a_run_whose_store_is_damaged_ends_with_2(
    stored: tuple[str, Path], capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    remote, folder = stored
    for copy in folder.iterdir():
        damage(copy)
    before = content(folder)
    assert train(remote, "run.dir=new") == 2
    error = capsys.readouterr().err
    assert error.count("hlat: error:") == 1 and "in the store and none can be used (step-00000004-" in error
    assert content(folder) == before and not Path("new/metrics.jsonl").exists()


def test_a_single_copy_without_its_marker_is_enough(stored: tuple[str, Path]) -> None:
    """Unlike on the disk: an upload that was cut off says that it is one."""
    remote, folder = stored
    first, second = sorted(folder.iterdir())
    shutil.rmtree(second)
    unmark(first)
    assert "none can be used" in refusal(remote)
    (first / "unfinished.json").write_text("{}")
    check_resume(load("small.yaml", [remote, "run.dir=new"]), "", RunFolder("new"), lambda line: None)


def test_a_store_that_cannot_be_listed_is_not_an_empty_one(
    stored: tuple[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    remote, folder = stored
    monkeypatch.setattr(Remote, "_find", lambda *args, **more: (_ for _ in ()).throw(StoreError("no list")))
    assert "did not answer for 0 s: no list" in refusal(remote, "checkpoint.patience=0")


@pytest.mark.parametrize("damage", [pytest.param(empty, marks=pytest.mark.slow), flip])
def test_the_newest_good_copy_is_taken_and_the_damaged_stay(
    stored: tuple[str, Path], capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None]
) -> None:
    remote, folder = stored
    damaged = max(folder.iterdir())
    damage(damaged)
    before = content(damaged)
    assert train(remote, "run.dir=new", "checkpoint.keep=1", "checkpoint.every=1") == 0
    out = capsys.readouterr().out
    assert "skipped checkpoint" in out and "step-00000004-" in out and "checkpoint of step 2 fetched" in out
    assert [row["step"] for row in rows("new")] == [1, 2, 3, 4, 5, 6]
    assert content(damaged) == before


@pytest.mark.slow
def test_a_disk_that_is_ahead_is_continued_and_mends_the_store(
    stored: tuple[str, Path], made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remote, folder = stored
    for copy in folder.iterdir():
        cut(copy)
    older, newer = sorted(folder.iterdir())
    before = content(older)
    shutil.copytree(made / "runs", "runs")
    assert train(remote, "checkpoint.keep=1") == 0
    assert f"skipped checkpoints in file://{folder}: step-00000004-" in capsys.readouterr().out
    assert content(older) == before and [row["step"] for row in rows("runs/small")] == [1, 2, 3, 4, 5, 6]
    assert not newer.exists(), "whole again, and then one too many"


# -- retention


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "run" / "checkpoints", keep=9)


def save(store: CheckpointStore, step: int, **meta: Any) -> Path:
    store.save(step, {"a": torch.full((50,), float(step))}, meta, step, wait=True)
    return step_folder(store.root, step)


def steps(mirror: Mirror) -> list[int]:
    return [copy.entry.step for copy in mirror.copies()]


def test_nothing_goes_before_a_newer_copy_is_known_to_be_good(store: CheckpointStore, tmp_path: Path) -> None:
    remote = Remote(f"file://{tmp_path}/store")
    mirror = Mirror(remote, store.root, keep=9)
    for step in (1, 2, 3):
        mirror.upload(save(store, step))
    later = Mirror(remote, store.root, keep=1)
    assert later.tidy() == [] and steps(later) == [1, 2, 3], "it has compared none of them"
    later.upload(step_folder(store.root, 3))
    assert later.tidy() == [], "all was there: nothing was compared"
    later.upload(save(store, 4))
    assert [copy.entry.step for copy in later.tidy()] == [1, 2, 3] and steps(later) == [4]


def test_a_fetched_copy_is_known_to_be_good(store: CheckpointStore, tmp_path: Path) -> None:
    remote = Remote(f"file://{tmp_path}/store")
    mirror = Mirror(remote, store.root, keep=9)
    for step in (1, 2):
        mirror.upload(save(store, step))
    later = Mirror(remote, tmp_path / "other" / "checkpoints", keep=1)
    later.fetch(later.copies()[-1])
    later.tidy()
    assert steps(later) == [2]


def test_copies_of_another_run_are_left(store: CheckpointStore, tmp_path: Path) -> None:
    remote = Remote(f"file://{tmp_path}/store")
    other = Mirror(remote, store.root, keep=9)
    other.upload(save(store, 1, run="other"))
    mirror = Mirror(remote, store.root, 1, owner=Owner("me", lambda meta: meta.get("run") == "me"))
    for step in (2, 3, 4):
        mirror.upload(save(store, step, run="me"))
        mirror.tidy()
    assert steps(mirror) == [1, 4]


def test_damaged_copies_are_left_and_take_no_place(store: CheckpointStore, tmp_path: Path) -> None:
    remote = Remote(f"file://{tmp_path}/store")
    mirror = Mirror(remote, store.root, keep=2)
    for step in (1, 2, 3):
        mirror.upload(save(store, step))
    (copy,) = (tmp_path / "store").glob("step-00000002-*")
    flip(copy, "meta.json")  # no listing shows it
    before = content(copy)
    again = Mirror(remote, store.root, keep=1)
    for step in (4, 5, 6):
        again.upload(save(store, step))
        again.tidy()
    assert steps(again) == [2, 6] and content(copy) == before


def test_a_damaged_copy_of_a_checkpoint_that_is_here_is_mended(
    store: CheckpointStore, tmp_path: Path
) -> None:
    remote = Remote(f"file://{tmp_path}/store")
    path = save(store, 1)
    Mirror(remote, store.root, keep=2).upload(path)
    (copy,) = (tmp_path / "store").iterdir()
    good = content(copy)
    for damage in (unmark, empty, cut, flip, lose):
        damage(copy)
        mirror = Mirror(remote, store.root, keep=2)
        mirror.unusable[copy.name] = "found out"  # what was flipped shows when it is fetched
        assert mirror.upload(path) is not None and content(copy) == good


def test_a_deletion_that_was_cut_off_goes_on(
    store: CheckpointStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remote = Remote(f"file://{tmp_path}/store")
    mirror = Mirror(remote, store.root, keep=1, owner=Owner("me"))
    mirror.upload(save(store, 1))
    path = save(store, 2)
    mirror.upload(path)
    with monkeypatch.context() as patch:
        patch.setattr(remote, "files", partial(_dies, remote.files()))
        with pytest.raises(SystemExit):
            mirror.tidy()
    shutil.rmtree(step_folder(store.root, 1))
    again = Mirror(remote, store.root, keep=1, owner=Owner("me"))
    assert again.look().damaged == {} and len(again.look().unfinished) == 1
    again.tidy()
    assert steps(again) == [2] and len({name.partition("/")[0] for name in remote.files()}) == 1


def _dies(known: dict[str, int], folder: str = "") -> dict[str, int]:
    """A listing whose second call, inside the deletion, is the process's last."""
    if folder:
        raise SystemExit
    return known


def test_rows_on_the_disk_that_a_fetched_copy_lacks_are_put_aside(
    store: CheckpointStore, tmp_path: Path
) -> None:
    run, remote = tmp_path / "run", Remote(f"file://{tmp_path}/store")
    (run / "checkpoints").mkdir(parents=True)
    row = '{{"kind":"train","step":{},"loss":{}}}\n'
    (run / "metrics.jsonl").write_text(row.format(1, 1) + row.format(2, 2))
    mirror = Mirror(remote, store.root, keep=2)
    mirror.upload(save(store, 2))
    (copy,) = mirror.copies()
    (run / "metrics.jsonl").write_text(row.format(1, 1) + '{"kind"')
    mirror.fetch(copy)
    assert not (run / "logs").exists(), "all that was here came back"
    for number in (1, 2):
        (run / "metrics.jsonl").write_text(row.format(1, 7))
        mirror.fetch(copy)
        assert (run / "logs" / f"metrics-aside-{number}.jsonl").read_text() == row.format(1, 7)
    assert [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2]
