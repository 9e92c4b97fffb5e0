"""The worked example of docs/methods/mada.md: an optimizer from another package, installed, trained with."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "methods" / "mada.md"
RECIPE = """
run: {name: guest, steps: 3}
model: {layers: 1, hidden: 16, heads: 2, kv_heads: 2, ffn: 32, vocab: 257, max_seq_len: 16}
data: {sources: [{path: TEXT}], tokenizer: bytes, seq_len: 16, micro_batch: 2, global_batch: 2, holdout: 0.3}
optim: {name: signum, lr: 1e-3, beta: 0.95}
compile: false
log: {every: 1}
"""


def example() -> dict[str, str]:
    """File name -> content, from the page."""
    text = PAGE.read_text(encoding="utf-8")
    return dict(re.findall(r"^`([\w.]+)`\n\n```\w+\n(.*?)^```", text, re.S | re.M))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """With the example's module and metadata in a folder of its own on the path, as pip would lay them."""
    site = tmp_path / "site"
    files = example()
    project = tomllib.loads(files["pyproject.toml"])["project"]
    info = site / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir(parents=True)
    (site / "hlat_signum.py").write_text(files["hlat_signum.py"])
    head = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(head)
    points = project["entry-points"]
    text = "".join(
        f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in items.items()) for group, items in points.items()
    )
    (info / "entry_points.txt").write_text(text)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), str(ROOT)]), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"document {i}: " + "the quick brown fox. " * 20)
    path = tmp_path / "guest.yaml"
    path.write_text(RECIPE.replace("TEXT", str(folder)))
    return path


def hlat(*words: str, environment: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hlat", *words]
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=300)


def test_it_trains(environment: dict[str, str], recipe: Path, tmp_path: Path) -> None:
    done = hlat("train", str(recipe), environment=environment, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "runs" / "guest" / "metrics.jsonl").read_text().splitlines()
    rows = [row for row in map(json.loads, lines) if row["kind"] == "train"]
    assert len(rows) == 3 and all(0 < row["optim/sign_share"] < 1 for row in rows)
    checkpoint = next((tmp_path / "runs" / "guest" / "checkpoints").glob("step-*"))
    assert "optim/mean/embed.weight" in "".join(p.read_text() for p in checkpoint.rglob("*.json"))


def test_its_options_are_checked(environment: dict[str, str], recipe: Path, tmp_path: Path) -> None:
    words = ("recipes", "show", str(recipe), "optim.bets=0.5")
    wrong = hlat(*words, environment=environment, folder=tmp_path)
    assert wrong.returncode == 2 and "did you mean 'beta'" in wrong.stderr
    bare = {**environment, "PYTHONPATH": str(ROOT)}
    missing = hlat("recipes", "check", str(recipe), environment=bare, folder=tmp_path)
    assert missing.returncode == 2 and "unknown optim 'signum'" in missing.stderr
