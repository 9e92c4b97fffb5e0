"""Retention against a slow reference, as pure rules and on the disk."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hlat.checkpoint.retention import Entry, expired, is_permanent
from hlat.checkpoint.store import CheckpointStore

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

# One save: go back so many of the kept checkpoints first (mostly not at all), then train so many steps.
SAVES = st.lists(st.tuples(st.sampled_from([0, 0, 0, 0, 1, 2]), st.integers(1, 5)), min_size=1, max_size=40)
TOKENS_PER_STEP = 7


@dataclass
class Saved:
    """What the reference remembers of one checkpoint that exists."""

    step: int
    permanent: bool

    @property
    def tokens(self) -> int:
        return self.step * TOKENS_PER_STEP


def save_reference(existing: list[Saved], step: int, keep: int, every: int | None) -> list[Saved]:
    """The checkpoints, oldest first, after saving `step`; walks through every token instead of dividing."""
    others = [saved for saved in existing if saved.step != step]
    before = max((saved.tokens for saved in others if saved.step < step), default=0)
    crossed = every is not None and any(t % every == 0 for t in range(before + 1, step * TOKENS_PER_STEP + 1))
    others.append(Saved(step, crossed))
    while sum(not saved.permanent for saved in others) > keep:
        others.remove(next(saved for saved in others if not saved.permanent))
    return others


def next_step(existing: list[Saved], back: int, forward: int) -> int:
    steps = [saved.step for saved in existing]
    return (steps[-1 - min(back, len(steps) - 1)] if steps else 0) + forward


@given(SAVES, st.integers(1, 4), st.none() | st.integers(1, 60))
@settings(max_examples=300, deadline=None)
def test_rules(saves: list[tuple[int, int]], keep: int, every: int | None) -> None:
    entries: list[Entry] = []
    reference: list[Saved] = []
    for sequence, (back, forward) in enumerate(saves, 1):
        step = next_step(reference, back, forward)
        reference = save_reference(reference, step, keep, every)
        others = [entry for entry in entries if entry.step != step]
        tokens = step * TOKENS_PER_STEP
        new = Entry(step, tokens, sequence, is_permanent(step, tokens, others, every))
        entries = [*others, new]
        gone = expired(entries, keep)
        assert new not in gone
        entries = [entry for entry in entries if entry not in gone]
        assert {(e.step, e.permanent) for e in entries} == {(s.step, s.permanent) for s in reference}


@given(
    st.lists(st.tuples(st.sampled_from([0, 0, 1]), st.integers(1, 4)), min_size=1, max_size=8),
    st.integers(1, 3),
)
@settings(max_examples=15, deadline=None)
def test_folder(saves: list[tuple[int, int]], keep: int) -> None:
    with TemporaryDirectory() as root:
        reference: list[Saved] = []
        for back, forward in saves:
            step = next_step(reference, back, forward)
            reference = save_reference(reference, step, keep, 40)
            store = CheckpointStore(Path(root), keep=keep, permanent_every_tokens=40, async_=bool(step % 2))
            store.save(step, {"a": torch.tensor(step)}, {}, tokens=step * TOKENS_PER_STEP)
            store.wait()
            assert store.steps() == sorted(saved.step for saved in reference)
            newest = store.newest()
            assert newest is not None and newest.step == step == int(newest.read("a"))


def test_every_crossing_keeps_one() -> None:
    """Published cadence: a checkpoint every 4.19 B tokens, a permanent one every 100 B."""
    entries: list[Entry] = []
    for number in range(1, 240):
        tokens = number * 4_194_304_000
        permanent = is_permanent(number, tokens, entries, 100_000_000_000)
        entries.append(Entry(number, tokens, number, permanent))
    assert [entry.tokens // 1_000_000_000 for entry in entries if entry.permanent][:4] == [100, 201, 301, 402]
    assert sum(entry.permanent for entry in entries) == 10


def test_a_permanent_one_stays_when_the_setting_changes(tmp_path: Path) -> None:
    CheckpointStore(tmp_path, keep=1, permanent_every_tokens=10).save(1, {}, {}, tokens=12)
    store = CheckpointStore(tmp_path, keep=1)
    for step in (2, 3):
        store.save(step, {}, {}, tokens=step * 12)
    assert store.steps() == [1, 3]


def test_a_damaged_checkpoint_takes_no_place() -> None:
    entries = [Entry(10, 10, 1), Entry(20, 20, 2, usable=False), Entry(15, 15, 3)]
    assert expired(entries, keep=2) == []
    assert [entry.step for entry in expired([*entries, Entry(17, 17, 4)], keep=2)] == [10, 20]


def test_a_damaged_newest_never_pushes_out_a_good_one(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2, warn=lambda line: None)
    for step in (10, 20):
        store.save(step, {"a": torch.ones(9)}, {}, tokens=step)
    (tmp_path / "step-00000020" / "meta.json").write_text("")
    store = CheckpointStore(tmp_path, keep=2, warn=lambda line: None)
    found = store.newest()
    assert found is not None and found.step == 10
    store.save(15, {"a": torch.ones(9)}, {}, tokens=15)
    assert store.steps() == [10, 15, 20]
    store.save(20, {"a": torch.ones(9)}, {}, tokens=20)
    assert store.steps() == [15, 20]
