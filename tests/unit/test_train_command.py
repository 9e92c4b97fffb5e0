"""`hlat train` from recipe to run folder: resume, retention, signals, and every kind of wrong input."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from hlat.checkpoint.reader import open_checkpoint
from hlat.cli import main

RECIPE = """
run: {name: small, steps: 6, seed: 3}
model: {layers: 2, hidden: 32, heads: 4, kv_heads: 2, ffn: 64, vocab: 320, max_seq_len: 32}
data:
  sources: [{path: text}]
  tokenizer: bytes
  seq_len: 32
  micro_batch: 4
  global_batch: 8
  holdout: 0.2
optim: {name: adamw, lr: 3e-3}
schedule: {name: clamped_cosine, warmup_steps: 2}
checkpoint: {every: 2, keep: 5}
eval: {every: 3, rows: 8}
log: {every: 2}
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a recipe and forty short documents, and a cache of its own."""
    return make_place(tmp_path, monkeypatch)


def make_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`place`, for fixtures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "text"
    folder.mkdir()
    words = np.random.default_rng(0).choice(["alpha", "beta", "gamma", "delta"], size=(40, 60))
    for number, row in enumerate(words):
        (folder / f"{number:02}.txt").write_text(" ".join(row) + f" {number}\n")
    (tmp_path / "small.yaml").write_text(RECIPE)
    return tmp_path


def train(*overrides: str) -> int:
    return main(["train", "small.yaml", *overrides])


def rows(folder: str, kind: str = "train") -> list[dict]:
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    found = [row for row in map(json.loads, lines) if row["kind"] == kind]
    return [{k: v for k, v in row.items() if k != "by"} for row in found]


def numbers(row: dict) -> dict:
    """The row without what depends on the clock and on the process's memory."""
    measured = ("tokens_per_second", "mfu", "step_seconds", "memory/peak_bytes")
    return {k: v for k, v in row.items() if k not in measured}


def same_state(a: str, b: str) -> bool:
    one, two = open_checkpoint(a), open_checkpoint(b)
    assert one.step == two.step and one.names() == two.names()
    return all(torch.equal(one.read(name), two.read(name)) for name in one.names())


@pytest.mark.parametrize(
    "precision",
    [
        "precision={compute: fp32}",
        "precision={compute: bf16}",
        "precision={compute: bf16, master: none, states: bf16, accumulate: bf16, rounding: stochastic}",
    ],
)
def test_six_steps_equal_three_and_three_bitwise(place: Path, precision: str) -> None:
    assert train(precision, "run.dir=whole") == 0
    assert train(precision, "run.dir=parts", "run.stop_at_step=3") == 0
    assert open_checkpoint("parts").step == 3
    moved = place / "elsewhere" / "moved"
    moved.parent.mkdir()
    shutil.move("parts", moved)
    assert train(precision, f"run.dir={moved}", "log.every=1", "checkpoint.every=4") == 0
    assert [numbers(row) for row in rows("whole")] == [numbers(row) for row in rows(str(moved))]
    assert rows("whole", "eval") == rows(str(moved), "eval")
    assert same_state("whole", str(moved))
    names = open_checkpoint("whole").names()
    assert {"model/embed.weight", "optim/exp_avg/embed.weight", "optim/step", "run/updates"} <= set(names)


