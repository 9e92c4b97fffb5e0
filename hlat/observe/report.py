"""One HTML file about one run or several: summary, curves, recipe differences, environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np

import hlat
from hlat.errors import UserError
from hlat.observe.chart import COLOURS, Chart, Series, decimate, draw, envelope, hover_data
from hlat.observe.markup import escape
from hlat.observe.page import by_key, page, plain
from hlat.observe.redact import redact
from hlat.observe.runs import Array, Run, differences, flatten, smooth
from hlat.observe.skipped import skipped_lines
from hlat.observe.standing import standing_notes, standing_table
from hlat.observe.summary import EMPTY, held_out_figures, last, span, summary_table
from hlat.observe.text import anomaly_text

_FIELDS = {"queries": "method/queries"}  # x axes whose name is not their field's
_RUNS_ACROSS = 6  # more of them would not fit beside each other


def render(runs: Sequence[Run], made: datetime | None = None, x: str = "auto") -> str:
    """The report as a complete HTML document that needs nothing else: no network, no other file.

    Args:
        runs: loaded by `runs.load_runs`; drawn over each other, in this order.
        made: the time printed in its head (default: now).
        x: what curves are drawn over: auto, step, tokens or queries.

    Raises UserError when a run does not say how many queries it made.
    """
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs: {', '.join(run.name for run in runs)}"
    when = (made or datetime.now()).strftime("%Y-%m-%d %H:%M")
    charts = make_charts(runs, x)
    figures = "\n".join(
        f"<figure><figcaption><b>{escape(chart.title)}</b>"
        f'<span class="note">{escape(chart.note)}</span></figcaption>{draw(chart)}</figure>'
        for chart in charts
    )
    body = "\n".join(
        [
            f"<header><h1>{escape(title)}</h1>",
            f"<p>training report, {when}, hlat {hlat.__version__}</p></header>",
            _legend(runs),
            _summary(runs),
            f'<div class="charts">{figures}</div>',
            _still_note(runs),
            _anomalies(runs),
            _standing(runs),
            _recipes(runs),
            _environment(runs),
        ]
    )
    return page(title, body, {chart.key: data for chart in charts if (data := hover_data(chart))})


def make_charts(runs: Sequence[Run], x: str = "auto") -> list[Chart]:
    """The plots of every run, one for each figure of a task (`<task>/<metric>`), and one for each value an
    optimizer logs (`optim/…`). The x axis counts what `x` says; auto: steps, or tokens when the runs' steps
    are not equally large.
    """
    x_title = _x_axis(runs) if x == "auto" else x
    field = _FIELDS.get(x_title, x_title)
    for run in runs:
        if field not in run.train:
            what = f"its metrics have no {field!r}: it was trained by an older version"
            raise UserError(what, where=f"--x {x}: {run.path}", fix="write --x step")

    loss = [_noisy(run, index, field, "loss") for index, run in enumerate(runs)]
    speed = [_noisy(run, index, field, "tokens_per_second") for index, run in enumerate(runs)]
    norms = [_noisy(run, index, field, "grad_norm", positive=True) for index, run in enumerate(runs)]
    rates = [_clean(run, index, run.train[field], run.train.get("lr")) for index, run in enumerate(runs)]
    learned = dict.fromkeys(name for run in runs for name in run.train if name.startswith("optim/"))
    still = standing_still(runs)
    loss_log, norm_log = _spans(loss, 3), _spans(norms, 20)
    furthest = [last(run.train[field]) for run in runs]
    x_range = (0.0, max(x for x in furthest if x is not None))  # one for all: their pointers move together
    return [
        Chart("loss", "Training loss", x_title, loss, _note(loss_log), log=loss_log, x_range=x_range),
        *_evaluation_charts(runs, x_title, field, x_range),
        Chart("speed", "Tokens per second", x_title, speed, _note(False), zero=True, x_range=x_range),
        Chart("norm", "Gradient norm", x_title, norms, _note(norm_log), log=norm_log, x_range=x_range),
        Chart("lr", "Learning rate", x_title, rates, zero=True, x_range=x_range),
        *(
            Chart(
                name.replace("/", "-"),
                f"Optimizer: {name.removeprefix('optim/')}",
                x_title,
                [_clean(run, i, run.train[field], run.train.get(name)) for i, run in enumerate(runs)],
                x_range=x_range,
            )
            for name in learned
            if name not in still
        ),
    ]


def standing_still(runs: Sequence[Run]) -> list[str]:
    """The values of optimizers (`optim/…`) that are the same at every step of every run: no curve tells
    more of them than a line of text.
    """
    names = dict.fromkeys(name for run in runs for name in run.train if name.startswith("optim/"))
    logged = {name: [run.train[name] for run in runs if name in run.train] for name in names}
    return [name for name, all_of in logged.items() if all(np.nanmin(v) == np.nanmax(v) for v in all_of)]


def _still_note(runs: Sequence[Run]) -> str:
    names = standing_still(runs)
    if not names:
        return ""
    starts = {run.name: run.recipe["optim.hyper_start"] for run in runs if "optim.hyper_start" in run.recipe}
    why = "; ".join(
        f"{name} lets them move after hyper_start = {plain(n)} updates" for name, n in starts.items()
    )
    listed = ", ".join(name.removeprefix("optim/") for name in names)
    text = f"Not drawn, as they never changed: {listed}" + (f" ({why})" if why else "")
    return f'<p class="note below">{escape(text)}.</p>'


def _evaluation_charts(
    runs: Sequence[Run], x_title: str, field: str, x_range: tuple[float, float]
) -> list[Chart]:
    """A plot of each held-out figure, and of each figure of a task."""

    def dots(name: str, rows: str) -> list[Series]:
        found = [(run, index, getattr(run, rows)) for index, run in enumerate(runs)]
        return [
            _clean(
                run,
                index,
                np.interp(own["step"], run.train["step"], run.train[field]),
                own.get(name),
                dots=True,
            )
            for run, index, own in found
            if "step" in own
        ]

    figures = [(key, f"Held-out {title}", name, "held_out") for key, name, title in held_out_figures(runs)]
    asked = dict.fromkeys(
        name for run in runs for name in run.tasks if "/" in name and not name.endswith("_stderr")
    )
    figures += [(name.replace("/", "-"), f"Task {name.replace('/', ': ')}", name, "tasks") for name in asked]
    return [
        Chart(
            key,
            title,
            x_title,
            dots(name, rows),
            _cut_note(runs) if rows == "tasks" else "",
            x_range=x_range,
        )
        for key, title, name, rows in figures
    ]


def _cut_note(runs: Sequence[Run]) -> str:
    """How many requests of the tasks were longer than the models' contexts."""
    cut = {run.name: last(run.tasks.get("truncated", EMPTY)) for run in runs}
    counts = ", ".join(f"{name} {count:.0f}" for name, count in cut.items() if count)
    return f"requests that lost tokens on the left: {counts}" if counts else ""


