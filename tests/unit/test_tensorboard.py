"""TensorBoard's files: every step once, after rewinds, restarts and whatever happens to the files."""

from __future__ import annotations

import os
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hlat.errors import FolderLost
from hlat.observe import tensorboard
from hlat.observe.claim import Claim
from hlat.observe.sinks import TensorBoardSink

TAG = "train/loss"


def where(folder: Path) -> Path:
    return folder / "logs" / "tensorboard"


def files(folder: Path) -> list[Path]:
    return sorted(where(folder).glob("events.out.tfevents.*"))


def shown(reader: EventAccumulator, tag: str = TAG) -> list[tuple[int, float]]:
    """What TensorBoard draws, in its order."""
    reader.Reload()
    return [(e.step, e.value) for e in reader.Scalars(tag)] if tag in reader.Tags()["scalars"] else []


def reader(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(where(folder)), size_guidance={"scalars": 0})


class Trained:
    """A run's sink, and what is right: the points that count."""

    def __init__(self, folder: Path, after: int = 0) -> None:
        self.folder, self.step, self.value = folder, after, 0.0
        self.points: dict[int, float] = {}
        self.sink = TensorBoardSink(folder, after)

    def train(self, steps: int) -> None:
        for _ in range(steps):
            self.step, self.value = self.step + 1, self.value + 0.5
            self.sink.row({"kind": "train", "step": self.step, "loss": self.value, "skipped": False})
            self.points[self.step] = self.value
        self.sink.flush()

    def back(self, step: int, *, new_process: bool) -> None:
        """To an earlier step: by the guard, or after a crash."""
        self.step = min(step, self.step)
        self.points = {s: v for s, v in self.points.items() if s <= self.step}
        if new_process:
            self.sink = TensorBoardSink(self.folder, self.step)  # the one before was killed: no close
        else:
            self.sink.rewind(self.step)

    def right(self) -> list[tuple[int, float]]:
        return sorted(self.points.items())


@given(
    st.lists(
        st.tuples(st.integers(1, 6), st.sampled_from(["go on", "rewind", "restart"]), st.integers(0, 30)),
        min_size=1,
        max_size=12,
    ),
    st.sets(st.integers(0, 11)),
)
@settings(max_examples=40, deadline=None)
def test_each_step_is_shown_once_to_new_and_to_old_readers(
    story: list[tuple[int, str, int]], looks: set[int]
) -> None:
    """All in one second: names must tell the order, not the clock."""
    with tempfile.TemporaryDirectory() as name:
        run = Trained(Path(name))
        old = reader(run.folder)
        for number, (steps, event, to) in enumerate(story):
            run.train(steps)
            if number in looks:
                assert shown(old) == run.right()
            if event != "go on":
                run.back(to, new_process=event == "restart")
        run.train(1)
        assert shown(reader(run.folder)) == shown(old) == run.right()
        whole = [e.step for f in files(run.folder) for e in steps_of(f)]
        assert whole == [step for step, _ in run.right()]  # also for readers that know of no restarts
        run.sink.close()


def steps_of(path: Path) -> list[object]:
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto import event_pb2

    events = [event_pb2.Event.FromString(raw) for raw in RawEventFileLoader(str(path)).Load()]
    return [event for event in events if event.HasField("summary")]


def test_a_run_that_starts_over_shows_nothing_of_before(tmp_path: Path) -> None:
    run = Trained(tmp_path)
    old = reader(tmp_path)
    run.train(20)
    assert len(shown(old)) == 20
    run.back(0, new_process=True)
    assert shown(reader(tmp_path)) == []
    run.train(3)
    assert shown(old) == shown(reader(tmp_path)) == run.right()


def test_a_clock_that_goes_back_hides_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Trained(tmp_path)
    run.train(5)
    old = reader(tmp_path)
    shown(old)
    now = time.time() - 3600
    monkeypatch.setattr(tensorboard.time, "time", lambda: now)
    run.back(3, new_process=True)
    run.train(4)
    assert shown(old) == shown(reader(tmp_path)) == run.right()


