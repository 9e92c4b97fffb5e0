"""A machine without torch: what works there, and that the rest says so in one line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BLOCK = """import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

sys.meta_path.insert(0, Blocked())
"""


@pytest.fixture
def without_torch(tmp_path: Path):
    """Runs `hlat` in a process that cannot import torch."""
    (tmp_path / "sitecustomize.py").write_text(BLOCK)
    environ = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hlat", *words]
        return subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True)

    return run


def test_the_doctor_examines_the_rest(without_torch) -> None:
    done = without_torch("doctor", "hlat-7b", "--for", "trn1")
    assert done.returncode == 1 and "Traceback" not in done.stderr + done.stdout
    assert "fail  recipe " in done.stdout and "hlat-7b cannot be read without torch" in done.stdout
    assert "package.torch " in done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["recipes", "check", "tiny"],
        ["launch", "torchrun", "hlat-7b", "--nodes", "1", "--dry-run"],
        ["doctor", "--profile", "hlat-7b"],
        ["train", "tiny"],
    ],
    ids=lambda words: words[0],
)
def test_what_needs_a_recipe_needs_torch_and_says_so(without_torch, words: list[str]) -> None:
    done = without_torch(*words)
    line = "hlat: error: the package 'torch' is not installed here; run: hlat doctor --fix-plan\n"
    assert (done.returncode, done.stderr, done.stdout) == (2, line, "")


def test_recipes_are_listed(without_torch) -> None:
    assert "tiny" in without_torch("recipes", "list").stdout
