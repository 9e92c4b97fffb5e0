"""The sweep: which runs a grid means, resuming, tables and heat maps; two real runs."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hlat import cli
from hlat.commands import sweep
from hlat.errors import UserError
from hlat.observe import heartbeat
from hlat.observe.sweep import Cell, Result, colour, draw_png, heat_maps, render, result_of, table
from hlat.recipe import load
from hlat.supervise import processes
from hlat.supervise.child import Children

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
        (["optim.name=mada", "optim.beta2=[0.95, 0.999]"], 1, r"beta2 must lie in \[0.501, 0.99\]"),
        (["optim.name=[adamw, muon]", "parallel.tp=2"], 1, "'muon' needs whole matrices"),
        (["optim.lr=[1e-3, 0.001]"], 1, r"optim.lr=0.001 stands there twice"),
        (["optim.lr=[1, 1.0]"], 1, r"optim.lr=1.0 stands there twice"),
        (["optim.lr=[1e-3]", "optim.lr=[2e-3]"], 1, "optim.lr is given twice"),
        (["optim.lr=2e-3", "optim.lr=[1e-3]"], 1, "optim.lr is given twice"),
    ],
)
def test_mistakes_show_before_anything_runs(recipe, tmp_path, grid, seeds, message) -> None:
    with pytest.raises(UserError, match=message):
        sweep.plan(recipe, grid, seeds, tmp_path)


def test_a_layout_of_several_processes_is_not_run_here(recipe: str, tmp_path: Path, capsys) -> None:
    words = ["sweep", recipe, "optim.lr=[1e-3, 2e-3]", "parallel.tp=2", "--out", str(tmp_path / "o")]
    assert cli.main(words) == 2 and "does not fit 1 process" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
    assert cli.main([*words, "--list"]) == 0  # `hlat launch` can


@pytest.mark.parametrize(
    "order", [*itertools.permutations(["optim.name=[mada]", "optim.beta1=[0.5, 0.9]", "optim.rho=0"])]
)
def test_any_order_of_the_arguments(recipe: str, tmp_path: Path, order: tuple[str, ...]) -> None:
    trials, _ = sweep.plan(recipe, order, 1, tmp_path)
    made = [trial.recipe.optim for trial in trials]
    assert [(optim.name, optim.options["beta1"], optim.options["rho"]) for optim in made] == [
        ("mada", 0.5, 0),
        ("mada", 0.9, 0),
    ]


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
    assert "held-out loss" in first
    trials, _ = sweep.plan(recipe, words[2:3], 1, out)
    sweep.look_at_contents(trials)
    results = [sweep.result(trial) for trial in trials]
    assert all(found and 4 < found.loss < 7 and found.kind == "held-out" for found in results)
    shown = f"{results[0].loss:.4f}"  # type: ignore[union-attr]

    assert cli.main(words) == 0
    again = capsys.readouterr().out
    assert "] name-" not in again and shown in again

    shutil.rmtree(folders[0])
    assert cli.main(words) == 0
    assert capsys.readouterr().out.count("] name-") == 1

    # Another recipe is not the same sweep.
    assert cli.main([*words[:3], "data.micro_batch=1", "data.global_batch=4", *words[3:]]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "2 of 2 runs there are of something else than asked for" in said.err
    assert "data.global_batch was 2 and is 4" in said.err


def test_runs_that_are_not_sound(recipe: str, tmp_path: Path, capsys) -> None:
    out = tmp_path / "runs"
    guards = "guard=[{name: none}, {name: skip, patience: 3}]"
    words = ["sweep", recipe, guards, "optim.lr=1e30", "run.steps=6", "--out", str(out)]
    assert cli.main(words) == 0
    first = capsys.readouterr().out
    assert "failed" not in first and first.count("] guard-") == 2
    for what in ("1 diverged", "1 stopped by its guard", "83.3 %"):
        assert what in first
    (log,) = out.glob("guard-*none*.log")
    assert "none: the model's logits are not finite" in log.read_text()
    assert cli.main(words) == 0
    assert "] guard-" not in capsys.readouterr().out  # nothing would be different


def start(recipe: str, out: Path) -> subprocess.Popen[str]:
    """A sweep of one run, once that trains."""
    words = ["sweep", recipe, "optim.lr=[1e-3]", "run.steps=600", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "hlat", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 60
    while not any(path.stat().st_size for path in out.glob("*/metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    return process


def ended(pid: int) -> bool:
    """Whether a process ends within some seconds."""
    end = time.monotonic() + 20
    while (found := processes.look(pid)) is not None and found.state not in "ZX":
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_sigterm_reaches_the_run_and_the_sweep_continues(recipe: str, tmp_path: Path) -> None:
    out = tmp_path / "o"
    process = start(recipe, out)
    (child,) = processes.descendants(process.pid)
    process.terminate()
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143 and "stopped by SIGTERM; the same command continues" in said
    assert ended(child.pid)
    (log,) = out.glob("*.log")
    assert "stopped by signal 15 after step" in log.read_text()
    assert list(out.glob("*/checkpoints/step-*"))
    assert cli.main(["sweep", recipe, "optim.lr=[1e-3]", "run.steps=600", "--out", str(out)]) == 0
    assert "resume" in log.read_text()


SIGNALLED = """
import os, signal, time
said = []
for number in (signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
    signal.signal(number, lambda number, _: said.append(number))
os.kill(os.getppid(), NUMBER)  # what a cluster or a person sends to the sweep
while not said:
    time.sleep(0.01)
print("got", *said)
raise SystemExit(128 + said[0])
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGINT, signal.SIGHUP])
def test_other_signals_reach_the_run(recipe: str, tmp_path: Path, monkeypatch, capsys, number) -> None:
    (tmp_path / "hlat.py").write_text(SIGNALLED.replace("NUMBER", str(int(number))))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hlat.supervise.child.module", lambda *words: [sys.executable, "hlat.py", *words])
    former = signal.getsignal(number)
    assert cli.main(["sweep", recipe, "optim.lr=[1e-3, 2e-3]", "--out", "o"]) == 128 + number
    said = capsys.readouterr()
    assert said.out.count("] lr-") == 1 and f"stopped by {number.name}" in said.err
    (log,) = Path("o").glob("*.log")
    assert log.read_text() == f"got {int(number)}\n"
    assert signal.getsignal(number) == former


