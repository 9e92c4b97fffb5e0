"""A run that is told to stop: whenever it comes the state is saved, the status says so, and the same command
ends like an undisturbed run.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch

from hlat.checkpoint.reader import open_checkpoint
from hlat.cli import main
from hlat.observe import spot
from hlat.train import loop

RECIPE = """
run: {name: small, steps: 6, seed: 3}
model: {layers: 2, hidden: 32, heads: 4, kv_heads: 2, ffn: 64, vocab: 320, max_seq_len: 32}
data: {sources: [{path: text}], tokenizer: bytes, micro_batch: 4, global_batch: 8, holdout: 0.2}
precision: {compute: fp32}
optim: {name: adamw, lr: 3e-3}
schedule: {name: clamped_cosine, warmup_steps: 2}
checkpoint: {every: 100}
eval: {every: 3, rows: 8}
log: {every: 2}
compile: false
"""
TERM, USR1, HUP = signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    (tmp_path / "text").mkdir()
    words = np.random.default_rng(0).choice(["alpha", "beta", "gamma", "delta"], size=(40, 60))
    for number, row in enumerate(words):
        (tmp_path / "text" / f"{number:02}.txt").write_text(" ".join(row) + f" {number}\n")
    (tmp_path / "small.yaml").write_text(RECIPE)
    return tmp_path


def train(*overrides: str) -> int:
    return main(["train", "small.yaml", *overrides])


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


def rows(folder: str, *kinds: str) -> list[dict]:
    lines = Path(folder, "metrics.jsonl").read_text().splitlines()
    measured = ("tokens_per_second", "mfu", "step_seconds", "memory/peak_bytes", "by")
    found = [row for row in map(json.loads, lines) if row["kind"] in kinds]
    return [{k: v for k, v in row.items() if k not in measured} for row in found]


def stopped(folder: str = "runs/small") -> dict | None:
    return json.loads(Path(folder, "environment.json").read_text())["starts"][-1].get("stopped")


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Do something, once, in the step that begins when `step` are done."""
    train_step, waiting = loop.train_step, [True]

    def disturbed(run: Any) -> Any:
        if run.step == step and waiting:
            waiting.clear()
            act()
        return train_step(run)

    monkeypatch.setattr(loop, "train_step", disturbed)


def ends_like_an_undisturbed_run() -> bool:
    assert train() == 0 and stopped() is None and train("run.dir=whole") == 0
    kinds = ("train", "eval", "tasks")
    one, two = open_checkpoint("runs/small"), open_checkpoint("whole")
    same = rows("runs/small", *kinds) == rows("whole", *kinds) and one.step == two.step
    return same and all(torch.equal(one.read(name), two.read(name)) for name in two.names())


@pytest.mark.parametrize(
    ("numbers", "status", "name"),
    [((USR1, TERM), 138, "SIGUSR1"), ((TERM, TERM), 143, "SIGTERM"), ((HUP, TERM), 129, "SIGHUP")],
)
def test_the_first_signal_saves_and_stops(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys, numbers: tuple[int, ...], status: int, name: str
) -> None:
    at_step(monkeypatch, 2, lambda: send(*numbers))
    assert train() == status
    assert open_checkpoint("runs/small").step == 3
    assert f"stopped by signal {status - 128} after step 3; state saved" in capsys.readouterr().out
    assert stopped() == {"by": name, "step": 3}
    assert ends_like_an_undisturbed_run()


@pytest.mark.parametrize("background", ["true", "false"])
def test_signals_during_saves_lose_none(
    place: Path, monkeypatch: pytest.MonkeyPatch, background: str
) -> None:
    from hlat.checkpoint import layout

    write, count = layout.write_tensors, [0]

    def disturbed(*args: Any, **kwargs: Any) -> Any:
        send(TERM)
        count[0] += 1
        result = write(*args, **kwargs)
        send(signal.SIGINT, TERM, USR1)
        return result

    monkeypatch.setattr(layout, "write_tensors", disturbed)
    assert train("checkpoint.every=2", f"checkpoint.async={background}") == 143
    monkeypatch.setattr(layout, "write_tensors", write)
    saved = open_checkpoint("runs/small")
    saved.verify()
    assert saved.step >= 2 and count[0] >= 1
    assert ends_like_an_undisturbed_run()