def _x_axis(runs: Sequence[Run]) -> str:
    sizes = [run.tokens_per_step for run in runs]
    by_tokens = min(sizes) > 0 and max(sizes) > 1.000001 * min(sizes)  # False where a size is not known
    return "tokens" if by_tokens else "step"


def _noisy(run: Run, index: int, x_name: str, name: str, positive: bool = False) -> Series:
    x, y = run.train[x_name], run.train.get(name, np.full(len(run.train["step"]), np.nan))
    if positive:
        y = np.where(y > 0, y, np.nan)
    return Series(run.name, index % COLOURS, *decimate(x, smooth(y, span(run))), *envelope(x, y))


def _clean(run: Run, index: int, x: Array, y: Array | None, dots: bool = False) -> Series:
    line_x, line_y = (EMPTY, EMPTY) if y is None else decimate(x, y)
    return Series(run.name, index % COLOURS, line_x, line_y, dots=dots and len(line_x) <= 60)


def _spans(series: list[Series], ratio: float) -> bool:
    values = np.concatenate([s.y for s in series]) if series else EMPTY
    return bool(len(values) and values.min() > 0 and values.max() / values.min() > ratio)


def _note(log: bool) -> str:
    return "smoothed; single steps faint" + ("; logarithmic" if log else "")


