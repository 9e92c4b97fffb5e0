"""Results of a run's checkpoints as curves over the tokens they were trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hlat.evaluate.results import html_notes, html_table, notes, table
from hlat.evaluate.running import numbers
from hlat.observe.chart import Chart, Series, draw, hover_data
from hlat.observe.markup import escape
from hlat.observe.page import page

if TYPE_CHECKING:
    from hlat.evaluate.target import Target

Found = Sequence[tuple["Target", dict[str, Any]]]


def as_rows(found: Found, shown: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One object for each checkpoint: `step`, `tokens`, and its results in the harness's schema."""
    return [
        {"step": target.step, "tokens": target.tokens, **results}
        for (target, _), results in zip(found, shown, strict=True)
    ]


def render(found: Found) -> str:
    """An HTML document with a chart for each task and metric, and the last checkpoint's table."""
    charts = _charts(found)
    figures = "\n".join(
        f"<figure><figcaption><b>{escape(chart.title)}</b>"
        f'<span class="note">{escape(chart.note)}</span></figcaption>{draw(chart)}</figure>'
        for chart in charts
    )
    last, results = found[-1]
    title = f"{last.name}: {len(found)} checkpoints"
    body = (
        f"<header><h1>{escape(title)}</h1></header><div class='charts'>{figures}</div>"
        f"<h2>Last checkpoint</h2>{html_table(table(results))}{html_notes(all_notes(found))}"
    )
    return page(title, body, {chart.key: data for chart in charts if (data := hover_data(chart))})


def all_notes(found: Found) -> list[str]:
    """What was cut or left out, one line each; what does not hold for every checkpoint with its steps."""
    steps: dict[str, list[str]] = {}
    for target, results in found:
        for line in notes(results):
            steps.setdefault(line, []).append(f"{target.step:,}")
    return [line if len(of) == len(found) else f"{line} (step {', '.join(of)})" for line, of in steps.items()]


def _charts(found: Found) -> list[Chart]:
    tokens = np.array([target.tokens for target, _ in found], dtype=np.float64)
    per_target = [numbers(results) for _, results in found]
    chance = found[-1][1]["hlat"]["chance"]
    charts = []
    for task, metrics in per_target[-1].items():
        for metric in metrics:
            values = [known.get(task, {}).get(metric, (None, None)) for known in per_target]
            y = np.array([np.nan if value is None else value for value, _ in values])
            series = [Series(metric, 0, tokens, y, dots=True)]
            level = chance.get(task, {}).get(metric)
            if level is not None and len(found) > 1 and metric != "bits_per_byte":
                ends = tokens[[0, -1]]
                series.append(Series("chance", 7, ends, np.array([level, level])))
            error = values[-1][1]
            last = f"{y[-1]:.4f}" if np.isfinite(y[-1]) else "no figure"
            note = f"last: {last}" + (f" ± {error:.4f}" if error is not None else "")
            key = f"{task}-{metric}".replace(" ", "-")
            charts.append(Chart(key, f"{task}: {metric}", "tokens", series, note))
    return charts
