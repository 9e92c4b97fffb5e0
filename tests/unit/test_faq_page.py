"""What docs/faq.md says."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from hlat.errors import UserError
from hlat.recipe import load

ROOT = Path(__file__).parents[2]


def test_make_clean_removes_the_environment_and_never_a_run(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    kept = ["runs/tiny/checkpoints/step-00000001/complete.json", "runs/tiny/metrics.jsonl", "mine/a.yaml"]
    gone = [".venv/bin/python", ".pytest_cache/x", "hlat/__pycache__/a.pyc"]
    for name in (*kept, *gone):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    done = subprocess.run(["make", "clean"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {*kept, "Makefile"}


def test_an_option_of_another_plug_in_is_refused_with_those_that_are_valid() -> None:
    assert load("tiny", ["optim.name=adamw", "optim.betas=[0.9, 0.95]"]).optim.name == "adamw"
    with pytest.raises(UserError) as caught:
        load("tiny", ["optim={name: sgd, lr: 0.1, betas: [0.9, 0.95]}"])
    line = caught.value.line()
    assert "optim.betas" in line and "momentum" in line, line
