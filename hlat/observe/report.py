"""One HTML file about one run or several: summary, curves, recipe differences, environment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from hlat.observe.text import anomaly_text, byte_size, duration, fixed, percent, rate, short

_EMPTY = np.empty(0)
_FIELDS = {"queries": "method/queries"}  # x axes whose name is not their field's
_SMOOTHING = 50  # a curve is averaged over this fraction of its run


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
    loss_log, norm_log = _spans(loss, 3), _spans(norms, 20)
    furthest = [_last(run.train[field]) for run in runs]
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
        ),
    ]


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

    figures = [(key, f"Held-out {title}", name, "held_out") for key, name, title in _held_out_figures(runs)]
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
    cut = {run.name: _last(run.tasks.get("truncated", _EMPTY)) for run in runs}
    counts = ", ".join(f"{name} {count:.0f}" for name, count in cut.items() if count)
    return f"requests that lost tokens on the left: {counts}" if counts else ""


def _x_axis(runs: Sequence[Run]) -> str:
    sizes = [run.tokens_per_step for run in runs]
    by_tokens = min(sizes) > 0 and max(sizes) > 1.000001 * min(sizes)  # False where a size is not known
    return "tokens" if by_tokens else "step"


def summary_table(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Name of a figure -> its text for every run."""
    figures: dict[str, Callable[[Run], str]] = {
        "steps": _steps,
        "tokens": lambda run: "-" if (tokens := _last(run.train["tokens"])) is None else short(tokens),
        "training loss": lambda run: fixed(_mean(run.train["loss"][-_span(run) :])),
        **{
            f"held-out {title.replace(' per ', '/')}": _last_held_out(name)
            for _, name, title in _held_out_figures(runs)
        },
        "tokens per second": lambda run: rate(_median(run.train.get("tokens_per_second", _EMPTY))),
        "MFU": lambda run: percent(_median(run.train.get("mfu", _EMPTY))),
        "time in steps": lambda run: duration(float(np.nansum(run.train.get("step_seconds", _EMPTY)))),
        **_method_figures(runs),
        "skipped steps": lambda run: f"{int(np.nansum(run.train.get('skipped', _EMPTY)))}",
        **({"supervised": _supervised} if any(run.supervised for run in runs) else {}),
        **({"checkpoints in the store": _uploads} if any(_uploads(run) != "-" for run in runs) else {}),
        **({"failed saves": _failed_saves} if any(_failed_saves(run) != "0" for run in runs) else {}),
    }
    return {name: [figure(run) for run in runs] for name, figure in figures.items()}


def _supervised(run: Run) -> str:
    """`9 attempts in 2 jobs, goodput 84.1 %`: queues between jobs do not count."""
    rows = run.supervised
    if not rows:
        return "-"
    attempts, jobs = sum(int(row["attempts"]) for row in rows), len(rows)
    wall = sum(float(row["wall"]) for row in rows)
    share = sum(float(row["seconds"]["stepping"]) for row in rows) / wall if wall else 0.0
    where = f" in {jobs} jobs" if jobs > 1 else ""
    return f"{attempts} attempt{'s' * (attempts > 1)}{where}, goodput {percent(share)}"


def _uploads(run: Run) -> str:
    """`12 uploaded at 210.4 MB/s, 3 attempts failed, 1 skipped`."""
    rows = [row for row in run.storage if row.get("what") == "upload"]
    done = [row for row in rows if row.get("error") is None]
    skipped = sum(str(row["error"]).startswith("skipped") for row in rows if row.get("error"))
    failed = len(rows) - len(done) - skipped
    if not rows:
        return "-"
    seconds, size = (sum(float(row.get(name) or 0) for row in done) for name in ("seconds", "bytes"))
    speed = f" at {size / seconds / 1e6:.1f} MB/s" if seconds else ""
    rest = f", {failed} attempts failed" if failed else ""
    return f"{len(done)} uploaded{speed}{rest}" + (f", {skipped} skipped" if skipped else "")


def _failed_saves(run: Run) -> str:
    return str(sum(row.get("what") == "save" and bool(row.get("error")) for row in run.storage))


