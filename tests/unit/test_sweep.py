"""The sweep: which runs a grid means, resuming, tables and heat maps; two real runs."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from hlat import cli
from hlat.commands import sweep
from hlat.errors import UserError
from hlat.observe.sweep import Cell, colour, draw_png, heat_maps, render, table
from hlat.recipe import load

RECIPE = """
run: {name: small, steps: 3, seed: 5}
model: {layers: 1, hidden: 16, heads: 2, kv_heads: 2, ffn: 32, vocab: 257, max_seq_len: 16}
data: {sources: [{path: TEXT}], tokenizer: bytes, seq_len: 16, micro_batch: 2, global_batch: 2, holdout: 0.3}
optim: {name: adamw, betas: [0.9, 0.95], lr: 1e-3}
eval: {rows: 4}
compile: false
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(20):
        (folder / f"{i}.txt").write_text(f"document {i}: " + "the quick brown fox. " * 20)
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE.replace("TEXT", str(folder)))
    return str(path)


def test_a_grid_and_its_seeds(recipe: str, tmp_path: Path) -> None:
    grid = ["optim.lr=[1e-3, 2e-3]", "optim.name=[mada, adamw, lion]", "run.steps=7"]
    trials, out = sweep.plan(recipe, grid, 2, tmp_path / "out")
    assert len(trials) == 12 and out == tmp_path / "out"
    assert len({trial.folder for trial in trials}) == 12
    recipes = [load(recipe, trial.overrides) for trial in trials]
    assert [r.run.seed for r in recipes] == [5, 6] * 6
    assert [(r.optim.lr, r.optim.name) for r in recipes[::2]] == [
        (lr, name) for lr in (1e-3, 2e-3) for name in ("mada", "adamw", "lion")
    ]
    assert {r.run.steps for r in recipes} == {7}
    assert {r.run.dir for r in recipes} == {str(trial.folder) for trial in trials}
    # The recipe's own options of adamw stay where adamw is meant, and go with another name.
    assert recipes[2].optim.options["betas"] == (0.9, 0.95)
    assert "beta1" in recipes[0].optim.options


def test_more_values_keep_the_names_of_runs(recipe: str, tmp_path: Path) -> None:
    few, _ = sweep.plan(recipe, ["optim.lr=[1e-3]"], 1, tmp_path)
    many, _ = sweep.plan(recipe, ["optim.lr=[5e-4, 1e-3]"], 2, tmp_path)
    assert few[0].folder in {trial.folder for trial in many}


def test_a_list_value_is_written_in_a_list(recipe: str, tmp_path: Path) -> None:
    trials, _ = sweep.plan(recipe, ["optim.betas=[[0.8, 0.9], [0.9, 0.99]]"], 1, tmp_path)
    assert [load(recipe, t.overrides).optim.options["betas"] for t in trials] == [(0.8, 0.9), (0.9, 0.99)]


@pytest.mark.parametrize(
    ("grid", "seeds", "message"),
    [
        (["optim.lr=1e-3"], 1, "no key has several values"),
        (["optim.lr=[]"], 1, "nothing in the list"),
        (["optim.lr=[1e-3]"], 0, "needs a seed"),
        (["run.seed=[1, 2]"], 1, "use --seeds"),
        (["optim.name=[adamw, madam]"], 1, "did you mean 'mada'"),
        (["optim.name=[mada]", "optim.betas=[[0.9, 0.9]]"], 1, "unknown key 'betas' for 'mada'"),
    ],
)
def test_mistakes_show_before_anything_runs(recipe, tmp_path, grid, seeds, message) -> None:
    with pytest.raises(UserError, match=message):
        sweep.plan(recipe, grid, seeds, tmp_path)


def test_the_list_of_commands(recipe: str, tmp_path: Path, capsys) -> None:
    assert cli.main(["sweep", recipe, "optim.lr=[1e-3, 2e-3]", "--list", "--out", str(tmp_path / "o")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith(f"hlat train {recipe} ") for line in lines)
    assert not (tmp_path / "o").exists()


def test_two_runs_then_none_then_the_missing_one(recipe: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "runs" / "grid"
    words = ["sweep", recipe, "optim.name=[adamw, hyperadam]", "--out", str(out)]
    assert cli.main(words) == 0
    first = capsys.readouterr().out
    assert first.count("] name-") == 2
    folders = sorted(path for path in out.iterdir() if path.is_dir())
    assert len(folders) == 2 and (out / "sweep.html").is_file()
    losses = [sweep.result(recipe, trial) for trial in sweep.plan(recipe, words[2:3], 1, out)[0]]
    assert all(loss is not None and 4 < loss < 7 for loss in losses)

    assert cli.main(words) == 0
    again = capsys.readouterr().out
    assert "] name-" not in again and f"{losses[0]:.4f}" in again

    shutil.rmtree(folders[0])
    assert cli.main(words) == 0
    assert capsys.readouterr().out.count("] name-") == 1

    # Another recipe is not the same run: it is refused by `hlat train`, and said so.
    assert cli.main([*words[:3], "data.micro_batch=1", "data.global_batch=4", *words[3:]]) == 1
    said = capsys.readouterr()
    assert said.out.count("failed with exit code 2") == 2 and "2 of 2 runs failed" in said.err


CELLS = [
    Cell({"optim.lr": lr, "optim.name": name, "optim.eps": eps}, [lr * 100 + eps, 2.0, None])
    for lr in (0.01, 0.03)
    for name in ("a", "<b>")
    for eps in (1.0, 2.0)
]


def test_table_puts_the_best_first() -> None:
    head, lines = table([*CELLS, Cell({"optim.lr": 1, "optim.name": "c", "optim.eps": 1}, [None, math.nan])])
    assert head[:4] == ["optim.lr", "optim.name", "optim.eps", "held-out loss"]
    assert lines[0] == ["0.01", "a", "1", "2.0000", "0.0000", "2.0000", "2/3"]
    assert lines[-1] == ["1", "c", "1", "-", "-", "-", "0/2"]
    assert [line[3] for line in lines[:-1]] == sorted(line[3] for line in lines[:-1])


def test_heat_maps_over_the_last_two_keys() -> None:
    maps = heat_maps(CELLS)
    assert [item.title for item in maps] == ["optim.lr=0.01", "optim.lr=0.03"]
    assert (maps[0].row_key, maps[0].column_key) == ("optim.name", "optim.eps")
    assert maps[1].losses == [[3.0, 3.5], [3.0, 3.5]]
    (line,) = heat_maps([Cell({"optim.lr": lr, "run.steps": 3}, [lr]) for lr in (1.0, 2.0)])
    assert line.rows == [""] and line.columns == [1.0, 2.0] and line.losses == [[1.0, 2.0]]


def test_html_is_coloured_and_escaped() -> None:
    html = render("sweep of <x>", CELLS)
    assert "<b>" not in html.split("<style>")[1].split("</style>")[1].split("<script")[0]
    assert "sweep of &lt;x&gt;" in html and "&lt;b&gt;" in html
    assert f"background:{colour(2.0, 2.0, 3.5)}" in html and f"background:{colour(3.5, 2.0, 3.5)}" in html
    assert colour(1.0, 1.0, 1.0) == colour(0.0, 0.0, 5.0) == "#4fd1a1" and colour(5.0, 0.0, 5.0) == "#d9480f"


def test_png_where_matplotlib_is(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("matplotlib")
    assert draw_png(tmp_path / "a.png", "t", CELLS)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert not draw_png(tmp_path / "b.png", "t", CELLS) and not (tmp_path / "b.png").exists()
