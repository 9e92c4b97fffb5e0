"""What docs/run-folder.md and docs/operations/storage.md say of a run's folder, on real small runs."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from hlat.observe.jsonl import read_rows
from tests.unit import test_train_command as small

place, train = small.place, small.train  # `place` is a fixture
PAGE = Path(__file__).parents[2] / "docs/run-folder.md"


def files_of(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_files_are_those_of_the_page(place: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    block = re.search(r"```\nruns/tiny/\n(.*?)```", text, re.DOTALL)
    assert block is not None
    named = set(re.findall(r"^  ([\w.-]+)", block[1], re.MULTILINE))
    assert train("run.stop_at_step=2") == 0
    assert train("log.every=1") == 0
    found = {path.name for path in Path("runs/small").iterdir()}
    assert found <= named
    # of another format, of hlat launch, and while it trains
    elsewhere = {"nxd-checkpoints", "launch", ".lock"}
    assert named - found == elsewhere
    assert {path.name for path in Path("runs/small/logs").iterdir()} == {"resolved-until-start-1.yaml"}


def test_the_rows_have_the_fields_of_the_page(place: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")
    table = text[text.index("| field | meaning |") :].split("\n\n")[0]
    named = set(re.findall(r"^\| `([^`]+)` \|", table, re.MULTILINE))
    assert train() == 0
    found: dict[str, set[str]] = {}
    for row in read_rows(Path("runs/small/metrics.jsonl")):
        found.setdefault(row["kind"], set()).update(set(row) - {"kind", "by"})
    assert found.pop("train") == named
    assert found.pop("eval") >= {"step", "loss", "bits_per_byte"}
    assert found.pop("start") == {"step", "turn"}
    assert not found


def test_a_run_goes_on_wherever_it_and_its_text_are(
    place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on another machine: copied under another path, text under another name, nothing in the cache."""
    words = ("data.tokenizer=train:bpe-300",)
    assert train(*words, "run.dir=whole") == 0
    assert train(*words, "run.dir=part", "run.stop_at_step=3") == 0
    other = tmp_path / "other machine"
    other.mkdir()
    shutil.copytree("part", other / "copied")
    shutil.copytree("text", other / "renamed")
    shutil.copy("small.yaml", other / "small.yaml")
    shutil.copytree("whole", other / "whole")
    shutil.rmtree("cache")
    shutil.rmtree("text")
    monkeypatch.chdir(other)
    monkeypatch.setenv("XDG_CACHE_HOME", str(other / "cache"))
    assert train(*words, "run.dir=copied", "data.sources=[{path: renamed}]") == 0
    assert small.same_state("whole", "copied")
    assert [small.numbers(r) for r in small.rows("whole")] == [small.numbers(r) for r in small.rows("copied")]


@pytest.mark.slow
def test_to_go_back_the_later_step_folders_are_deleted(place: Path) -> None:
    assert train("run.dir=whole") == 0
    assert train("run.dir=back") == 0
    for step in (4, 6):
        shutil.rmtree(f"back/checkpoints/step-{step:08d}")
    assert train("run.dir=back", "run.stop_at_step=2") == 0
    assert [row["step"] for row in small.rows("back")] == [1, 2]
    assert train("run.dir=back") == 0
    assert small.same_state("whole", "back")
    assert [small.numbers(r) for r in small.rows("whole")] == [small.numbers(r) for r in small.rows("back")]


def test_resume_never_refuses_a_folder_with_checkpoints(place: Path, capsys) -> None:
    assert train("run.stop_at_step=2") == 0
    before = files_of(place / "runs/small")
    capsys.readouterr()
    assert train("run.resume=never") == 2
    error = capsys.readouterr().err
    assert error.count("hlat: error:") == 1 and "run.resume" in error
    assert files_of(place / "runs/small") == before


@pytest.mark.parametrize("begun", [True, False])
def test_a_start_on_a_full_disk_ends_with_74_and_changes_nothing(place: Path, capsys, begun: bool) -> None:
    disk = place / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small filesystem")
    try:
        if begun:
            assert train("run.dir=disk/run", "run.stop_at_step=2") == 0
        with contextlib.suppress(OSError), (disk / "others").open("wb", buffering=0) as file:
            while file.write(bytes(1 << 12)):
                pass
        before = files_of(disk)
        capsys.readouterr()
        assert train("run.dir=disk/run") == 74
        error = capsys.readouterr().err
        assert error.count("hlat: error:") == 1 and "No space left" in error and "Traceback" not in error
        assert files_of(disk) == before and {path.name for path in disk.iterdir()} <= {"run", "others"}
        assert (disk / "run").exists() == begun
        (disk / "others").unlink()
        assert train("run.dir=disk/run") == 0
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_rows_that_wait_beyond_their_limit_end_the_run_with_74(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """256 MB of them; a row here."""
    from hlat.observe import jsonl
    from hlat.train import loop

    assert jsonl.MOST_WAITING == 256 << 20
    assert train("run.dir=whole") == 0
    step, write = loop.train_step, os.write

    def full_from_three_on(run):
        monkeypatch.setattr(os, "write", small.no_room if run.step >= 2 else write)
        return step(run)

    with monkeypatch.context() as patch:
        patch.setattr(jsonl, "MOST_WAITING", 20)
        patch.setattr(loop, "train_step", full_from_three_on)
        with pytest.warns(UserWarning, match="rows wait in memory"):
            assert train("log.every=1") == 74
    monkeypatch.setattr(os, "write", write)
    error = capsys.readouterr().err
    assert error.count("hlat: error:") == 1 and "No space left" in error and "Traceback" not in error
    assert [row["step"] for row in small.rows("runs/small")] == [1, 2]
    assert train("log.every=1") == 0, "room was made"
    assert small.same_state("whole", "runs/small")
    assert [row["step"] for row in small.rows("runs/small")] == [1, 2, 3, 4, 5, 6]
