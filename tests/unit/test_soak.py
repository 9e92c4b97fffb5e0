"""Runs over many windows of everything: a soak, and bad steps under each policy through kill -9."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hlat.checkpoint.reader import open_checkpoint
from hlat.cli import main
from hlat.data import open_data
from hlat.recipe import load

sys.path.insert(0, str(Path(__file__).parents[1]))

import poisoned  # noqa: F401 (registers the objective)
from soak import MEASURED, Sample, Soak, differences, grown, rows_of, wrong_decisions

BAD = (401, 900, 930)  # farther apart than a window, in which a spike hides the next one
RUNS = {
    "skip": "guard={name: skip, window: 16, sigma: 12}",
    "rewind": "guard={name: rewind, window: 16, sigma: 12, after: 40}",
    "stop": "guard={name: stop, window: 16, sigma: 12}",
}


@pytest.mark.slow
def test_eight_thousand_steps_with_the_default_guard(tmp_path: Path) -> None:
    from soak import faults

    soak = Soak(tmp_path / "soak", 8000)
    run = soak.train("whole")
    assert faults(soak, run, soak.samples("whole")) == []
    assert not any(row["skipped"] for row in rows_of(run)) and rows_of(run, "anomaly") == []


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Soak]:
    """1,500 steps, three of which read a bad row, done in this process under each policy."""
    soak = Soak(tmp_path_factory.mktemp("planted") / "soak", 1500)
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(soak.folder / "cache"))
        torch.set_num_threads(1)  # as in the processes that are killed: sums are the same to the bit
        _, recipe, *overrides = soak.arguments("data")
        data = open_data(load(recipe, overrides), quiet=True)
        rows = [data.batches(step - 1, 16, 1)[0].targets[3].tolist() for step in BAD]
        soak.overrides.append(f"objective={{name: poisoned, rows: {rows}, factor: 100.0}}")
        for name, guard in RUNS.items():
            assert main(soak.arguments(name, guard)) == (3 if name == "stop" else 0)
        torch.set_num_threads(threads)
        yield soak


@pytest.mark.slow
def test_bad_steps_are_dropped_once_under_each_policy(planted: Soak) -> None:
    skip, rewind, stop = (planted.folder / name for name in RUNS)
    assert [row["step"] for row in rows_of(skip) if row["skipped"]] == list(BAD)
    assert [row["bad_step"] for row in rows_of(skip, "anomaly")] == list(BAD)
    assert int(open_checkpoint(skip).read("run/updates")) == 1497
    taken = [(row["policy"], row["skipped_data"]) for row in rows_of(rewind, "anomaly")]
    assert taken == [("rewind", [401, 441]), ("rewind", [900, 940])]
    assert not any(row["skipped"] for row in rows_of(rewind)) and len(rows_of(rewind)) == 1500
    assert int(open_checkpoint(rewind).read("run/updates")) == 1500
    assert [(row["policy"], row["bad_step"]) for row in rows_of(stop, "anomaly")] == [("stop", 401)]
    assert open_checkpoint(stop).step == 372


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kills"), [("rewind", 5), ("skip", 2)])
def test_kills_change_nothing(planted: Soak, name: str, kills: int) -> None:
    """Not a row but for times, not a bit of the last checkpoint."""
    killed = planted.train_killed(f"{name}-killed", RUNS[name], kills=kills)
    assert differences(planted.folder / name, killed) == []


def test_the_soak_sees_what_is_not_right(tmp_path: Path) -> None:
    """A leak, files left open, a decision that the window does not justify, and runs that differ."""
    flat = [Sample(step, 400 << 20, 9) for step in range(1, 101)]
    assert grown(flat, 100) == []
    leak = [dataclasses.replace(s, memory=s.memory + s.step * (1 << 18)) for s in flat]
    open_ = [dataclasses.replace(s, files=s.files + s.step // 10) for s in flat]
    assert "memory grew" in grown(leak, 100)[0] and "open files grew" in grown(open_, 100)[0]
    assert grown(flat[:50], 100) == ["50 samples of memory and open files"]

    rows = [
        {"kind": "train", "step": s, "loss": 3 + s % 5 / 100, "grad_norm": 1 + s % 7 / 50, "skipped": False}
        for s in range(1, 301)
    ]
    assert wrong_decisions(rows) == []
    rows[250]["skipped"] = True
    assert wrong_decisions(rows) == ["1 decisions of the guard are wrong, the first at step 251"]
    rows[250] |= {"loss": 9.0}
    assert wrong_decisions(rows) == []
    rows[280] |= {"loss": 11.0}
    assert "step 281" in wrong_decisions(rows)[0]
    assert all(name not in rows[0] for name in MEASURED)


def test_runs_that_differ_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, loss, times in (("a", 1.0, 0.1), ("b", 1.0, 0.2), ("c", 1.5, 0.1)):
        (tmp_path / name).mkdir()
        row = {"kind": "train", "step": 1, "loss": loss, "step_seconds": times}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")

    class Saved:
        step = 1

        def __init__(self, path: Path) -> None:
            self.value = torch.tensor(1.0 if path.name == "a" else 2.0)

        def names(self) -> list[str]:
            return ["model/x"]

        def read(self, name: str) -> torch.Tensor:
            return self.value

    monkeypatch.setattr("soak.open_checkpoint", Saved)
    a, b, c = (tmp_path / name for name in "abc")
    assert differences(a, a) == [] and differences(a, b) == ["model/x differ"]
    assert "rows of kind train differ from number 0 on: 1 and 1" in differences(a, c)
