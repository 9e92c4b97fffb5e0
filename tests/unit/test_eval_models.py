"""The harness's other models beside HLAT's, in its command and in programs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hlat.cli import main

pytest.importorskip("lm_eval")

LOOK = """
from hlat.evaluate.harness import lm_class
lm_class()
from lm_eval.api.registry import get_model, model_registry
for name in ("hlat", "dummy", "hf", "vllm", "nope"):
    try:
        print(name, get_model(name).__name__)
    except (ImportError, ValueError) as error:
        print(name, error)
"""
COMMAND = "from hlat.evaluate.harness import main; main()"


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A program in a process of its own, for the harness's registry is one for the whole process."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_the_models_of_the_harness_stay_known_to_a_program(tmp_path: Path) -> None:
    done = run(LOOK)
    found = dict(line.split(" ", 1) for line in done.stdout.splitlines())
    assert found.pop("vllm") in ("No module named 'vllm'", "VLLM"), "what is missing is named, not the model"
    assert "no model for this name found" in found.pop("nope")
    assert found == {"hlat": "HlatLM", "dummy": "DummyLM", "hf": "HFLM"}, done.stderr


@pytest.mark.slow
def test_the_command_of_the_harness_runs_its_other_models(tmp_path: Path, monkeypatch, load_module) -> None:
    """Also outside a repository, of which git would say so."""
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    monkeypatch.chdir(tmp_path)
    shared = load_module(Path(__file__).with_name("test_eval_command.py"))
    shared.write_checkpoint(tmp_path / "model")
    assert main(["convert", "to-hf", "model", "model-hf", "--dtype", "fp32"]) == 0
    shared.write_task(tmp_path / "tasks", shared.QUESTIONS)
    assert main(["eval", "model", "--tasks", "mine", "--include-path", "tasks", "--json", "hlat.json"]) == 0
    model = ["--model", "hf", "--model_args", "pretrained=model-hf", "--device", "cpu"]
    done = run(COMMAND, *model, "--include_path", "tasks", "--tasks", "mine", "--output_path", "hf.json")
    assert done.returncode == 0, done.stderr
    assert "git" not in done.stderr
    (written,) = tmp_path.glob("hf*.json")
    figures = [json.loads(path.read_text())["results"]["mine"] for path in (Path("hlat.json"), written)]
    assert figures[0]["acc,none"] == figures[1]["acc,none"]


def test_an_evaluation_that_is_interrupted_writes_nothing(
    load_module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from hlat.evaluate import job

    monkeypatch.chdir(tmp_path)
    shared = load_module(Path(__file__).with_name("test_eval_command.py"))
    shared.write_checkpoint(tmp_path / "model")
    shared.write_task(tmp_path / "tasks", shared.QUESTIONS)
    Path("old.json").write_text("before")
    real = job.run_tasks

    def interrupted(*arguments: Any) -> Any:
        real(*arguments)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(job, "run_tasks", interrupted)
    before = sorted(tmp_path.iterdir())
    for out in ("new.json", "old.json"):
        asked = ["--tasks", "mine", "--include-path", "tasks", "--json", out]
        assert main(["eval", "model", *asked]) == 130
        assert capsys.readouterr().err.splitlines()[-1] == "hlat: interrupted"
    assert sorted(tmp_path.iterdir()) == before and Path("old.json").read_text() == "before"
