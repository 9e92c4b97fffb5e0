"""Going back from a bad batch in every layout, and through kill -9: bitwise a run that left the data out."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hlat.checkpoint.reader import open_checkpoint

PROGRAM = Path(__file__).parents[1] / "poisoned.py"
RECIPE = """
run: {name: small, steps: 10, seed: 3}
model: {layers: 2, hidden: 32, heads: 4, kv_heads: 2, ffn: 64, vocab: 320, max_seq_len: 32}
data: {sources: [{path: text}], tokenizer: bytes, micro_batch: 2, global_batch: 8, holdout: 0.1}
precision: {compute: fp32}
optim: {name: adamw, lr: 3e-3}
schedule: {name: clamped_cosine, warmup_steps: 2}
guard: {name: rewind, sigma: 0}
checkpoint: {every: 2, keep: 10}
log: {every: 3}
compile: false
"""
LAYOUTS = {
    "dp2": ("parallel.zero1=true", "optim={name: mada, lr: 3e-3}", "reduce={name: conef}"),
    "tp2": ("parallel.tp=2", "parallel.sequence=true"),
    "pp2": ("parallel.pp=2",),
    "mezo": ("method={name: mezo, lr: 1e-4}",),
}


class Place:
    """A working directory with text and a recipe whose data steps 4 and 7 hold a bad row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "text").mkdir()
        letters = np.random.default_rng(0).choice(list("abcdefghij "), size=(40, 400))
        for number, row in enumerate(letters):
            (path / "text" / f"{number:02}.txt").write_text("".join(row))
        (path / "small.yaml").write_text(RECIPE)
        probe = (
            "from hlat.data import open_data; from hlat.recipe import load\n"
            "data = open_data(load('small.yaml'))\n"
            "print([data.batches(step - 1, 8, 1)[0].targets[5].tolist() for step in (4, 7)])"
        )
        done = subprocess.run(
            [sys.executable, "-c", probe], cwd=path, env=self.environment(), capture_output=True, text=True
        )
        self.bad = f"objective={{name: poisoned, rows: {done.stdout.strip()}}}"

    def environment(self) -> dict[str, str]:
        cleaned = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        own = {"XDG_CACHE_HOME": str(self.path / "cache"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        return cleaned | own

    def start(self, world: int, *overrides: str) -> list[subprocess.Popen[str]]:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        ranks = []
        for rank in range(world):
            env = self.environment()
            if world > 1:
                env |= {"RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
                env |= {"MASTER_PORT": str(port)}
            command = [sys.executable, str(PROGRAM), "train", "small.yaml", self.bad, *overrides]
            with open(self.path / f"output-{rank}", "w") as out:
                ranks.append(
                    subprocess.Popen(command, cwd=self.path, env=env, stdout=out, stderr=out, text=True)
                )
        return ranks

    def train(self, world: int, *overrides: str) -> list[int]:
        ranks = self.start(world, *overrides)
        try:
            return [process.wait(120) for process in ranks]
        finally:
            for process in ranks:
                process.kill()
                process.wait()

    def output(self) -> str:
        return "".join(file.read_text() for file in sorted(self.path.glob("output-*")))

    def rows(self, folder: str, kind: str = "train") -> list[dict[str, Any]]:
        file = self.path / folder / "metrics.jsonl"
        lines = file.read_text().split("\n")[:-1] if file.exists() else []
        measured = ("tokens_per_second", "mfu", "step_seconds", "memory/peak_bytes", "by")
        found = [row for row in map(json.loads, lines) if row["kind"] == kind]
        return [{k: v for k, v in row.items() if k not in measured} for row in found]

    def same(self, a: str, b: str) -> bool:
        one, two = open_checkpoint(self.path / a), open_checkpoint(self.path / b)
        assert one.step == two.step and one.names() == two.names()
        same = all(torch.equal(one.read(name), two.read(name)) for name in one.names())
        return same and self.rows(a) == self.rows(b)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("anomalies"))


@pytest.mark.parametrize(
    "layout", [name if name == "dp2" else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_two_ranks_go_back_together(place: Place, layout: str) -> None:
    options = LAYOUTS[layout]
    assert place.train(2, f"run.dir={layout}", *options) == [0, 0], place.output()
    found = [(row["bad_step"], row["skipped_data"]) for row in place.rows(layout, "anomaly")]
    assert found == [(4, [4, 4]), (6, [7, 7])]
    skips = "data.skip=[[4, 4], [7, 7]]"
    assert place.train(2, f"run.dir={layout}-whole", skips, *options) == [0, 0], place.output()
    assert place.rows(f"{layout}-whole", "anomaly") == []
    assert place.same(layout, f"{layout}-whole")


@pytest.mark.slow
def test_the_guard_gives_up_on_all_ranks(place: Place) -> None:
    assert place.train(2, "run.dir=stop", "guard.rewinds=1") == [3, 3], place.output()
    assert place.train(2, "run.dir=stops", "guard={name: stop, sigma: 0}") == [3, 3], place.output()
    assert place.output().count("hlat: error:") == 1


@pytest.mark.slow
def test_a_user_signal_stops_both_ranks(place: Place) -> None:
    ranks = place.start(2, "run.dir=usr1", "run.steps=100000", "log.every=1", "schedule.name=constant")
    while len(place.rows("usr1")) < 3 and ranks[0].poll() is None:
        time.sleep(0.05)
    ranks[1].send_signal(signal.SIGUSR1)
    time.sleep(0.02)  # two at once may reach two threads of a process, in either order
    ranks[1].send_signal(signal.SIGTERM)
    assert [process.wait(60) for process in ranks] == [138, 138], place.output()
    assert open_checkpoint(place.path / "usr1").step == len(place.rows("usr1"))
    assert place.output().count("stopped by signal 10 after step") == 1


@pytest.mark.slow
def test_kills_while_going_back(place: Place) -> None:
    """kill -9 at random moments of the run, most of them around the bad steps, and the same command again."""
    moments, kills = random.Random(1), 0
    for _ in range(8):
        first = len(place.rows("killed"))
        process = place.start(1, "run.dir=killed", "log.every=2")[0]
        deadline = time.monotonic() + 60
        while len(place.rows("killed")) == first and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.15))
        process.kill()
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 3
    assert place.train(1, "run.dir=killed", "log.every=2") == [0], place.output()
    skips = "data.skip=[[4, 4], [7, 7]]"
    assert place.train(1, "run.dir=killed-whole", "log.every=2", skips) == [0], place.output()
    assert place.same("killed", "killed-whole")
