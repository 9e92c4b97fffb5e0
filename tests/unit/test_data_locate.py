"""Which data a step reads when some is left out, and which documents were in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hlat.cli import main
from hlat.data import open_data
from hlat.data.skips import Skips, merged
from hlat.errors import UserError
from hlat.recipe import load

RECIPE = """
run: {name: test, seed: 3, steps: 10}
model: {preset: tiny, vocab: 400, max_seq_len: 32}
data:
  sources: [{path: one, weight: 2}, {path: two}]
  tokenizer: bytes
  micro_batch: 2
  global_batch: 8
  holdout: 0.2
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sources of documents of 3 to 120 characters."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    random = np.random.default_rng(0)
    for source, alphabet in (("one", "abcdefgh"), ("two", "ABCDEFGH")):
        (tmp_path / source).mkdir()
        for number in range(30):
            text = "".join(random.choice(list(alphabet), random.integers(3, 120)))
            (tmp_path / source / f"{number:02}.txt").write_text(text)
    (tmp_path / "test.yaml").write_text(RECIPE)
    return tmp_path


def test_steps_go_around_what_is_left_out() -> None:
    skips = Skips(((3, 4), (10, 10)), ((6, 6), (5, 5)))
    left_out = {3, 4, 5, 6, 10}
    expected = [step for step in range(1, 30) if step not in left_out]
    assert [skips.position(step) for step in range(1, 25)] == expected
    assert skips.position(0) == 0 and Skips().position(7) == 7
    assert skips.until(9) == [(3, 6)] and skips.until(4) == [(3, 4)] and skips.until(2) == []
    more = skips.add(1, 2)
    assert more.found == ((6, 6), (5, 5), (1, 2)) and more.position(1) == 7 and skips.position(1) == 1
    assert merged([(5, 9), (1, 2), (3, 4), (7, 8), (12, 12)]) == [(1, 9), (12, 12)]


def test_documents_spell_the_rows_of_every_rank(place: Path) -> None:
    """Over three epochs, which wrap around the ends of shards."""
    data = open_data(load("test.yaml"), quiet=True)
    eos, seen = data.tokenizer.eos_id, set()
    steps = 3 * sum(source.windows for source in data.train.sources) // 8
    for step in range(1, steps):
        found = data.locate(step)
        batches = [batch for rank in (0, 1) for batch in data.batches(step - 1, 2, 2, rank, 2)]
        pairs = [pair for b in batches for pair in zip(b.ids.tolist(), b.targets.tolist(), strict=True)]
        rows = [[*ids, targets[-1]] for ids, targets in pairs]
        assert sorted({entry["row"] for entry in found}) == list(range(8))
        for number, row in enumerate(rows):
            ids: list[int] = []
            for entry in (entry for entry in found if entry["row"] == number):
                whole = [*data.tokenizer.encode_arrays([data.document_text(entry)])[0].tolist(), eos]
                assert len(whole) == entry["tokens"]
                ids += whole[entry["first"] : entry["last"] + 1]
                source = ("one", "two")[entry["source"]]
                files = [f.read_text() for f in (place / source).iterdir()]
                assert data.document_text(entry) in files
                seen.add((entry["source"], entry["shard"], entry["document"]))
            assert ids == row
    assert len(seen) == sum(folder.count("train", "documents") for folder in data.folders)


def test_examples(place: Path) -> None:
    records = [{"prompt": f"question {n}?", "completion": f" answer {n}"} for n in range(40)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (place / "pairs.yaml").write_text(
        """
run: {name: pairs, seed: 3, steps: 10}
model: {preset: tiny, vocab: 400, max_seq_len: 32}
data: {examples: {path: pairs.jsonl}, tokenizer: bytes, micro_batch: 2, global_batch: 8, holdout: 0.2}
"""
    )
    data: Any = open_data(load("pairs.yaml"), quiet=True)
    for step in (1, 7, 20):
        found = data.locate(step)
        (batch,) = data.batches(step - 1, 8, 1)
        for entry, ids in zip(found, batch.ids, strict=True):
            text = data.document_text(entry)
            assert text.startswith("question ") and " answer " in text
            assert data.tokenizer.decode(ids[: entry["tokens"] - 1].tolist()) == text
            assert entry["epoch"] == ((step - 1) * 8 + entry["row"]) // data.train.documents


def test_the_command_knows_how_many_steps_the_run_has(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "run").mkdir()
    (place / "run" / "resolved.yaml").write_text(load("test.yaml", ["data.skip=[[3, 4]]"]).to_yaml())
    assert main(["data", "locate", "run", "--step", "10"]) == 0
    assert capsys.readouterr().out.startswith("step 10 reads data step 12: ")
    assert main(["data", "locate", "run", "--step", "11"]) == 2
    error = "--step: the run has 10 steps, not 11; give a step up to 10, or --data-step 13 to look further on"
    assert capsys.readouterr().err == f"hlat: error: {error}\n"


def test_steps_are_counted_from_one(place: Path) -> None:
    data = open_data(load("test.yaml"), quiet=True)
    with pytest.raises(ValueError, match="counted from 1"):
        data.locate(0)
    for wrong in ("[[0, 2]]", "[[5, 4]]", "[[1]]", "[3]"):
        with pytest.raises(UserError, match="data.skip"):
            load("test.yaml", [f"data.skip={wrong}"])
