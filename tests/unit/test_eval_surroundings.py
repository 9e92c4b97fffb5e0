"""What the harness writes down of its surroundings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from hlat.evaluate.surroundings import own_environment


def test_the_harness_asks_no_program_of_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It would start git, and pip as a module: here a file of that name."""
    evaluator = pytest.importorskip("lm_eval.evaluator")
    (tmp_path / "pip.py").write_text("open('PWNED', 'w')\n")
    monkeypatch.chdir(tmp_path)
    results: dict[str, Any] = {}
    former = evaluator.add_env_info
    with own_environment():
        evaluator.add_env_info(results)
        assert evaluator.get_git_commit_hash() is None
    assert evaluator.add_env_info is former
    assert "torch: " in results["pretty_env_info"] and results["lm_eval_version"]
    assert not Path("PWNED").exists() and capfd.readouterr().err == "", "no word of git's"