def test_points_of_other_steps_and_a_torn_end_are_cut_where_they_lie(tmp_path: Path) -> None:
    run = Trained(tmp_path)
    run.train(4)
    run.sink.row({"kind": "storage", "step": 2, "seconds": 1.5})  # an upload that ended later
    run.train(2)
    (path,) = files(tmp_path)
    path.write_bytes(path.read_bytes()[:-7])
    run.back(3, new_process=True)
    run.train(2)
    assert shown(reader(tmp_path)) == run.right()
    assert shown(reader(tmp_path), "storage/seconds") == [(2, 1.5)]
    assert {p.name[:19] for p in where(tmp_path).iterdir()} == {"events.out.tfevents"}


@pytest.mark.parametrize("harm", ["delete", "replace", "cut", "folder"])
def test_files_taken_away_neither_end_nor_silence_the_run(harm: str, tmp_path: Path) -> None:
    run = Trained(tmp_path)
    run.train(5)
    (path,) = files(tmp_path)
    if harm == "delete":
        path.unlink()
    elif harm == "replace":
        path.rename(tmp_path / "aside")
        path.write_bytes(b"")
    elif harm == "cut":
        os.truncate(path, path.stat().st_size - 3)
    else:
        where(tmp_path).rename(tmp_path / "aside")
    run.train(3)
    run.train(3)
    after = [point for point in run.right() if point[0] > 5]
    assert shown(reader(tmp_path))[-6:] == after
    assert len(files(tmp_path)) == (2 if harm in ("replace", "cut") else 1)


def test_a_full_disk_is_told_once_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Trained(tmp_path)
    run.train(2)
    write, room = os.write, 25

    def full(file: int, block: bytes) -> int:
        if room:
            return write(file, bytes(block)[:room])
        raise OSError(28, "No space left on device")

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        room = 0
        monkeypatch.setattr(tensorboard.os, "write", full)
        run.train(2)
        run.train(2)
        room = 25  # bytes at a time
        run.train(2)
        room = 0
        run.train(2)
        monkeypatch.undo()
        run.train(2)
    assert [str(w.message).count("No space left on device); rows wait") for w in told] == [1, 1]
    assert shown(reader(tmp_path)) == run.right()
    assert len(files(tmp_path)) == 1


class Looked(Claim):
    """The first look passes, and then another process trains; it is `lost` from the next one on."""

    def __init__(self, successor: Callable[[], None]) -> None:
        self.successor, self.lost = successor, False

    def confirm(self) -> None:
        if self.lost:
            raise FolderLost("another process has the folder")
        self.lost = True
        self.successor()


@pytest.mark.parametrize("act", ["go back", "a new file", "later"])
def test_who_has_lost_the_folder_writes_nothing_and_cuts_nothing(tmp_path: Path, act: str) -> None:
    def successor() -> None:
        later = Trained(tmp_path, 6)
        later.train(12)
        later.sink.close()

    first = Trained(tmp_path)
    first.train(10)
    if act == "a new file":
        os.rename(files(tmp_path)[0], tmp_path / "away")
    claim = first.sink._files._claim = Looked(successor)
    if act == "later":
        claim.confirm()
    before = {path: path.read_bytes() for path in files(tmp_path)} if act == "later" else {}
    with pytest.raises(FolderLost):
        first.sink.rewind(3) if act == "go back" else first.train(1)
    for again in (lambda: first.train(1), lambda: first.sink.rewind(2)):
        with pytest.raises(FolderLost):
            again()
    first.sink.close()
    assert act != "later" or before == {path: path.read_bytes() for path in files(tmp_path)}
    kept = [] if act == "a new file" else [(step, step / 2) for step in range(1, 7)]
    assert shown(reader(tmp_path)) == [*kept, *((6 + n, n / 2) for n in range(1, 13))]
