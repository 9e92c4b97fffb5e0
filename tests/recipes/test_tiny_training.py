"""Every tiny recipe trains two steps, as it is shipped but for its length."""

from pathlib import Path

import pytest

from hlat.cli import main
from hlat.recipe_io import shipped_recipes

TINY = sorted(name for name in shipped_recipes() if name.rpartition("/")[2].startswith("tiny"))


def test_there_is_a_tiny_recipe() -> None:
    assert "tiny" in TINY


@pytest.mark.parametrize("name", TINY)
def test_two_steps(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    shorter = ["run.steps=2", "schedule.warmup_steps=1", "eval.batches=1", f"run.dir={folder}"]
    assert main(["train", name, *shorter]) == 0
    assert (folder / "metrics.jsonl").read_text().count('"kind":"train"') == 2
    assert "bits per byte" in capsys.readouterr().out
