"""What a run leaves behind is what docs/run-folder.md says, field by field and file by file."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from hlat.cli import main

sys.path.insert(0, str(Path(__file__).parent))
from docs_pages import ROOT, column, fences, table

PAGE = "docs/run-folder.md"
RECIPE = """
run: {name: small, steps: 3}
model: {layers: 1, hidden: 32, heads: 2, ffn: 32, vocab: 320, max_seq_len: 32}
data: {sources: [{path: text}], tokenizer: bytes, seq_len: 32, micro_batch: 4, global_batch: 4, holdout: 0.2}
optim: {name: mada, lr: 1e30}  # the second step is not finite
precision: {compute: fp32}
schedule: {name: constant}
checkpoint: {every: 1, remote: "file://STORE"}
eval: {every: 3, rows: 4}
log: {every: 1}
compile: false
"""
PLUGINS = "optim/"
# Which fields are only there at times, and why the run below lacks them.
AT_TIMES = {
    "eval": {"accuracy", "held_out_examples", "stop"},  # of labels; of a start that ends between evaluations
    "anomaly": {"skipped_data", "checkpoint"},  # of a guard that goes back
}
AT_TIMES_IN_A_START = {"neuron_profile", "stopped"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of three steps, two of them bad, with copies of its checkpoints."""
    place = tmp_path_factory.mktemp("place")
    (place / "text").mkdir()
    words = np.random.default_rng(0).choice(["alpha", "beta", "gamma"], size=(20, 30))
    for number, row in enumerate(words):
        (place / "text" / f"{number}.txt").write_text(" ".join(row) + f" {number}\n")
    (place / "small.yaml").write_text(RECIPE.replace("STORE", str(place / "store")))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        assert main(["train", "small.yaml"]) == 0
    return place / "runs" / "small"


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def kinds_told() -> dict[str, set[str]]:
    """Kind of line -> its fields, as the page has them."""
    found = {"train": set(column(table(PAGE, "field", "meaning").rows))}
    for row in table(PAGE, "kind", "when", "fields").rows:
        words = re.sub(r"\([^)]*\)", "", row[2])  # values of a field stand in brackets
        found[row[0].strip("`")] = {word for word in re.findall(r"`([^`]+)`", words) if "<" not in word}
    return {kind: fields | {"kind", "by"} for kind, fields in found.items()}


def test_fields_of_metrics(folder: Path) -> None:
    told = kinds_told()
    assert set(told) == {"train", "start", "eval", "tasks", "anomaly", "storage"}
    written: dict[str, set[str]] = {}
    for row in rows(folder):
        names = {name for name in row if not name.startswith(PLUGINS)}
        written.setdefault(row["kind"], set()).update(names)
    assert set(written) == set(told) - {"tasks"}  # these need the evaluation harness: test_eval_in_loop.py
    for kind, names in written.items():
        assert names == told[kind] - AT_TIMES.get(kind, set()), kind
    assert any(name.startswith(PLUGINS) for row in rows(folder) for name in row)


def test_fields_that_are_there_at_times_are_told() -> None:
    assert all(fields <= kinds_told()[kind] for kind, fields in AT_TIMES.items())
    told = (ROOT / "docs/operations/anomalies.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in told for name in kinds_told()["anomaly"] - {"kind", "by", "step"})


def test_keys_of_environment(folder: Path) -> None:
    told = set(column(table(PAGE, "key", "what").rows))
    content = json.loads((folder / "environment.json").read_text())
    assert set(content) == {"starts", "holder"}
    assert all(set(entry) == told - AT_TIMES_IN_A_START for entry in content["starts"])


def test_variables_that_are_recorded() -> None:
    from hlat.observe.environment import _PREFIXES

    row = next(row for row in table(PAGE, "key", "what").rows if row[0] == "`variables`")
    assert set(re.findall(r"`(\w+_)`", row[1])) == set(_PREFIXES)


def tree(page: str, beginning: str) -> set[str]:
    """The names in a drawing of a folder, without a slash at their ends."""
    block = next(block for block in fences(ROOT / page, "", "text") if block.startswith(beginning))
    named = [re.split(r"\s{2,}", line.strip())[0] for line in block.splitlines()[1:]]
    return {word.rstrip("/") for names in named for word in names.split(", ")}


def test_files_of_a_run(folder: Path) -> None:
    left = {path.name for path in folder.iterdir()}
    assert left <= tree(PAGE, "runs/tiny/") and {"metrics.jsonl", "logs", "checkpoints"} <= left
    told = (ROOT / PAGE).read_text(encoding="utf-8")
    assert [path.name for path in (folder / "logs").iterdir() if path.name not in told] == []


def test_files_of_a_checkpoint(folder: Path) -> None:
    step = max((folder / "checkpoints").iterdir())
    files = {path.name for path in step.iterdir()}
    assert files <= tree("docs/checkpoints.md", "checkpoints/step-") and len(files) >= 4
    copied = max(path for path in (folder.parents[1] / "store").rglob("step-*") if path.is_dir())
    told = next(b for b in fences(ROOT / "docs/operations/storage.md", "") if "complete.json" in b)
    assert [path.name for path in copied.rglob("*") if path.name not in told] == []


def test_parts_of_a_fingerprint(folder: Path) -> None:
    from hlat.train.fingerprint import HELD_OUT, INIT, TASKS, TEXTS, TOKENIZER

    told = set(column(table(PAGE, "key", "content").rows))
    content = json.loads((folder / "fingerprint.json").read_text())["rows"][-1]["content"]
    assert {"data.sources.0", TOKENIZER, HELD_OUT} <= set(content)
    assert {re.sub(r"\.\d+$", ".N", key) for key in content} <= told
    data = {"data.sources.N", "data.examples", "data.examples.eval"}  # the run above has no records
    assert told == {INIT, TEXTS, TASKS, TOKENIZER, HELD_OUT} | data
