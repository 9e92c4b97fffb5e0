"""A sweep looks at all its runs before the first one starts, and its list says which could not."""

from __future__ import annotations

from pathlib import Path

import pytest

from hlat import cli
from hlat.commands import sweep, sweep_cells

RECIPE = """
run: {name: small, steps: 3}
model: {layers: 1, hidden: 16, heads: 2, kv_heads: 2, ffn: 32, vocab: 257, max_seq_len: 16}
data: {sources: [{path: text}], tokenizer: bytes, micro_batch: 2, global_batch: 2}
compile: false
"""
HERE = [  # another machine may have it: the list prints the command, and a note
    ("data.tokenizer=[bytes, gone.json]", "data.tokenizer: no such file or folder: 'gone.json'"),
    ("data.sources=[[{path: text}], [{path: gone}]]", "data.sources[0].path: no such file or folder: 'gone'"),
    ("init.from=[null, gone]", "init.from: no such file or folder: 'gone'"),
    ("eval.tasks=[[], [gone/task.yaml]]", "eval.tasks: no such task file: 'gone/task.yaml'"),
    ("parallel.tp=[1, 2]", "tp 2 x pp 1 does not fit 1 process"),
]
NOWHERE = [  # no machine can run it
    ("data.tokenizer=[bytes, 'train:bpe']", "unknown tokenizer 'train:bpe'"),
    ("model.vocab=[257, 100]", "has 257 ids, model.vocab is 100"),
    ("data.tokenizer=[bytes, 'train:bpe-300']", "has 300 ids, model.vocab is 257"),
]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the recipe lies, and its text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("the quick brown fox")
    (tmp_path / "small.yaml").write_text(RECIPE)
    return tmp_path


@pytest.mark.parametrize(("grid", "line"), [*HERE, *NOWHERE])
def test_no_run_starts_before_all_are_looked_at(
    grid: str, line: str, folder: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(sweep, "run_all", lambda *_: pytest.fail("a run was started"))
    assert cli.main(["sweep", "small.yaml", grid, "--out", "o"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and line in said.err
    assert not (folder / "o").exists()


@pytest.mark.parametrize(("grid", "line"), HERE)
def test_the_list_says_what_could_not_start_here(grid: str, line: str, capsys) -> None:
    assert cli.main(["sweep", "small.yaml", grid, "--out", "o", "--list"]) == 0
    said = capsys.readouterr()
    assert [text.startswith("hlat train small.yaml ") for text in said.out.splitlines()] == [True, True]
    assert said.err.startswith("hlat: note: run ") and said.err.count("\n") == 1 and line in said.err


@pytest.mark.parametrize(("grid", "line"), NOWHERE)
@pytest.mark.parametrize("words", [["sweep", "--list"], ["recipes", "check"]], ids=["list", "check"])
def test_what_no_machine_can_run_is_refused(grid: str, line: str, words: list[str], capsys) -> None:
    name, values = grid.rstrip("]").split("=[")
    value = grid if words[0] == "sweep" else f"{name}={values.split(', ')[1]}"
    assert cli.main([*words, "small.yaml", value]) == 2
    said = capsys.readouterr()
    assert said.out == "" and line in said.err


def test_each_fault_is_said_once_and_of_many_the_first(folder: Path, capsys) -> None:
    missing = ", ".join(f"gone-{n}.json" for n in range(6))
    assert cli.main(["sweep", "small.yaml", f"data.tokenizer=[bytes, {missing}]", "--seeds", "2"]) == 2
    said = capsys.readouterr().err
    assert "12 of 14 runs cannot start" in said and "(and 2 more)" in said
    assert all(said.count(f"gone-{n}.json' in") == (n < 4) for n in range(6))


def test_each_tokenizer_is_read_once(monkeypatch) -> None:
    read: list[object] = []
    monkeypatch.setattr(
        "hlat.data.presence.check_tokenizer", lambda recipe: read.append(recipe.data.tokenizer)
    )
    sweep.plan("small.yaml", ["optim.lr=[1e-3, 2e-3]", "data.tokenizer=[bytes, gone.json]"], 2)
    assert sorted(read) == ["bytes", "gone.json"]


def test_tasks_are_looked_up_once(monkeypatch) -> None:
    asked: list[object] = []
    monkeypatch.setattr("hlat.train.tasks.check_names", lambda recipe: asked.append(recipe.eval.tasks))
    trials, _ = sweep.plan("small.yaml", ["optim.lr=[1e-3, 2e-3]", "eval.tasks=[[], [a]]"], 2)
    assert not list(sweep_cells.unfit_here(trials)) and sorted(asked) == [(), ("a",)]


def test_a_job_array_says_what_any_of_its_tasks_lacks_here(capsys) -> None:
    grid = "data.tokenizer=[bytes, gone.json]"
    words = ["launch", "slurm", "small.yaml", grid, "--seeds", "2", "--nodes", "1", "--nproc-per-node", "1"]
    assert cli.main([*words, "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "--array=0-3" in said.out
    assert said.err.count("data.tokenizer: no such file or folder: 'gone.json'") == 1