def test_a_signal_before_the_first_step(place: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    from hlat import data

    opened = data.open_data
    assert train("run.stop_at_step=2") == 0
    for when in (lambda *a, **k: send(USR1), lambda *a, **k: (opened(*a, **k), send(USR1))):
        monkeypatch.setattr(data, "open_data", when)
        assert train() == 138
        err = capsys.readouterr().err
        assert (
            "hlat: stopped by SIGUSR1 before a first step was done; there is nothing new to save" in err
            and "Trace" not in err
        )
    monkeypatch.setattr(data, "open_data", opened)
    monkeypatch.setattr("hlat.train.run.Run.initialise", lambda run: send(TERM))
    assert train() == 143
    assert stopped() == {"by": "SIGTERM", "step": None}
    monkeypatch.undo()
    os.chdir(place)
    assert open_checkpoint("runs/small").step == 2
    assert ends_like_an_undisturbed_run()


def test_ctrl_c_before_a_resumes_first_step_is_recorded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert train("run.stop_at_step=2") == 0
    at_step(monkeypatch, 2, lambda: (send(signal.SIGINT), pytest.fail("went on")))
    assert train() == 130
    assert stopped() == {"by": "SIGINT", "step": None} and open_checkpoint("runs/small").step == 2


def test_a_second_ctrl_c_is_recorded_as_one_that_saved_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_step(monkeypatch, 3, lambda: (send(signal.SIGINT, signal.SIGINT), pytest.fail("went on")))
    assert train("checkpoint.every=2") == 130
    assert stopped() == {"by": "SIGINT", "step": None} and open_checkpoint("runs/small").step == 2


@pytest.mark.parametrize(("last", "status"), [(1, 0), (6, 143)])
def test_a_signal_in_the_evaluation_after_the_first_step_comes_after_it(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys, last: int, status: int
) -> None:
    """Of a start whose only step that is, too: then nothing is left to do."""
    evaluate = loop.evaluate
    monkeypatch.setattr(loop, "evaluate", lambda run: (send(TERM), evaluate(run))[1])
    assert train(f"run.stop_at_step={last}", "eval.every=1") == status
    assert "before a first step" not in capsys.readouterr().err
    assert open_checkpoint("runs/small").step == 1
    assert stopped() == (None if last == 1 else {"by": "SIGTERM", "step": 1})


def test_a_compilation_is_not_waited_for(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step of each start, which may compile."""
    assert train("run.stop_at_step=2") == 0
    at_step(monkeypatch, 2, lambda: (send(TERM), pytest.fail("went on")))
    assert train() == 143
    assert stopped() == {"by": "SIGTERM", "step": None} and open_checkpoint("runs/small").step == 2
    assert ends_like_an_undisturbed_run()


def test_a_new_run_stopped_before_its_first_step_leaves_no_folder(place: Path, monkeypatch) -> None:
    monkeypatch.setattr("hlat.train.run.Run.initialise", lambda run: send(TERM))
    assert train() == 143
    assert not Path("runs").exists()


@pytest.mark.parametrize("when", ["in the last step", "after it"])
def test_after_the_last_step_all_is_done(place: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    if when == "after it":
        evaluate = loop.evaluate

        def disturbed(run: Any) -> Any:
            if run.step == 6:
                send(TERM, USR1)
            return evaluate(run)

        monkeypatch.setattr(loop, "evaluate", disturbed)
    else:
        at_step(monkeypatch, 5, lambda: send(TERM))
    assert train() == 0 and stopped() is None
    assert open_checkpoint("runs/small").step == 6
    assert [row["step"] for row in rows("runs/small", "eval")] == [3, 6]


def test_the_end_of_slurms_time(place: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """Each step takes 0.3 s. A save is expected to take 2 s (grace) before one is measured."""
    train_step = loop.train_step

    def slow(run: Any) -> Any:
        time.sleep(0.3)
        return train_step(run)

    monkeypatch.setattr(loop, "train_step", slow)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 11))
    assert train("checkpoint.grace=2", "run.steps=100", "schedule.horizon_steps=6") == 138
    left = float(os.environ["SLURM_JOB_END_TIME"]) - time.time()
    assert left > 0, "stopped too late"
    assert 2 <= open_checkpoint("runs/small").step < 100
    assert "stopped by the end of its time after step" in capsys.readouterr().out
    assert stopped()["by"] == "the end of its time"


def test_max_hours(place: Path) -> None:
    assert train("run.max_hours=0.001", "checkpoint.grace=1") == 138, "3.6 s, and 5 of them are kept free"
    assert open_checkpoint("runs/small").step == 1, "every start makes progress"
    assert ends_like_an_undisturbed_run()


def test_a_slow_save_warns_of_the_grace_time(place: Path, capsys) -> None:
    assert train("checkpoint.grace=0.001", "checkpoint.every=1", "checkpoint.async=false") == 0
    assert capsys.readouterr().out.count("more than the 0.001 s of checkpoint.grace") == 1
    assert train("run.dir=b", "checkpoint.every=1") == 0
    assert "checkpoint.grace" not in capsys.readouterr().out


def test_a_spot_notice_saves_and_stops_and_advice_saves(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    answers = {"instance-life-cycle": "spot", "token": "a token"}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            text = answers.get(self.path.rpartition("/")[2])
            self.send_response(200 if text else 404)
            self.end_headers()
            self.wfile.write((text or "").encode())

        do_PUT = do_GET
        log_message = lambda *_: None  # noqa: E731

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(spot, "INTERVAL", 0.02)
    train_step = loop.train_step

    def slow(run: Any) -> Any:
        if run.step == 2:
            answers["rebalance"] = '{"noticeTime": "2026-01-01T00:00:00Z"}'
        if run.step == 4:
            answers["instance-action"] = '{"action": "stop", "time": "2026-01-01T00:02:00Z"}'
        time.sleep(0.3)
        return train_step(run)

    monkeypatch.setattr(loop, "train_step", slow)
    try:
        assert train("checkpoint.async=false") == 143
    finally:
        server.shutdown()
        server.server_close()
    monkeypatch.setattr(loop, "train_step", train_step)
    monkeypatch.delenv("AWS_EC2_METADATA_SERVICE_ENDPOINT")
    out = capsys.readouterr().out
    assert "checkpoint of step 3 saved" in out and "stopped by a spot interruption notice after step 5" in out
    assert stopped() == {"by": "a spot interruption notice", "step": 5}
    assert ends_like_an_undisturbed_run()


def test_a_signal_cuts_tasks_short_and_they_are_run_when_the_run_continues(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run in one process; with more ranks the tasks end first."""
    from hlat.commands import train as command

    made, cut = command._tasks, [True]

    class Tasks:
        def __init__(self, run: Any, beat: Callable[[], None]) -> None:
            self.run, self.beat = run, beat

        def __call__(self) -> dict[str, float]:
            self.beat()
            if self.run.step == 3 and cut:
                cut.clear()
                send(TERM)
                self.beat()
                raise AssertionError("not reached")
            return {"made/up": float(self.run.step)}

    monkeypatch.setattr("hlat.train.tasks.TaskEvaluation", Tasks)
    monkeypatch.setattr(command, "_tasks", lambda run, job: made(_with_tasks(run), job))
    assert train() == 143
    assert open_checkpoint("runs/small").step == 3
    assert [row["step"] for row in rows("runs/small", "eval", "tasks")] == [3]
    assert ends_like_an_undisturbed_run()
    assert [row["step"] for row in rows("runs/small", "tasks")] == [3, 6]
    assert train() == 0, "nothing is left to do, and no row is written again"
    assert [row["step"] for row in rows("runs/small", "tasks")] == [3, 6]


def _with_tasks(run: Any) -> Any:
    section = run.recipe.eval.model_copy(update={"tasks": ("made-up",)})
    run.recipe = run.recipe.model_copy(update={"eval": section})
    return run
