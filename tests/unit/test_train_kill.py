"""kill -9 at random moments of real training processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from hlat.checkpoint.reader import open_checkpoint

EVERY, STEPS, KILLS = 5, 10_000, 20

RECIPE = f"""
run: {{name: killed, steps: {STEPS}, seed: 3}}
model: {{layers: 2, hidden: 64, heads: 4, kv_heads: 2, ffn: 128, vocab: 320, max_seq_len: 64}}
data: {{sources: [{{path: text}}], tokenizer: bytes, micro_batch: 4, global_batch: 4, holdout: 0.2}}
schedule: {{name: constant}}
checkpoint: {{every: {EVERY}, keep: 2}}
log: {{every: 3}}
compile: false
"""


def rows(folder: Path) -> list[dict]:
    """Whole rows of the metrics so far (a kill may tear the last line)."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [row for row in map(json.loads, lines) if row["kind"] == "train"]


@pytest.mark.slow
def test_twenty_kills_lose_at_most_the_steps_since_the_last_checkpoint(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number, row in enumerate(np.random.default_rng(0).choice(["ab", "cd", "ef"], size=(40, 200))):
        (text / f"{number:02}.txt").write_text(" ".join(row))
    (tmp_path / "killed.yaml").write_text(RECIPE)
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "hlat", "train", "killed.yaml"]
    folder = tmp_path / "runs" / "killed"
    moments = random.Random(0)
    reached, losses = 0, {}
    for _ in range(KILLS):
        process = subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        first = len(rows(folder))
        deadline = time.monotonic() + 120
        while len(rows(folder)) == first and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(moments.uniform(0, 0.7))
        process.send_signal(signal.SIGKILL)
        _, error = process.communicate()
        assert process.returncode == -signal.SIGKILL, error.decode()
        done = rows(folder)
        assert [row["step"] for row in done] == list(range(1, len(done) + 1)), "a row is missing or double"
        for row in done:  # what is trained again after a kill gives the same numbers, bit for bit
            assert losses.setdefault(row["step"], row["loss"]) == row["loss"]
        # A row is written only after its step; a background save may be one interval behind.
        newest = open_checkpoint(folder).step if len(done) > 2 * EVERY else reached
        assert newest >= max(reached, len(done) - 2 * EVERY), (newest, len(done))
        reached = newest
    assert reached >= KILLS * EVERY // 2, "the run makes progress through its kills"
