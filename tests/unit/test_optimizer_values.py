"""What an optimizer says of itself: in metrics, on the console, in the report."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console as RichConsole

from hlat.observe.console import draw, optimizer_values, step_line
from hlat.observe.progress import Progress
from hlat.observe.report import make_charts, render
from hlat.observe.runs import load_runs
from hlat.optim.mada_step import COEFFICIENTS
from hlat.train.step import train_step

ROW = {"kind": "train", "step": 3, "loss": 2.0, "grad_norm": 1.0, "lr": 1e-3, "tokens": 30}
LEARNED = {"optim/beta1": 0.91234, "optim/rho": 0.5}


def test_a_step_reports_the_learned_coefficients(tiny_run) -> None:
    run = tiny_run("optim={name: mada, lr: 1e-3, hyper_start: 1, learn: [beta1, rho], rho: 0.5}")
    values = [train_step(run) for _ in range(4)]
    assert [key for key in values[0] if key.startswith("optim/")] == ["optim/beta1", "optim/rho"]
    assert float(values[0]["optim/beta1"]) == pytest.approx(0.9)
    assert float(values[3]["optim/rho"]) != 0.5
    assert not any(key.startswith("optim/") for key in train_step(tiny_run()))


def test_all_six_by_default(tiny_run) -> None:
    values = train_step(tiny_run("optim.name=mada"))
    assert [key for key in values if key.startswith("optim/")] == [f"optim/{n}" for n in COEFFICIENTS]


def test_console_shows_them() -> None:
    state = Progress(10)
    state.train({**ROW, **LEARNED})
    assert optimizer_values(state.last) == "beta1 0.912  rho 0.500"
    assert "beta1 0.912  rho 0.500" in step_line(state)
    file = io.StringIO()
    RichConsole(file=file, width=100).print(draw(state, 2.0, 100))
    assert "optimizer beta1 0.912  rho 0.500" in file.getvalue()
    state.train(ROW)
    assert "beta1" not in step_line(state) and optimizer_values(ROW) == ""


def test_report_draws_them_for_the_runs_that_have_them(tmp_path: Path) -> None:
    for name, extra in (("plain", {}), ("learning", LEARNED)):
        (tmp_path / name).mkdir()
        learned = [{name: value + 1e-4 * step for name, value in extra.items()} for step in range(30)]
        rows = [{**ROW, "step": step, "tokens": 10 * step, **learned[step]} for step in range(1, 30)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = load_runs([tmp_path / "plain", tmp_path / "learning"])
    charts = make_charts(runs)
    assert [chart.title for chart in charts[5:]] == ["Optimizer: beta1", "Optimizer: rho"]
    assert [len(series.x) for series in charts[5].series] == [0, 29]
    assert charts[6].series[1].y[0] == pytest.approx(0.5001)
    assert 'data-chart="optim-beta1"' in render(runs)
    assert len(make_charts(runs[:1])) == 5
