"""The report: one self-contained, well-formed file with every run, however long and whatever its name."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import time
from datetime import datetime
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hlat.commands import report as command
from hlat.errors import UserError
from hlat.observe import chart
from hlat.observe.report import make_charts, render, summary_table
from hlat.observe.runfolder import RunFolder
from hlat.observe.runs import Table, differences, flatten, load_runs, smooth

VOID = {"meta", "line", "rect", "circle", "polyline"}


class Balanced(HTMLParser):
    """Fails when an element is closed that is not the open one."""

    def __init__(self):
        super().__init__()
        self.open, self.texts, self.tags = [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


def parse(html):
    parser = Balanced()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    return parser


def make_run(path, steps=60, batch=4096, lr=1e-3, planned=None, evals=True):
    resolved = f"run:\n  name: x\n  steps: {planned or steps}\noptim:\n  lr: {lr}\n  name: adamw\n"
    facts = {"host": "node-1", "versions": {"torch": "2.13.0"}, "variables": {"OMP_NUM_THREADS": "2"}}
    RunFolder(path).start("", resolved, description=facts).close()
    lines = []
    for step in range(1, steps + 1):
        loss = 9.0 * step**-0.3
        row = {
            "kind": "train", "step": step, "loss": None if step == 7 else loss,
            "grad_norm": 1.0 + 1 / step, "lr": lr,
            "tokens": step * batch, "tokens_per_second": 1000.0, "mfu": 0.5, "step_seconds": batch / 1000.0,
            "skipped": step == 7,
        }  # fmt: skip
        lines.append(json.dumps(row))
        if evals and step % 20 == 0:
            lines.append(json.dumps({"kind": "eval", "step": step, "loss": loss, "bits_per_byte": loss / 2}))
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return path


def test_report_of_one_run(tmp_path):
    html = render(load_runs([make_run(tmp_path / "alone", planned=100)]), datetime(2026, 11, 23, 10, 0))
    page = parse(html)
    shown = " ".join(page.texts)
    for part in (
        "alone",
        "2026-11-23 10:00",
        "60 of 100",
        "node-1",
        "OMP_NUM_THREADS",
        "2.13.0",
        "optim.lr: 0.001",
    ):
        assert part in shown
    assert sum(tag == "svg" for tag, _ in page.tags) == 5
    assert html.count('class="line s0"') == 5


def test_report_needs_nothing_else(tmp_path):
    html = render(load_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b")]))
    assert not re.search(r"(src|href|@import|url\()\s*=?\s*[\"']?(?!#)", html.replace("url(#", "clip(#"))
    assert "http" not in html.replace("http://www.w3.org/2000/svg", "")


def test_several_runs_are_overlaid_with_their_differences(tmp_path):
    paths = [make_run(tmp_path / name, lr=lr) for name, lr in (("a", 1e-3), ("b", 2e-3), ("c", 1e-3))]
    html = render(load_runs(paths))
    page = parse(html)
    for index in range(3):
        assert html.count(f'class="line s{index}"') == 5
    buttons = [attributes["data-colour"] for tag, attributes in page.tags if tag == "button"]
    assert buttons == ["0", "1", "2"]
    assert "<tr><th>optim.lr</th><td>0.001</td><td>0.002</td><td>0.001</td></tr>" in html
    assert "<th>optim.name</th>" not in html


def test_names_are_escaped_everywhere(tmp_path):
    name = "<img src=x onerror=alert(1)></script><b>&\"'"
    first, second = load_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b")])
    html = render([first, dataclasses.replace(second, name=name)])
    page = parse(html)
    assert not any(tag in ("img", "b") and "onerror" in str(attributes) for tag, attributes in page.tags)
    assert not any(tag == "img" for tag, _ in page.tags)
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', html).group(1)
    assert json.loads(data)["loss"]["series"][1]["name"] == name


def test_runs_with_other_batch_sizes_are_drawn_over_tokens(tmp_path):
    runs = load_runs([make_run(tmp_path / "a"), make_run(tmp_path / "b", batch=8192)])
    charts = make_charts(runs)
    assert {item.x_title for item in charts} == {"tokens"}
    held_out = charts[1].series[1]
    assert held_out.x.tolist() == [20 * 8192, 40 * 8192, 60 * 8192]
    assert {item.x_title for item in make_charts(runs[:1])} == {"step"}


def make_method_run(path, name, queries, peak):
    """A run whose rows say what the method did, `queries` a step."""
    make_run(path, steps=40)
    file = path / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    own = {"memory/persistent_bytes": 2_000_000, "memory/peak_bytes": peak}
    extra = [r | own | {"method/queries": queries * r["step"]} if r["kind"] == "train" else r for r in rows]
    file.write_text("".join(json.dumps(row) + "\n" for row in extra))
    (path / "resolved.yaml").write_text(f"method: {{name: {name}}}\n")


def test_methods_by_memory_and_over_queries(tmp_path):
    make_method_run(tmp_path / "a", "mezo", 64, 5_000_000)
    make_method_run(tmp_path / "b", "mezo_svrg", 1000, 7_000_000)
    runs = load_runs([tmp_path / "a", tmp_path / "b"])
    table = summary_table(runs)
    assert table["method"] == ["mezo", "mezo_svrg"] and table["queries"] == ["2.56k", "40k"]
    assert table["persistent memory"] == ["2.0 MB", "2.0 MB"]
    assert table["peak memory"] == ["5.0 MB", "7.0 MB"]
    loss = make_charts(runs, "queries")[0]
    assert loss.x_title == "queries" and loss.x_range == (0.0, 40_000.0)
    assert [series.x[-1] for series in loss.series] == [2560.0, 40_000.0]
    parse(render(runs, x="queries"))
    make_run(tmp_path / "old")
    with pytest.raises(UserError, match="--x queries: .*old.*no 'method/queries'"):
        render(load_runs([tmp_path / "a", tmp_path / "old"]), x="queries")
    assert "peak memory" not in summary_table(load_runs([tmp_path / "old"]))


def test_held_out_curves_follow_the_x_axis(tmp_path):
    make_method_run(tmp_path / "a", "mezo", 64, 5_000_000)
    (run,) = load_runs([tmp_path / "a"])
    for x, factor in (("step", 1), ("tokens", run.tokens_per_step), ("queries", 64)):
        held_out = next(chart for chart in make_charts([run], x) if chart.key == "held-out")
        assert held_out.series[0].x.tolist() == [20 * factor, 40 * factor]


def test_summary_numbers(tmp_path):
    (run,) = load_runs([make_run(tmp_path / "a")])
    assert summary_table([run]) == {
        "steps": ["60"],
        "tokens": ["246k"],
        "training loss": [f"{np.mean([9.0 * step**-0.3 for step in range(56, 61)]):.4f}"],
        "held-out bits/byte": [f"{9.0 * 60**-0.3 / 2:.4f}"],
        "tokens per second": ["1,000"],
        "MFU": ["50.0 %"],
        "time in steps": ["4:06"],
        "skipped steps": ["1"],
    }


def test_a_run_of_100_000_steps_is_small_and_quick(tmp_path):
    path = make_run(tmp_path / "long", steps=100_000)
    start = time.perf_counter()
    html = render(load_runs([path]))
    assert time.perf_counter() - start < 8.0
    assert len(html) < 300_000


def test_a_run_without_evaluations_or_extras(tmp_path):
    path = tmp_path / "bare"
    path.mkdir()
    (path / "metrics.jsonl").write_text('{"kind":"train","step":1,"loss":2.0}\n{"kind":"tr')
    html = render(load_runs([path]))
    parse(html)
    assert "no values in these runs" in html
    assert "no environment.json" in html
    assert "no resolved.yaml" in html


def test_a_repeated_step_counts_as_it_went_last(tmp_path):
    path = tmp_path / "a"
    path.mkdir()
    rows = [(1, 5.0), (2, 4.0), (3, 9.0), (2, 3.0), (3, 2.0)]
    (path / "metrics.jsonl").write_text(
        "".join(json.dumps({"kind": "train", "step": step, "loss": loss}) + "\n" for step, loss in rows)
    )
    (run,) = load_runs([path])
    assert run.train["loss"].tolist() == [5.0, 3.0, 2.0]


@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.dictionaries(st.sampled_from("abc"), st.none() | st.floats(-9, 9))),
        min_size=1,
    )
)
@settings(max_examples=40, deadline=None)
def test_columns_are_the_rows(steps):
    table, plain = Table("step", "a"), {}
    for step, values in steps:
        plain[step] = {"kind": "train", "step": step, **values}
        table.add(step, plain[step])
    columns = table.columns()
    assert set(columns) == {"step", "a"}.union(*(values for _, values in steps))
    for name, column in columns.items():
        right = [plain[step].get(name) for step in sorted(plain)]
        np.testing.assert_array_equal(column, [math.nan if value is None else value for value in right])


def test_equal_folder_names_get_their_parents(tmp_path):
    paths = [make_run(tmp_path / parent / "run", steps=3) for parent in ("x", "y")]
    assert [run.name for run in load_runs(paths)] == ["x/run", "y/run"]
    names = [run.name for run in load_runs([paths[0], paths[0]])]
    assert len(set(names)) == 2


def invoke(*arguments):
    parser = argparse.ArgumentParser()
    command.configure(parser)
    return command.main(parser.parse_args([str(argument) for argument in arguments]))


def test_command_writes_the_file(tmp_path, capsys):
    run = make_run(tmp_path / "a")
    assert invoke(run, "--out", tmp_path / "r.html") == 0
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'r.html'}: 1 run, ")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda path: None, "no such run folder"),
        (lambda path: path.mkdir(), "no metrics.jsonl"),
        (lambda path: (path.mkdir(), (path / "metrics.jsonl").write_text("")), "no training step"),
        (lambda path: (make_run(path), (path / "resolved.yaml").write_text("a: [")), "resolved recipe"),
    ],
)
def test_a_run_that_cannot_be_reported_is_a_user_error(tmp_path, prepare, message):
    prepare(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        invoke(tmp_path / "run", "--out", tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_an_output_that_cannot_be_written_is_a_user_error(tmp_path):
    run = make_run(tmp_path / "a")
    with pytest.raises(UserError, match="there is no folder .*none; create it"):
        invoke(run, "--out", tmp_path / "none" / "r.html")
    with pytest.raises(UserError, match="is a folder"):
        invoke(run, "--out", tmp_path)


def test_envelope_keeps_every_spike():
    y = np.ones(100_000)
    y[[777, 50_001]] = 9.0, -9.0
    x_less, y_less = chart.envelope(np.arange(100_000.0), y, points=400)
    assert len(x_less) <= 400
    assert {9.0, -9.0} <= set(y_less.tolist())
    assert (np.diff(x_less) > 0).all()


def test_decimate_keeps_both_ends_and_drops_gaps():
    x = np.arange(10_000.0)
    y = np.where(x % 2 == 0, np.nan, x)
    x_less, y_less = chart.decimate(x, y, points=100)
    assert len(x_less) == 100
    assert (x_less[0], x_less[-1]) == (1.0, 9_999.0)
    assert np.isfinite(y_less).all()


def test_smooth_keeps_a_straight_line_and_passes_over_gaps():
    values = np.arange(200.0)
    assert np.allclose(smooth(values, 21)[:190], values[:190])
    values[50] = np.nan
    assert abs(smooth(values, 21)[50] - 50) < 1e-9
    assert np.isnan(smooth(np.array([np.nan, np.nan]), 5)).all()


def test_ticks_are_round_and_inside():
    assert chart.nice_ticks(0, 3000) == [0, 1000, 2000, 3000]
    assert chart.nice_ticks(0, 3e-4) == [0, 0.0001, 0.0002, 0.0003]
    assert chart.Scale(1.5, 80.0, 0, 1, log=True).ticks() == [3.0, 10.0, 30.0]
    assert [chart.tick_label(tick, [2e-4, 4e-4]) for tick in (2e-4, 0)] == ["2e-4", "0"]
    assert chart.tick_label(20_000, [20_000]) == "20k"


def test_recipe_helpers():
    assert flatten({"a": {"b": 1, "c": [1]}, "d": None}) == {"a.b": 1, "a.c": [1], "d": None}
    assert differences([{"a": 1, "b": 2}, {"a": 1, "c": 3}]) == {"b": [2, None], "c": [None, 3]}


def test_uploads_and_failed_saves_are_counted(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    rows = [
        {"what": "upload", "seconds": 2.0, "bytes": 4_000_000, "error": None},
        {"what": "upload", "seconds": 9.0, "bytes": 0, "error": "writing s3://x: planted"},
        {"what": "upload", "seconds": 0.0, "bytes": 0, "error": "skipped: step 9 is newer"},
        {"what": "save", "seconds": 0.1, "bytes": 0, "error": "the disk is full"},
        {"what": "delete", "seconds": 0.1, "bytes": 5, "error": None},
    ]
    with open(tmp_path / "a" / "metrics.jsonl", "a") as file:
        for row in rows:
            file.write(json.dumps({"kind": "storage", "step": 5, **row}) + "\n")
    figures = summary_table(load_runs([tmp_path / "a", tmp_path / "b"]))
    uploads = "1 uploaded at 2.0 MB/s, 1 attempts failed, 1 skipped"
    assert figures["checkpoints in the store"] == [uploads, "-"] and figures["failed saves"] == ["1", "0"]
    parse(render(load_runs([tmp_path / "a"])))
    assert "failed saves" not in summary_table(load_runs([tmp_path / "b"]))


def test_attempts_and_goodput_of_supervised_jobs(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b")
    folder = tmp_path / "a" / "logs" / "supervisor"
    folder.mkdir(parents=True)
    finish = {"event": "finish", "node": 0, "attempts": 3, "wall": 100.0, "seconds": {"stepping": 50.0}}
    other = {**finish, "node": 1}  # another machine's own account of the same job
    last = {**finish, "attempts": 1, "wall": 300.0, "seconds": {"stepping": 290.0}}
    events = [{"event": "start"}, finish, other, last]
    (folder / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    figures = summary_table(load_runs([tmp_path / "a", tmp_path / "b"]))
    assert figures["supervised"] == ["4 attempts in 2 jobs, goodput 85.0 %", "-"]
    assert "supervised" not in summary_table(load_runs([tmp_path / "b"]))
