"""`hlat train` with `backend: nxd`, from the recipe to the last checkpoint, and a second time to continue."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hlat.checkpoint.store import open_checkpoint
from hlat.cli import main

pytestmark = pytest.mark.nxd

PROGRAM = Path(__file__).with_name("nxd_cli.py")
MODES = pytest.mark.parametrize("mode", ["cpu-mode", "xla-mode"])


@pytest.fixture
def train(tmp_path: Path, trn_recipe: Path, nxd_start: Callable[..., list[int]]) -> Callable[..., str]:
    """A function that runs `hlat train` on some ranks, checks its exit status and gives their output."""

    def run(mode: str, *words: str, ranks: int = 2, status: int = 0) -> str:
        logs = Path(tempfile.mkdtemp(dir=tmp_path))
        codes = nxd_start(mode, ranks, [str(PROGRAM), "train", str(trn_recipe), *words], logs, 240)
        output = "\n".join((logs / f"rank-{rank}.log").read_text()[-4000:] for rank in range(ranks))
        assert codes == [status] * ranks, output
        return output

    return run


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row for row in lines if row["kind"] == kind]


@MODES
def test_train_and_continue(mode: str, tmp_path: Path, train: Callable[..., str]) -> None:
    for stop in (6, 8):
        train(mode, f"run.stop_at_step={stop}")
    steps = rows(tmp_path / "run", "train")
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [row["step"] for row in rows(tmp_path / "run", "eval")] == [4, 8]
    assert sorted(f.name for f in (tmp_path / "run" / "checkpoints").iterdir())


@MODES
@pytest.mark.parametrize("background", ["true", "false"], ids=["async", "sync"])
def test_train_with_nxds_files(
    mode: str, background: str, tmp_path: Path, train: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        "checkpoint.format=nxd",
        "checkpoint.every=2",
        "checkpoint.keep=1",
        f"checkpoint.async={background}",
    ]
    run, tags = tmp_path / "run", tmp_path / "run" / "nxd-checkpoints"
    train(mode, *files, "run.stop_at_step=5")
    assert [path.parent.name for path in tags.glob("*/done")] == ["step-000000004"]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000005"]
    before = rows(run, "train")

    shutil.rmtree(run / "checkpoints" / "step-00000005")  # as if the run had been killed at step 5
    assert main(["generate", str(run), "--prompt", "x"]) == 2
    assert "hlat convert from-nxd" in capsys.readouterr().err
    output = train(mode, *files, "parallel={dp: 1}", ranks=1, status=2)
    assert "was saved as dp 2" in output and "hlat convert from-nxd" in output
    assert main(["convert", "from-nxd", str(run), str(tmp_path / "other")]) == 0
    other = open_checkpoint(tmp_path / "other")
    assert other.step == 4 and other.names()

    output = train(mode, *files)
    assert "step 4 of" in output and "step-000000004" in output
    steps = rows(run, "train")
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert steps[4]["loss"] == before[4]["loss"], "step 5 again, bitwise"
    assert [path.parent.name for path in tags.glob("*/done")] == ["step-000000006"]
    assert open_checkpoint(run).step == 8
