"""The memory of a conversion is that of the largest tensor, however many there are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hlat.checkpoint.store import write_weights
from hlat.model.config import ModelConfig
from hlat.model.init import parameter_shapes

FEW, MANY = 2, 20
LAYER = 2 * (2 * 512 * 512 + 2 * 512 * 256 + 3 * 512 * 1024)  # bytes of a layer in bf16
# The first conversion is of what it imports. Pages of files that are mapped are no memory of the process.
PROGRAM = """
import sys, threading
from hlat.checkpoint import stream
from hlat.cli import main
stream.PART_BYTES = 4 << 20
def held():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
def watch():
    global most
    while not done.wait(0.001):
        most = max(most, held())
few, many, out = sys.argv[1:]
for verb in ("to-hf", "from-hf"):
    made = []
    for number, model in enumerate((few, few, many)):
        done, before = threading.Event(), held()
        most = before
        watcher = threading.Thread(target=watch)
        watcher.start()
        made.append(f"{out}/{verb}-{number}")
        assert main(["convert", verb, model, made[-1]]) == 0
        done.set()
        watcher.join()
        if number:
            print("peak", verb, most - before)
    few, many = made[1:]
"""


def write_model(path: Path, layers: int) -> Path:
    """A checkpoint of random weights."""
    config = ModelConfig(layers=layers, hidden=512, heads=8, kv_heads=4, ffn=1024, vocab=260, max_seq_len=64)
    weights = ((f"model/{name}", torch.rand(shape)) for name, shape in parameter_shapes(config).items())
    meta = {"model": config.model_dump(), "step": 1, "recipe": {"data": {"tokenizer": "bytes"}}}
    write_weights(path, weights, meta, [])
    return path


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    few, many = (write_model(tmp_path / f"{n}", n) for n in (FEW, MANY))
    command = [sys.executable, "-c", PROGRAM, str(few), str(many), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("peak ")]
    assert [verb for _, verb, _ in lines] == ["to-hf", "to-hf", "from-hf", "from-hf"]
    small, large, small_back, large_back = (int(count) for _, _, count in lines)
    assert max(large - small, large_back - small_back) < 3 * LAYER < (MANY - FEW) * LAYER / 5, lines