@pytest.mark.parametrize("status", [138, 143])  # the end of the job's time, a spot notice
def test_a_run_that_was_told_alone_ends_the_sweep(
    recipe: str, tmp_path: Path, monkeypatch, capsys, status
) -> None:
    (tmp_path / "hlat.py").write_text(f"raise SystemExit({status})")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hlat.supervise.child.module", lambda *words: [sys.executable, "hlat.py", *words])
    assert cli.main(["sweep", recipe, "optim.lr=[1e-3, 2e-3]", "--out", "o"]) == status
    said = capsys.readouterr()
    assert said.out.count("] lr-") == 1 and "the same command continues" in said.err
    assert not Path("o/sweep.html").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="needs the kernel's word that a parent has gone")
def test_a_run_ends_with_its_sweep(recipe: str, tmp_path: Path) -> None:
    process = start(recipe, tmp_path / "o")
    (child,) = processes.descendants(process.pid)
    process.kill()
    process.communicate(timeout=60)
    assert ended(child.pid)
    (log,) = (tmp_path / "o").glob("*.log")
    assert "stopped by signal 15 after step" in log.read_text()


def test_a_run_whose_sweep_has_gone_does_not_start(monkeypatch) -> None:
    sent: list[int] = []
    monkeypatch.setattr(heartbeat, "die_with_parent", lambda number: None)
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append(number))
    environ = {heartbeat.PARENT: str(os.getppid())}
    heartbeat.prepare(environ)
    assert sent == [] and environ == {}  # what the run itself starts is not the sweep's
    heartbeat.prepare({heartbeat.PARENT: str(os.getpid())})
    assert sent == [signal.SIGTERM]


