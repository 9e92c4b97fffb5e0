"""Tasks inside a run: they change nothing in training, and their figures reach every sink."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hlat.cli import main

pytest.importorskip("lm_eval")

RECIPE = """
run: {name: small, steps: 4, seed: 3}
model: {layers: 2, hidden: 32, heads: 4, kv_heads: 2, ffn: 64, vocab: 320, max_seq_len: 64}
data: {sources: [{path: text}], tokenizer: bytes, seq_len: 32, micro_batch: 2, global_batch: 8, holdout: 0.2}
optim: {name: adamw, lr: 3e-3}
schedule: {name: clamped_cosine, warmup_steps: 2}
checkpoint: {every: 2, keep: 5}
eval: {every: 2, rows: 4}
log: {every: 1}
"""
TASKS = ("eval.tasks=[hlat-bits-comment, hlat-function]", "eval.limit=3")
MEASURED = ("tokens_per_second", "mfu", "step_seconds", "memory/peak_bytes", "by")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "text").mkdir()
    words = np.random.default_rng(0).choice(["alpha", "beta", "gamma", "delta"], size=(40, 60))
    for number, row in enumerate(words):
        (tmp_path / "text" / f"{number:02}.txt").write_text(" ".join(row) + f" {number}\n")
    (tmp_path / "small.yaml").write_text(RECIPE)
    return tmp_path


def rows(folder: Path, *kinds: str) -> list[dict]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in found if row["kind"] in kinds]


def test_training_is_the_same_with_and_without(place: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "small.yaml", "run.dir=without"]) == 0
    options = ["run.dir=with", "log.tensorboard=true"]
    assert main(["train", "small.yaml", *options, *TASKS]) == 0
    kinds = ("train", "eval")
    assert rows(place / "with", *kinds) == rows(place / "without", *kinds)
    figures = rows(place / "with", "tasks")
    assert [row["step"] for row in figures] == [2, 4]
    assert figures[0]["tokens"] == 2 * 8 * 32
    names = {"hlat-bits-comment/bits_per_byte", "hlat-bits-comment/bits_per_byte_stderr"}
    names |= {"hlat-function/acc", "hlat-function/acc_stderr"}
    assert {name for name in figures[0] if "/" in name} == names
    assert (
        2 < figures[1]["hlat-bits-comment/bits_per_byte"] < figures[0]["hlat-bits-comment/bits_per_byte"] < 16
    )
    assert rows(place / "without", "tasks") == []
    assert "tasks at step 4" in "".join(capsys.readouterr())
    assert main(["report", "with", "without", "--out", "report.html"]) == 0
    assert "Task hlat-function: acc" in (place / "report.html").read_text()
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(place / "with" / "logs" / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("tasks/hlat-function/acc")] == [2, 4]


def test_the_figures_are_those_of_the_checkpoint(place: Path) -> None:
    tasks = "eval.tasks=[hlat-bits-comment, hlat-function]"
    assert main(["train", "small.yaml", "run.dir=run", "precision.compute=fp32", tasks, "eval.limit=3"]) == 0
    names = ["--tasks", "hlat-bits-comment,hlat-function", "--limit", "3"]
    assert main(["eval", "run", *names, "--all-checkpoints", "--html", "c.html", "--json", "all.json"]) == 0
    found = json.loads(Path("all.json").read_text())
    live = rows(place / "run", "tasks")
    assert [(row["step"], row["tokens"]) for row in found] == [(r["step"], r["tokens"]) for r in live]
    for stored, row in zip(found, live, strict=True):
        for key in ("hlat-bits-comment/bits_per_byte", "hlat-function/acc"):
            task, metric = key.split("/")
            assert stored["results"][task][f"{metric},none"] == pytest.approx(row[key], abs=1e-6)
    assert "hlat-function: acc" in Path("c.html").read_text()


def test_a_run_that_is_not_done_is_evaluated_from_its_last_checkpoint(
    place: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["train", "small.yaml", "run.dir=run", "run.stop_at_step=3"]) == 0
    (place / "run" / "checkpoints" / ".step-00000004.partial-1-host").mkdir()
    assert main(["eval", "run", "--tasks", "hlat-function", "--limit", "3"]) == 0
    assert "run step-00000003, 768 tokens" in capsys.readouterr().out


def test_an_unknown_task_is_refused_before_training(place: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["train", "small.yaml", "run.dir=run", "eval.tasks=[hlat-functoin]"]) == 2
    assert (
        "eval.tasks: unknown task 'hlat-functoin'; did you mean 'hlat-function'?" in capsys.readouterr().err
    )
    assert not list(Path("run").glob("checkpoints/step-*"))


def write_task(folder: Path, **config: object) -> str:
    """A task of three questions, some longer than the model's context; returns its file."""
    rows = [{"context": "x" * n, "choices": ["a", "b"], "answer": 0} for n in (3, 80, 90)]
    (folder / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"task": "mine", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice"}
    fields = {"doc_to_text": "context", "doc_to_choice": "choices", "doc_to_target": "answer"}
    files = {"data_files": {"test": str(folder / "mine.jsonl")}}
    (folder / "mine.yaml").write_text(json.dumps({**task, **fields, "dataset_kwargs": files, **config}))
    return str(folder / "mine.yaml")


def test_weights_that_are_not_finite_do_not_end_the_run(place: Path, capsys: pytest.CaptureFixture) -> None:
    options = [f"eval.tasks=[{write_task(place)}]", "guard.name=none", "run.steps=2"]
    assert main(["train", "small.yaml", "run.dir=bad", "model.init_std=1e30", *options]) == 0
    (row,) = rows(place / "bad", "tasks")
    assert row["mine/acc"] is None and row["mine/acc_stderr"] is None and row["truncated"] == 4
    reason = "mine: no figure: the model's logits are not finite for 3 of 3 questions"
    assert row["notes"][-1] == reason and reason in capsys.readouterr().out
    assert main(["report", "bad", "--out", "report.html"]) == 0
    assert "requests that lost tokens on the left: bad 4" in (place / "report.html").read_text()


def test_a_generation_that_is_not_supported_is_refused_before_training(
    place: Path, capsys: pytest.CaptureFixture
) -> None:
    options = {"output_type": "generate_until", "generation_kwargs": {"num_beams": 2}, "doc_to_choice": None}
    file = write_task(place, metric_list=[{"metric": "exact_match"}], **options)
    assert main(["train", "small.yaml", "run.dir=run", f"eval.tasks=[{file}]"]) == 2
    assert "generation option 'num_beams' is not supported" in capsys.readouterr().err
    assert not list(Path("run").glob("checkpoints/step-*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        "parallel.tp=2 parallel.sequence=true",
        "parallel.pp=2",
        "parallel.pp=2 parallel.schedule=interleaved parallel.stages=2",
        "parallel.dp=2",
    ],
)
def test_in_every_layout(place: Path, layout: str) -> None:
    common = ["small.yaml", "precision.compute=fp32", *TASKS, "model.layers=4"]
    assert main(["train", *common, "run.dir=one"]) == 0
    runs = {"with": [*common, *layout.split()], "without": [*common[:2], common[-1], *layout.split()]}
    for name, arguments in runs.items():
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        common_env = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "hlat", "train", *arguments, f"run.dir={name}"]
        ranks = [
            subprocess.Popen(command, env={**common_env, "OMP_NUM_THREADS": "1", "RANK": str(rank)})
            for rank in range(2)
        ]
        assert [rank.wait(300) for rank in ranks] == [0, 0]
    assert rows(place / "with", "train", "eval") == rows(place / "without", "train", "eval")
    for ours, alone in zip(rows(place / "with", "tasks"), rows(place / "one", "tasks"), strict=True):
        for key in ("hlat-bits-comment/bits_per_byte", "hlat-function/acc"):
            assert ours[key] == pytest.approx(alone[key], rel=1e-4)