def _legend(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return ""
    chips = "".join(
        f'<button type="button" aria-pressed="true" data-colour="{index % COLOURS}">'
        f'<i style="--c:var(--s{index % COLOURS})"></i>{escape(run.name)}</button>'
        for index, run in enumerate(runs)
    )
    return f'<nav class="legend" aria-label="runs">{chips}</nav>'


def _summary(runs: Sequence[Run]) -> str:
    figures = summary_table(runs)
    if len(runs) > 1:
        return f"<h2>Summary</h2>{_table(figures, runs)}<h2>Curves</h2>"
    tiles = "".join(
        f'<div class="tile"><b>{escape(values[0])}</b><span>{name}</span></div>'
        for name, values in figures.items()
    )
    return f'<div class="tiles">{tiles}</div>'


def _table(figures: Mapping[str, Sequence[str]], runs: Sequence[Run]) -> str:
    """Runs and figures, the longer list downwards: a window is higher than wide. Of many runs each has a
    line.
    """
    names = [
        f'<i style="--c:var(--s{index % COLOURS})"></i> {escape(run.name)}' for index, run in enumerate(runs)
    ]
    heads, lines = [escape(name) for name in figures], list(zip(*figures.values(), strict=True))
    corner, first, sides = "run", heads, names
    if len(runs) <= min(len(figures), _RUNS_ACROSS):
        corner, first, sides, lines = "", names, heads, [tuple(values) for values in figures.values()]
    head = "".join(f"<th>{name}</th>" for name in (corner, *first))
    body = "".join(
        f"<tr><th>{side}</th>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>"
        for side, line in zip(sides, lines, strict=True)
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="sheet tight">{table}</div>'


def _anomalies(runs: Sequence[Run]) -> str:
    """What the guards did, a line each, after what is to be said of all of it; nothing when they did
    nothing.
    """
    lines = "".join(
        f"<tr><th>{escape(run.name)}</th><td>{escape(line)}</td></tr>"
        for run in runs
        for line in [*skipped_lines(run), *map(anomaly_text, run.anomalies)]
    )
    return (
        f'<h2>Anomalies</h2><div class="sheet"><table><tbody>{lines}</tbody></table></div>' if lines else ""
    )


def _standing(runs: Sequence[Run]) -> str:
    """What the figures stand for, as digests; above it what makes them differ."""
    notes = "".join(f"<p><b>{escape(line)}</b></p>" for line in standing_notes(runs))
    table = standing_table(runs)
    if not notes and not table:
        return ""
    shown = by_key(table, [run.name for run in runs]) if table else ""
    return f"<h2>What the figures stand for</h2>{notes}{shown}"


def _recipes(runs: Sequence[Run]) -> str:
    parts = ["<h2>Recipe</h2>"]
    if len(runs) > 1:
        parts[0] = "<h2>Recipe differences</h2>"
        own = [{k: v for k, v in run.recipe.items() if k not in ("run.name", "run.dir")} for run in runs]
        different = differences(own)
        parts.append(
            by_key(different, [run.name for run in runs])
            if different
            else '<p class="none">The recipes are the same.</p>'
        )
    for run in runs:
        lines = "\n".join(f"{key}: {plain(value)}" for key, value in run.recipe.items())
        shown = (
            f'<pre class="sheet">{escape(redact(lines))}</pre>'
            if lines
            else '<p class="none">no resolved.yaml</p>'
        )
        parts.append(f"<details><summary>Resolved recipe of {escape(run.name)}</summary>{shown}</details>")
    return "\n".join(parts)


def _environment(runs: Sequence[Run]) -> str:
    facts = [_facts(run) for run in runs]
    keys = dict.fromkeys(key for fact in facts for key in fact)
    table = {key: [fact.get(key) for fact in facts] for key in keys}
    shown = (
        by_key(table, [run.name for run in runs])
        if table
        else '<p class="none">no environment.json in these runs</p>'
    )
    return f"<h2>Environment of the last start</h2>{shown}"


def _facts(run: Run) -> dict[str, Any]:
    if not run.starts:
        return {}
    last = {key: value for key, value in run.starts[-1].items() if key not in ("versions", "variables")}
    groups = [flatten(last), *(flatten(run.starts[-1].get(group)) for group in ("versions", "variables"))]
    facts = {"starts": len(run.starts), **{key: value for group in groups for key, value in group.items()}}
    return {key: value for key, value in facts.items() if value not in (None, [], "")}