def _method_figures(runs: Sequence[Run]) -> dict[str, Callable[[Run], str]]:
    """What tells methods apart: how many examples went forward, and the memory of the first rank."""

    def size(field: str) -> Callable[[Run], str]:
        return lambda run: "-" if (n := _last(run.train.get(field, _EMPTY))) is None else byte_size(int(n))

    figures: dict[str, tuple[str, Callable[[Run], str]]] = {
        "method": ("method/queries", lambda run: str(run.recipe.get("method.name", "-"))),
        "queries": (
            "method/queries",
            lambda run: "-" if (n := _last(run.train.get("method/queries", _EMPTY))) is None else short(n),
        ),
        "persistent memory": ("memory/persistent_bytes", size("memory/persistent_bytes")),
        "peak memory": ("memory/peak_bytes", size("memory/peak_bytes")),
    }
    return {
        name: figure for name, (needs, figure) in figures.items() if any(needs in run.train for run in runs)
    }


def _held_out_figures(runs: Sequence[Run]) -> list[tuple[str, str, str]]:
    """(key of the chart, field, title) of what the runs' evaluations give; bits per byte if nothing."""
    known = [
        ("held-out", "bits_per_byte", "bits per byte"),
        ("accuracy", "accuracy", "accuracy"),
    ]
    return [entry for entry in known if any(entry[1] in run.held_out for run in runs)] or known[:1]


def _held_out_summary(runs: Sequence[Run]) -> dict[str, Callable[[Run], str]]:
    return {
        f"held-out {title.replace(' per ', '/')}": _last_held_out(name)
        for _, name, title in _held_out_figures(runs)
    }


def _last_held_out(name: str) -> Callable[[Run], str]:
    """The figure of the last evaluation, not that of an earlier one where it has none."""
    show = percent if name == "accuracy" else fixed

    def text(run: Run) -> str:
        values = run.held_out.get(name, _EMPTY)
        if not len(values):
            return "-"
        return show(float(values[-1])) if np.isfinite(values[-1]) else "not finite"

    return text


def _noisy(run: Run, index: int, x_name: str, name: str, positive: bool = False) -> Series:
    x, y = run.train[x_name], run.train.get(name, np.full(len(run.train["step"]), np.nan))
    if positive:
        y = np.where(y > 0, y, np.nan)
    return Series(run.name, index % COLOURS, *decimate(x, smooth(y, _span(run))), *envelope(x, y))


def _clean(run: Run, index: int, x: Array, y: Array | None, dots: bool = False) -> Series:
    line_x, line_y = (_EMPTY, _EMPTY) if y is None else decimate(x, y)
    return Series(run.name, index % COLOURS, line_x, line_y, dots=dots and len(line_x) <= 60)


def _span(run: Run) -> int:
    return max(5, len(run.train["step"]) // _SMOOTHING)


def _spans(series: list[Series], ratio: float) -> bool:
    values = np.concatenate([s.y for s in series]) if series else _EMPTY
    return bool(len(values) and values.min() > 0 and values.max() / values.min() > ratio)


def _note(log: bool) -> str:
    return "smoothed; single steps faint" + ("; logarithmic" if log else "")


def _last(values: Array) -> float | None:
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else None


def _mean(values: Array) -> float | None:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else None


def _median(values: Array) -> float | None:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else None


def _steps(run: Run) -> str:
    done = int(run.train["step"][-1])
    return f"{done:,}" if run.planned_steps in (None, done) else f"{done:,} of {run.planned_steps:,}"


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
        return (
            "<h2>Summary</h2>"
            + _table(list(figures), list(zip(*figures.values(), strict=True)), runs)
            + "<h2>Curves</h2>"
        )
    tiles = "".join(
        f'<div class="tile"><b>{escape(values[0])}</b><span>{name}</span></div>'
        for name, values in figures.items()
    )
    return f'<div class="tiles">{tiles}</div>'


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], runs: Sequence[Run]) -> str:
    """One line a run, one column a figure."""
    head = "".join(f"<th>{escape(name)}</th>" for name in ("run", *heads))
    lines = "".join(
        f'<tr><th><i style="--c:var(--s{index % COLOURS})"></i> {escape(run.name)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for index, (run, row) in enumerate(zip(runs, rows, strict=True))
    )
    return f'<div class="sheet"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


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
