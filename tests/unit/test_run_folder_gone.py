"""A run folder that is moved, deleted or replaced while a run trains in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from hlat.errors import FolderLost
from hlat.observe import place as places
from hlat.observe.place import Place
from hlat.observe.runfolder import RunFolder
from hlat.train import loop
from tests.unit import test_train_command as small

place, train = small.place, small.train  # `place` is a fixture
RUN = Path("runs/small")


def moved(run: Path) -> None:
    run.rename("moved")


def parent_moved(run: Path) -> None:
    run.parent.rename("moved")


def deleted(run: Path) -> None:
    shutil.rmtree(run)


def parent_deleted(run: Path) -> None:
    shutil.rmtree(run.parent)


def replaced(run: Path) -> None:
    moved(run)
    run.mkdir()
    (run / "mine").write_text("not to be touched")


def replaced_by_a_copy(run: Path) -> None:
    moved(run)
    shutil.copytree("moved", run)


def replaced_by_a_copy_without_lock(run: Path) -> None:
    replaced_by_a_copy(run)
    (run / ".lock").unlink()


CHANGES = [moved, parent_moved, deleted, parent_deleted]
CHANGES += [replaced, replaced_by_a_copy, replaced_by_a_copy_without_lock]
AWAY = {deleted: "was deleted", parent_deleted: "was deleted"}


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch) -> dict[int, Callable[[], None]]:
    """What happens after so many steps."""
    step, calls = loop.train_step, {}

    def with_calls(run: object) -> object:
        calls.pop(run.step, lambda: None)()  # type: ignore[attr-defined]
        return step(run)

    monkeypatch.setattr(loop, "train_step", with_calls)
    return calls


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    "change",
    [
        moved,
        pytest.param(deleted, marks=pytest.mark.slow),
        pytest.param(replaced, marks=pytest.mark.slow),
    ],
)
def test_it_is_noticed_within_one_save(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    after_step: dict[int, Callable[[], None]],
    change: Callable,
) -> None:
    seen = {}

    def act() -> None:
        change(RUN)
        seen.update(content(place / "runs"))

    after_step[3] = act
    with (
        pytest.warns(UserWarning, match="the run folder was .*rows wait")
        if change is not replaced
        else nullcontext()
    ):
        assert train("checkpoint.async=false", "log.every=1") == 77
    out, error = capsys.readouterr()
    assert "step 6/6" not in out and "checkpoint of step 4 saved" not in out
    assert error.count("hlat: error:") == 1 and "Traceback" not in error
    assert f"the run folder {AWAY.get(change, f'was moved to {place}/moved')}" in error
    assert content(place / "runs") == seen, "nothing is written there"
    assert (RUN.exists(), change is replaced) in ((False, False), (True, True))
    if change is not deleted:
        Path("moved/.lock").unlink()  # of this very process, which has not ended as it should
        assert train(f"run.dir={place}/moved") == 0, "it goes on from its new place"
        assert [row["step"] for row in small.rows("moved")] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = RunFolder(RUN).start("", "", description={})
    folder.claim.check_place()
    change(RUN)
    before = content(tmp_path)
    with pytest.raises(
        FolderLost, match="and another folder is" if RUN.exists() else "was (deleted|moved to)"
    ):
        folder.claim.check_place()
    folder.close()
    assert content(tmp_path).keys() - before.keys() == set(), "no lock is put back, and nothing made"


def test_a_folder_that_is_where_it_was_has_not_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    kept = Place(run)
    assert kept.change() == ""
    run.rename(tmp_path / "moved")
    run.symlink_to(tmp_path / "moved")
    assert kept.change() == "", "another disk, the same folder"
    run.unlink()
    monkeypatch.setattr(places.Place, "_link", lambda self: "")
    assert kept.change() == "", "the system does not tell"
    monkeypatch.undo()
    assert kept.change() == f"was moved to {tmp_path}/moved"
    (tmp_path / "moved").rename(run)
    assert kept.change() == "", "it is back"
    kept.close()
    kept.close()
    assert kept.change() == ""


def test_a_folder_is_no_handle_too_many(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        RunFolder(tmp_path / "run").start("", "", description={}).close()
    assert len(os.listdir("/proc/self/fd")) == before