def test_the_run_folder_is_complete(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train() == 0
    folder = Path("runs/small")
    assert (folder / "recipe.yaml").read_text() == RECIPE
    steps = [int(p.name.split("-")[1]) for p in sorted((folder / "checkpoints").iterdir())]
    assert steps == [2, 4, 6]
    found = rows("runs/small")
    assert [row["step"] for row in found] == [1, 2, 3, 4, 5, 6]
    assert [row["tokens"] for row in found] == [256 * n for n in range(1, 7)]
    assert found[0]["lr"] == 0.0 and found[2]["lr"] == pytest.approx(3e-3)
    assert found[-1]["loss"] < found[0]["loss"]
    assert [row["step"] for row in rows("runs/small", "eval")] == [3, 6]
    resolved = (folder / "resolved.yaml").read_text()
    (place / "again.yaml").write_text(resolved)
    assert main(["train", "again.yaml"]) == 0, "the resolved recipe continues the same, finished run"
    assert [numbers(row) for row in rows("runs/small")] == [numbers(row) for row in found]
    out = capsys.readouterr().out
    assert "bits per byte" in out and "gzip -9" in out and "sample" in out and str(folder.absolute()) in out


def test_a_finished_run_continues_with_more_steps_when_the_horizon_stays(place: Path) -> None:
    assert train("schedule.horizon_steps=9") == 0
    assert train("schedule.horizon_steps=9", "run.steps=9") == 0
    assert [row["step"] for row in rows("runs/small")] == list(range(1, 10))


def test_a_changed_recipe_or_text_is_refused_and_nothing_is_touched(place: Path, capsys) -> None:
    assert train("run.stop_at_step=4") == 0
    before = {p: p.read_bytes() for p in Path("runs").rglob("*") if p.is_file()}
    for override, word in (
        ("run.seed=4", "run.seed was 3 in the saved run and is 4 now"),
        ("model.ffn=96", "model.ffn"),
        ("optim.lr=1e-3", "optim.lr"),
        ("run.steps=12", "schedule.horizon_steps"),
    ):
        assert train(override) == 2
        assert word in capsys.readouterr().err
    (place / "text" / "00.txt").write_text("other text\n")
    assert train() == 2
    assert "the data is not what the saved run was trained on" in capsys.readouterr().err
    assert train("run.resume=never") == 2
    assert {p: p.read_bytes() for p in Path("runs").rglob("*") if p.is_file()} == before


def test_a_tokenizer_under_another_name_travels_with_the_checkpoint(place: Path, capsys) -> None:
    assert main(["data", "train-tokenizer", "text", "--vocab", "300", "--out", "made"]) == 0
    shutil.move("made/tokenizer.json", "mine.json")
    assert train("data.tokenizer=mine.json", "run.stop_at_step=2") == 0
    Path("mine.json").unlink()
    assert main(["generate", "runs/small", "--prompt", "alpha", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.rstrip().splitlines()[-1].startswith("alpha")


def test_the_guard_stops_a_run_whose_windows_end_early(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint at every step ends each window of metrics before it is full."""
    from hlat.objective.causal_lm import CausalLM

    loss = CausalLM.loss
    monkeypatch.setattr(CausalLM, "loss", lambda self, *a: loss(self, *a) * float("nan"))
    assert train("guard.patience=2", "log.every=5", "checkpoint.every=1") == 3


def test_evaluation_changes_nothing_in_training(place: Path) -> None:
    assert train("run.dir=with", "eval.every=1") == 0
    assert train("run.dir=without", "eval.every=0") == 0
    assert [numbers(row) for row in rows("with")] == [numbers(row) for row in rows("without")]
    assert [row["step"] for row in rows("without", "eval")] == [6]
    assert [row["step"] for row in rows("with", "eval")] == [1, 2, 3, 4, 5, 6]
    assert same_state("with", "without")


def test_micro_batch_may_change_on_resume(place: Path) -> None:
    assert train("run.stop_at_step=3", "run.dir=a", "precision.compute=fp32") == 0
    assert train("run.dir=a", "data.micro_batch=2", "precision.compute=fp32") == 0
    assert train("run.dir=b", "precision.compute=fp32") == 0
    for x, y in zip(rows("a"), rows("b"), strict=True):
        assert x["loss"] == pytest.approx(y["loss"], abs=2e-6)
    held_out = zip(rows("a", "eval"), rows("b", "eval"), strict=True)  # the same rows, before and after
    for x, y in held_out:
        assert x["held_out_tokens"] == y["held_out_tokens"] and x["step"] == y["step"]
        assert x["loss"] == pytest.approx(y["loss"], abs=2e-6)


def test_a_damaged_newest_checkpoint_is_reported_and_the_one_before_used(place: Path, capsys) -> None:
    assert train("run.stop_at_step=4", "run.dir=whole") == 0
    assert train("run.stop_at_step=4", "run.dir=hurt") == 0
    newest = Path("hurt/checkpoints/step-00000004")
    victim = max((p for p in newest.iterdir() if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    for folder in ("whole", "hurt"):
        assert train(f"run.dir={folder}") == 0
    assert "skipped checkpoint" in capsys.readouterr().out
    assert [numbers(row) for row in rows("whole")] == [numbers(row) for row in rows("hurt")]
    assert same_state("whole", "hurt")


def test_sigterm_saves_and_the_same_command_continues(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hlat.train import loop

    assert train("run.dir=whole") == 0
    step = loop.train_step

    def interrupted(run):
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(run)

    monkeypatch.setattr(loop, "train_step", interrupted)
    assert train("run.dir=stopped", "checkpoint.every=100") == 128 + signal.SIGTERM
    monkeypatch.setattr(loop, "train_step", step)
    assert open_checkpoint("stopped").step == 3
    assert train("run.dir=stopped") == 0
    assert same_state("whole", "stopped")


def test_too_many_skips_stop_the_run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from hlat.objective.causal_lm import CausalLM

    loss = CausalLM.loss
    monkeypatch.setattr(CausalLM, "loss", lambda self, *a: loss(self, *a) * float("nan"))
    assert train("guard.patience=2", "log.every=1", "eval.every=0") == 3
    assert "2 steps in a row were skipped" in capsys.readouterr().err
    assert rows("runs/small")[0]["loss"] is None and rows("runs/small")[0]["skipped"] is True


WRONG = {
    "unknown key": (["optim.learning_rate=1"], "optim.learning_rate"),
    "wrong type": (["run.steps=many"], "run.steps"),
    "indivisible batch": (["data.global_batch=6"], "data.global_batch"),
    "missing source": (["data.sources=[{path: nowhere}]"], "nowhere"),
    "empty source": (["data.sources=[{path: empty}]"], "empty"),
    "tokenizer too large": (["model.vocab=100"], "model.vocab"),
    "unwritable run folder": (["run.dir=small.yaml/run"], "small.yaml"),
    "unknown optimizer": (["optim.name=adamv"], "adamw"),
    "run folder nobody can make": (["run.dir=/proc/hlat"], "/proc"),
    "backend": (["backend=nxd"], "backend"),
    "pattern": (["train_only=[nothing.*]"], "train_only[0]"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_input_is_one_line_and_leaves_nothing(place: Path, capsys, kind: str) -> None:
    (place / "empty").mkdir()
    overrides, word = WRONG[kind]
    assert train(*overrides) == 2
    captured = capsys.readouterr().err
    errors = [line for line in captured.splitlines() if line.startswith("hlat: error:")]
    assert len(errors) == 1 and word in errors[0], captured
    assert "Traceback" not in captured
    assert not Path("runs").exists()


def test_keys_that_do_nothing_are_noted_once(place: Path, capsys) -> None:
    assert (
        train(
            "schedule={name: constant, floor: 0.2}", "data.sources=[{path: text, weight: 2}]", "run.steps=2"
        )
        == 0
    )
    notes = [line.partition("note: ")[2] for line in capsys.readouterr().out.splitlines() if "note: " in line]
    assert [note.partition(": ")[0] for note in notes] == ["data.sources[0].weight", "schedule.floor"]


@pytest.mark.parametrize(
    ("variable", "value", "name"), [("CXX", "nonexistent", "nonexistent"), ("PATH", "/nowhere", "g++")]
)
def test_compile_true_without_a_compiler_is_one_line(
    place: Path, capsys, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, name: str
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(variable, value)
    assert train("compile=true") == 2
    captured = capsys.readouterr().err
    assert captured.startswith(
        f"hlat: error: compile: torch.compile does not work here: no C++ compiler ({name})"
    )
    assert "compile=false" in captured and captured.count("\n") == 1
    assert not Path("runs").exists()
    assert train("compile=auto", "run.steps=2") == train("compile=false", "run.steps=2") == 0


def test_a_checkpoint_of_another_model_is_refused(place: Path, capsys) -> None:
    assert train("run.dir=a", "run.stop_at_step=2") == 0
    assert train("run.dir=b", "model.hidden=48", "run.stop_at_step=2") == 0
    shutil.rmtree("a/checkpoints/step-00000002")
    shutil.copytree("b/checkpoints/step-00000002", "a/checkpoints/step-00000002")
    assert train("run.dir=a") == 2
    assert "model.hidden was 48" in capsys.readouterr().err


def no_room(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("in_background", ["true", "false"])
def test_a_full_disk_at_the_end_is_told_in_one_line_and_keeps_the_last_checkpoint(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys, in_background: str
) -> None:
    from hlat.checkpoint import layout

    assert train("run.stop_at_step=2") == 0
    good = {p: p.read_bytes() for p in Path("runs/small/checkpoints").rglob("*") if p.is_file()}
    monkeypatch.setattr(layout, "write_tensors", no_room)
    assert train(f"checkpoint.async={in_background}", "checkpoint.patience=1.5") == 74
    out, error = capsys.readouterr()
    assert "the disk is full" in error and "step 2 is untouched" in error, error
    assert error.count("hlat: error:") == 1 and "Traceback" not in error
    assert out.count("warning: ") == 1, "one line, however often it was tried"
    left = {p: p.read_bytes() for p in Path("runs/small/checkpoints").rglob("*") if p.is_file()}
    assert left == good
    failed = [row for row in rows("runs/small", "storage") if row["error"]]
    assert [row["step"] for row in failed][:3] == [4, 6, 6] and {row["what"] for row in failed} == {"save"}


@pytest.mark.parametrize("in_background", ["true", "false"])
def test_a_disk_that_is_full_for_a_while_costs_nothing_but_the_checkpoints_of_that_while(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys, in_background: str
) -> None:
    """From step 15 to 20 neither checkpoints nor rows can be written: 15 fails, 25 tries again."""
    from hlat.checkpoint import layout
    from hlat.train import loop

    options = ["run.steps=32", "checkpoint.every=15", f"checkpoint.async={in_background}", "log.every=1"]
    assert train("run.dir=whole", *options) == 0
    step, write, write_tensors = loop.train_step, os.write, layout.write_tensors

    def with_weather(run):
        full = 14 <= run.step < 20
        monkeypatch.setattr(layout, "write_tensors", no_room if full else write_tensors)
        monkeypatch.setattr(os, "write", no_room if full else write)
        return step(run)

    monkeypatch.setattr(loop, "train_step", with_weather)
    capsys.readouterr()
    with pytest.warns(UserWarning, match="rows wait in memory"):
        assert train("run.dir=hurt", *options) == 0
    out = capsys.readouterr().out
    assert out.count("warning: ") == 2 and "the trouble is over" in out, out
    assert [numbers(row) for row in rows("whole")] == [numbers(row) for row in rows("hurt")]
    assert same_state("whole", "hurt")
    found = sorted(int(name.removeprefix("step-")) for name in os.listdir("hurt/checkpoints"))
    assert found == [25, 30, 32]