def test_the_reason_is_the_runs_own(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "says.py").write_text(
        "import sys; print('hlat: error: mine'); print('warning: more'); sys.exit(2)"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    log = tmp_path / "a.log"
    log.write_text("hlat: error: of an earlier run\n")
    code, said = Children().run(["says"], log)
    assert (code, sweep.reason(code, said)) == (2, "mine") and "earlier" not in said
    text = "Traceback (most recent call last):\n  File \"a.py\", line 1\nKeyError: 'x'\nstep 2,470"
    assert "KeyError: 'x'" in sweep.reason(1, text)


def rows(losses: list[float | None], skipped: set[int] = frozenset()) -> list[dict]:  # type: ignore[assignment]
    return [
        {"kind": "train", "step": step, "loss": loss, "skipped": step in skipped}
        for step, loss in enumerate(losses, 1)
    ]


def test_what_metrics_say() -> None:
    twenty = [9.0] * 18 + [2.0, 3.0]
    assert result_of(rows(twenty), 20) == Result(2.5, "training")
    held_out = {"kind": "eval", "step": 20, "loss": 4.0}
    assert result_of([*rows(twenty), {**held_out, "step": 10}], 20) == Result(2.5, "training")
    assert result_of([*rows(twenty, {1, 2}), held_out], 20) == Result(4.0, "held-out", 0.1)
    assert result_of([*rows(twenty), {**held_out, "loss": None}], 20).fault == "diverged"
    assert result_of(rows([*twenty[:-1], None]), 20).fault == "diverged"
    assert result_of(rows([*twenty[:-1], None], {20}), 20) == Result(2.0, "training", 0.05)
    stop = {"kind": "anomaly", "step": 3, "policy": "stop"}
    assert result_of([*rows([1.0, None, None], {2, 3}), stop], 20).fault == "stopped by its guard"
    assert (
        result_of([*rows([1.0] * 6, {2, 3, 4, 5}), {**held_out, "step": 6}], 6).fault == "skipped most steps"
    )


def runs(*losses: float | None, kind: str = "held-out", skipped: float = 0.0) -> list[Result | None]:
    return [None if loss is None else Result(loss, kind, skipped) for loss in losses]


CELLS = [
    Cell({"optim.lr": lr, "optim.name": name, "optim.eps": eps}, runs(lr * 100 + eps, 2.0, None))
    for lr in (0.01, 0.03)
    for name in ("a", "<b>")
    for eps in (1.0, 2.0)
]


def test_table_puts_the_best_first() -> None:
    head, lines = table([*CELLS, Cell({"optim.lr": 1, "optim.name": "c", "optim.eps": 1}, [None])])
    assert head[:4] == ["optim.lr", "optim.name", "optim.eps", "held-out loss"]
    assert lines[0] == ["0.01", "a", "1", "2.0000", "0.0000", "2.0000", "2/3"]
    assert lines[-1] == ["1", "c", "1", "-", "-", "-", "0/1"]
    assert [line[3] for line in lines[:-1]] == sorted(line[3] for line in lines[:-1])


def test_table_of_runs_that_are_not_sound() -> None:
    cells = [
        Cell({"a": 1}, runs(1.0, math.nan)),
        Cell({"a": 2}, runs(0.5, skipped=5 / 6)),
        Cell({"a": 3}, runs(3.0, 4.0)),
    ]
    head, lines = table(cells)
    assert head == [
        "a",
        "held-out loss",
        "± over seeds",
        "worst seed",
        "seeds",
        "skipped steps",
        "left out",
    ]
    assert lines == [
        ["3", "3.5000", "0.7071", "4.0000", "2/2", "0.0 %", ""],
        ["1", "1.0000", "-", "1.0000", "1/2", "0.0 %", "1 diverged"],
        ["2", "-", "-", "-", "0/1", "83.3 %", "1 skipped most steps"],
    ]


def test_the_loss_is_called_what_it_is() -> None:
    cells = [Cell({"a": a}, runs(1.0 + a, kind="training")) for a in (1, 2)]
    assert table(cells)[0][1] == "training loss"
    html = render("t", cells)
    assert "<h2>Mean training loss</h2>" in html and "held-out" not in html
    head, lines = table([*cells, Cell({"a": 3}, runs(1.0))])
    assert head[1] == "loss" and head[-1] == "loss is"
    assert [line[-1] for line in lines] == ["held-out", "training", "training"]


def test_heat_maps_over_the_last_two_keys() -> None:
    maps = heat_maps(CELLS)
    assert [item.title for item in maps] == ["optim.lr=0.01", "optim.lr=0.03"]
    assert (maps[0].row_key, maps[0].column_key) == ("optim.name", "optim.eps")
    assert maps[1].losses == [[3.0, 3.5], [3.0, 3.5]]
    (line,) = heat_maps([Cell({"optim.lr": lr, "run.steps": 3}, runs(lr)) for lr in (1.0, 2.0)])
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
