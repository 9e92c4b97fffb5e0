"""Parts of the NxD backend that need neither NxD nor torch-xla."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from hlat.backend.nxd import start
from hlat.backend.nxd.flash import unusable
from hlat.backend.nxd.graphs import Counts, GraphGuard
from hlat.backend.nxd.precompile import commands, scratch
from hlat.checkpoint.nxd import from_nxd, newest_nxd, open_nxd
from hlat.checkpoint.reader import open_checkpoint
from hlat.cli import main
from hlat.errors import TrainingStopped, UserError
from hlat.recipe import load


def guard(counts: list[Counts], **options: int) -> tuple[GraphGuard, list[str]]:
    lines: list[str] = []
    return GraphGuard(say=lines.append, count=iter(counts).__next__, **options), lines


def test_compilations_of_the_warm_up_are_expected() -> None:
    watch, lines = guard([Counts(2, 3.5), Counts(3, 4.0), Counts(3, 4.0), Counts(3, 4.0)], limit=1)
    for _ in range(4):
        watch.look("step")
    assert lines == [
        "compiled 2 graphs in 3.5 s at step 1 (2 in all): expected: step 1 since the start",
        "compiled 1 graph in 0.5 s at step 2 (3 in all): expected: step 2 since the start",
    ]


def test_each_phase_has_its_own_warm_up() -> None:
    watch, lines = guard([Counts(i, float(i)) for i in (1, 1, 1, 1, 2)], limit=1)
    for phase in ("step", "step", "step", "step", "eval"):
        watch.look(phase)
    assert len(lines) == 2 and "eval 1" in lines[1] and watch.unexpected == 0


@pytest.mark.parametrize(("reads", "reason"), [(0, "a shape"), (2, "read on the host 2 times")])
def test_an_unexpected_compilation_ends_the_run(reads: int, reason: str) -> None:
    watch, lines = guard(
        [Counts(1), Counts(1), Counts(1), Counts(2, 0.0, reads), Counts(3, 0.0, reads)], limit=2
    )
    for _ in range(4):
        watch.look("step")
    assert reason in lines[-1]
    with pytest.raises(TrainingStopped, match="nobody expected"):
        watch.look("step")


def test_a_change_that_was_announced_is_expected() -> None:
    watch, lines = guard([Counts(1), Counts(1), Counts(1), Counts(1), Counts(2)], limit=1)
    for _ in range(4):
        watch.look("step")
    watch.expect("step", "the reducer compresses from here on")
    watch.look("step")
    assert lines[-1].endswith("step 5 (2 in all): expected: the reducer compresses from here on")
    assert watch.unexpected == 0


def test_nothing_is_unexpected_while_graphs_are_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEURON_EXTRACT_GRAPHS_ONLY", "1")
    assert GraphGuard().limit == 0


@pytest.mark.parametrize(
    ("length", "masked", "reason"),
    [(2048, True, "no mask"), (1024, False, "rows of 2048"), (4096, False, "cannot be imported")],
)
def test_why_the_flash_kernel_is_not_used(length: int, masked: bool, reason: str) -> None:
    assert reason in unusable(length, masked)


def test_precompile_starts_the_tool_with_a_short_run(tmp_path: Path) -> None:
    tool = tmp_path / "neuron_parallel_compile"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    recipe = load("hlat-7b")
    words, again = commands("hlat-7b", ["optim.lr=1e-4"], recipe, "/tmp/x", {"PATH": str(tmp_path)})
    assert words[0] == str(tool) and "hlat-7b" in words and "optim.lr=1e-4" in words
    assert "run.stop_at_step=8" in words and "--nnodes" not in words
    assert "run.stop_at_step=12" in again and len(again) == len(words)
    several = {"PATH": str(tmp_path), "NODES": "16", "NODE_RANK": "3", "MASTER_ADDR": "one"}
    short = load("tiny", ["run.steps=5", "schedule.warmup_steps=1", "reduce={name: conef}"])
    (words,) = commands("mine.yaml", [], short, "/tmp/x", several)
    assert "run.stop_at_step=5" in words and "reduce.start_step=3" in words
    assert words[words.index("--nnodes") + 1] == "16" and words[words.index("--node_rank") + 1] == "3"


def test_precompile_names_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "hlat-7b", "--precompile"]) == 2
    assert "neuron_parallel_compile is not on the PATH" in capsys.readouterr().err
    assert main(["train", "tiny", "--precompile"]) == 2
    assert "compiles nothing ahead" in capsys.readouterr().err


def test_a_folder_that_is_no_nxd_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a complete NxD checkpoint"):
        from_nxd(tmp_path, tmp_path / "run")
    assert newest_nxd(tmp_path) is None and newest_nxd(tmp_path / "absent") is None


def test_nxds_newest_complete_checkpoint_is_the_one_of_the_latest_step(tmp_path: Path) -> None:
    for step in (8, 12, 100):
        folder = tmp_path / f"step-{step:09d}"
        (folder / "optim").mkdir(parents=True)
        torch.save({"meta": json.dumps({"step": step})}, folder / "user_content.pt")
        if step != 100:
            (folder / "done").touch()
    (tmp_path / "step-000000008" / "done").touch()  # the older one was marked later
    found = newest_nxd(tmp_path)
    assert found is not None and found.step == 12
    (found.path / "user_content.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match="not a checkpoint that HLAT wrote"):
        open_nxd(found.path)


def write_nxd(folder: Path) -> list[Path]:
    """A checkpoint of one parameter of 4 elements; each of two ranks holds half. Returns their files."""
    spec = {"primary": True, "at": 0, "size": [4], "shape": [4], "offset": [0]}
    (folder / "optim").mkdir(parents=True)
    (folder / "done").touch()
    meta = json.dumps({"step": 7, "tokens": 70, "layout": "dp 2"})
    torch.save({"meta": meta}, folder / "user_content.pt")
    files = []
    for rank in (0, 1):
        bucket = {"first": 2 * rank, "master": torch.ones(2), "state": {}, "specs": {"a": spec}}
        content = {"buckets": {"0": bucket}, "frozen": {}, "owners": {}, "updates": torch.tensor(7)}
        files.append(folder / f"optim/dp_rank_0{rank}_tp_rank_00_pp_rank_00.pt")
        torch.save(content, files[-1])
    return files


@pytest.mark.parametrize("damage", ["none", "missing", "cut off", "empty"])
def test_files_of_a_rank_that_are_not_there_are_noticed(tmp_path: Path, damage: str) -> None:
    file = write_nxd(tmp_path / "source/step-000000007")[1]
    if damage == "missing":
        file.unlink()
    elif damage != "none":
        file.write_bytes(file.read_bytes()[:100] if damage == "cut off" else b"")
    source, run = tmp_path / "source/step-000000007", tmp_path / "run"
    if damage == "none":
        from_nxd(source, run)
        checkpoint = open_checkpoint(run)
        assert checkpoint.step == 7 and checkpoint.read("model/a").tolist() == [1.0] * 4
        return
    words = "2 elements of 'model/a' are missing" if damage == "missing" else f"{file.name}.*cannot be read"
    with pytest.raises(UserError) as caught:
        from_nxd(source, run)
    assert re.search(words, caught.value.line()) and len(caught.value.line().splitlines()) == 1
    assert not run.exists()


def test_the_short_run_has_a_folder_that_all_nodes_see(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    left = run.with_name("mine.precompile")
    left.mkdir(parents=True)
    (left / "file").touch()
    with scratch(str(run), {"NODE_RANK": "1"}) as folder:
        assert folder == str(left) and (left / "file").exists()  # only the first node clears it away
    with scratch(str(run), {}) as folder:
        assert folder == str(left) and not left.exists()
        left.mkdir()
    assert not left.exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["checkpoint.format=nxd"], "backend native cannot write NxD's files"),
        (
            ["backend=nxd", "checkpoint.format=nxd", "checkpoint.permanent_every_tokens=5"],
            "permanent_every_tokens has no effect",
        ),
    ],
)
def test_formats_that_cannot_be(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load("tiny", words)


def test_without_nxd_the_way_to_train_elsewhere_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "missing", lambda: "torch_xla cannot be imported")
    with pytest.raises(UserError, match="torch_xla cannot be imported; write backend=native for GPUs"):
        start.process_group()
