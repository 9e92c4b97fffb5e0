"""`hlat train` with `backend: nxd`, from the recipe to the last checkpoint, and a second time to continue."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.nxd

PROGRAM = Path(__file__).with_name("nxd_cli.py")
RECIPE = """
run: {{name: trn, dir: {dir}, steps: 8, seed: 3}}
model: {{layers: 2, hidden: 32, heads: 4, kv_heads: 2, ffn: 64, vocab: 320, max_seq_len: 64}}
data: {{sources: [{{path: {text}}}], micro_batch: 4, global_batch: 8, holdout: 0.2}}
parallel: {{tp: 1, dp: 2, zero1: true}}
optim: {{lr: 1e-3}}
schedule: {{name: cosine, warmup_steps: 2}}
checkpoint: {{every: 4}}
eval: {{every: 4, batches: 2}}
log: {{every: 2}}
backend: nxd
"""


@pytest.mark.parametrize("mode", ["cpu-mode", "xla-mode"])
def test_train_and_continue(mode: str, tmp_path: Path, nxd_start: Callable[..., list[int]]) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for i in range(40):
        words = " ".join(f"word{(i * 7 + j) % 50}" for j in range(60))
        (text / f"{i}.txt").write_text(words)
    recipe = tmp_path / "trn.yaml"
    recipe.write_text(RECIPE.format(dir=tmp_path / "run", text=text))
    for stop in (6, 8):
        logs = tmp_path / f"logs-{stop}"
        logs.mkdir()
        command = [str(PROGRAM), "train", str(recipe), f"run.stop_at_step={stop}"]
        codes = nxd_start(mode, 2, command, logs, 240)
        output = "\n".join((logs / f"rank-{rank}.log").read_text()[-4000:] for rank in (0, 1))
        assert codes == [0, 0], output
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if row["kind"] == "train"]
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [4, 8]
    assert sorted(f.name for f in (tmp_path / "run" / "checkpoints").iterdir())
