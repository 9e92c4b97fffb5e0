"""What pages show beside curves: the summary of several runs, what never moved, what colours stand for."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from hlat.observe.report import make_charts, render
from hlat.observe.runfolder import RunFolder
from hlat.observe.runs import load_runs
from hlat.observe.summary import summary_table
from hlat.observe.sweep import Cell, Result, colour
from hlat.observe.sweep import render as render_sweep
from hlat.optim.adamw import AdamW
from hlat.optim.mada import MADA


def run_folder(path: Path, moves_from: int = 10**9) -> Path:
    """A run of MADA whose beta1 grows after step `moves_from` and whose rho stays."""
    resolved = "run: {name: x, steps: 20}\noptim: {name: mada, lr: 0.001, hyper_start: 50}\n"
    RunFolder(path).start("", resolved, description={}).close()
    rows = [
        {"kind": "train", "step": step, "loss": 2.0, "tokens": 100 * step}
        | {"optim/beta1": 0.9 + 0.001 * max(0, step - moves_from), "optim/rho": 0.9}
        for step in range(1, 21)
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def summary_heads(html: str) -> list[str]:
    """Heads of the columns of the summary."""
    table = html.split("<h2>Summary</h2>")[1].split("</table>")[0]
    return [
        re.sub("<[^>]*>", "", head).strip()
        for head in re.findall("<th>(.*?)</th>", table.split("</thead>")[0])
    ]


@pytest.mark.parametrize("count", [2, 6, 7, 12])
def test_the_longer_list_goes_downwards(tmp_path: Path, count: int) -> None:
    runs = load_runs([run_folder(tmp_path / f"r{n}") for n in range(count)])
    figures = list(summary_table(runs))
    assert len(figures) >= 6
    across = summary_heads(render(runs))
    assert across == (["", *(run.name for run in runs)] if count <= 6 else ["run", *figures])


def test_what_never_moved_is_told_and_not_drawn(tmp_path: Path) -> None:
    still, moving = run_folder(tmp_path / "still"), run_folder(tmp_path / "moving", moves_from=5)
    keys = {chart.key for chart in make_charts(load_runs([still]))}
    assert not keys & {"optim-beta1", "optim-rho"}
    assert "never changed: beta1, rho (still lets them move after hyper_start = 50 updates)" in render(
        load_runs([still])
    )
    both = load_runs([still, moving])
    keys = {chart.key for chart in make_charts(both)}
    assert "optim-beta1" in keys and "optim-rho" not in keys
    assert "never changed: rho" in render(both)


def test_mada_says_when_a_run_ends_before_it_learns() -> None:
    optimizer = MADA([torch.nn.Parameter(torch.zeros(2))], lr=0.1, hyper_start={"beta1": 30, "rho": 20})
    assert optimizer.notes(51) == []
    (line,) = optimizer.notes(50)
    assert line.startswith("beta2, beta3, c, gamma stand still") and "(50)" in line and "has 50" in line
    (line,) = optimizer.notes(25)
    assert line.startswith("beta1, beta2, beta3, c, gamma stand still")
    assert not hasattr(AdamW([torch.nn.Parameter(torch.zeros(2))], lr=0.1), "notes")


def test_a_sweep_says_what_its_colours_stand_for() -> None:
    cells = [Cell({"lr": lr}, [Result(loss)]) for lr, loss in ((1, 2.5), (2, 1.25))]
    html = render_sweep("s", cells)
    scale = html.split('<p class="scale">')[1].split("</p>")[0]
    assert "held-out loss, lower is better: 1.2500" in scale and "2.5000" in scale
    assert scale.index(colour(0, 0, 1)) < scale.index(colour(1, 0, 1)), "green first, as the lowest value is"
    assert "linear-gradient" not in render_sweep("s", cells[:1])
