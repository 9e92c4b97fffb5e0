"""Results of a sweep: a table for people, and heat maps over two of its keys as HTML or PNG. No training."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hlat.observe.jsonl import Row
from hlat.observe.markup import escape
from hlat.observe.page import page
from hlat.observe.text import fixed, percent

LOW, HIGH = (0x4F, 0xD1, 0xA1), (0xD9, 0x48, 0x0F)  # colours of the lowest and the highest loss

LEFT_OUT = "left out"  # the column that says which runs are not in the mean


@dataclass(frozen=True)
class Result:
    """What one run gave.

    Attributes:
        loss: nats a token; not finite where the run diverged, or was stopped.
        kind: "held-out" or "training".
        skipped: share of its steps whose update the guard skipped.
        stopped: the guard gave up before the last step.
    """

    loss: float
    kind: str = "held-out"
    skipped: float = 0.0
    stopped: bool = False

    @property
    def fault(self) -> str:
        """Why the loss says nothing of the combination; empty for a sound run."""
        if self.stopped:
            return "stopped by its guard"
        if not math.isfinite(self.loss):
            return "diverged"
        return "skipped most steps" if self.skipped > 0.5 else ""


def result_of(rows: Iterable[Row], last: int) -> Result:
    """What a run's metrics say: the held-out loss after its last step; without one the mean training loss of
    the last tenth of its steps, as a single batch says little.

    Args:
        rows: of metrics.jsonl, in order.
        last: the step at which the run ends.
    """
    losses: list[float] = []
    held_out: float | None = None
    skips, stopped, seen = 0, False, 0
    for row in rows:
        step = row.get("step", 0)
        if row.get("kind") == "train" and step <= last:
            seen, skipped = step, bool(row.get("skipped"))
            skips += skipped
            if step > last - max(1, last // 10) and not skipped:
                losses.append(_number(row.get("loss")))
        elif row.get("kind") == "eval" and step == last:
            held_out = _number(row.get("loss"))
        elif row.get("kind") == "anomaly" and row.get("policy") == "stop":
            stopped = True
    share = skips / max(1, seen)
    if stopped:
        return Result(math.nan, skipped=share, stopped=True)
    if held_out is not None:
        return Result(held_out, "held-out", share)
    return Result(statistics.fmean(losses) if losses else math.nan, "training", share)


def _number(loss: Any) -> float:
    """A loss as metrics hold it, where one that is not finite is null."""
    return float(loss) if isinstance(loss, int | float) else math.nan


@dataclass
class Cell:
    """One combination of values, `choice` (key -> value), and what its seeds gave (None: not finished)."""

    choice: dict[str, Any]
    results: list[Result | None] = field(default_factory=list)

    @property
    def done(self) -> list[float]:
        """Losses of the sound runs."""
        return [result.loss for result in self.results if result is not None and not result.fault]

    @property
    def faults(self) -> Counter[str]:
        """How many runs are not sound, by what is wrong with them."""
        return Counter(result.fault for result in self.results if result is not None and result.fault)

    @property
    def skipped(self) -> float:
        """Share of steps whose update was skipped, over all seeds."""
        return statistics.fmean([result.skipped for result in self.results if result is not None] or [0.0])

    @property
    def mean(self) -> float | None:
        """Mean over the seeds that are sound; None before the first."""
        return statistics.fmean(self.done) if self.done else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds; None for fewer than two."""
        return statistics.stdev(self.done) if len(self.done) > 1 else None


@dataclass(frozen=True)
class Map:
    """A heat map: losses (rows x columns, None where there is none) over the values of two keys."""

    title: str
    row_key: str
    column_key: str
    rows: list[Any]
    columns: list[Any]
    losses: list[list[float | None]]


def plain(value: Any) -> str:
    """A value as a table shows it."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def kinds(cells: Sequence[Cell]) -> list[str]:
    """The kinds of loss among the results, sorted."""
    return sorted({r.kind for cell in cells for r in cell.results if r is not None and not r.fault})


def name_of_loss(cells: Sequence[Cell]) -> str:
    """`held-out loss` or `training loss`; `loss` where there are both, or none yet."""
    known = kinds(cells)
    return f"{known[0]} loss" if len(known) == 1 else "loss"


def table(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Head and lines, best mean first; after them combinations with a run that is not sound, as the mean of
    the others flatters them, then those without any result. Columns that say nothing are left out.
    """

    def rank(cell: Cell) -> tuple[bool, bool, float]:
        return cell.mean is None, bool(cell.faults), cell.mean or 0.0

    order = sorted(cells, key=rank)
    columns: dict[str, list[str]] = {
        key: [plain(cell.choice[key]) for cell in order] for key in cells[0].choice
    }
    columns[name_of_loss(cells)] = [fixed(cell.mean) for cell in order]
    columns["± over seeds"] = [fixed(cell.spread) for cell in order]
    columns["worst seed"] = [fixed(max(cell.done, default=None)) for cell in order]
    columns["seeds"] = [f"{len(cell.done)}/{len(cell.results)}" for cell in order]
    if len(kinds(cells)) > 1:
        columns["loss is"] = [" and ".join(kinds([cell])) for cell in order]
    if any(cell.skipped for cell in cells):
        columns["skipped steps"] = [percent(cell.skipped) for cell in order]
    if any(cell.faults for cell in cells):
        columns[LEFT_OUT] = [_count(cell.faults) for cell in order]
    return list(columns), [list(line) for line in zip(*columns.values(), strict=True)]


def _count(faults: Counter[str]) -> str:
    """`2 diverged, 1 skipped most steps`."""
    return ", ".join(f"{number} {what}" for what, number in faults.items())


def heat_maps(cells: Sequence[Cell]) -> list[Map]:
    """One map over the two keys that come last among those with several values, for each combination of the
    others.
    """
    keys = list(cells[0].choice)
    values = {key: list(dict.fromkeys(_known(cell.choice[key]) for cell in cells)) for key in keys}
    varied = [key for key in keys if len(values[key]) > 1] or keys[:1]
    row_key, column_key = varied[-2:] if len(varied) > 1 else (varied[0], varied[0])
    others = [key for key in varied if key not in (row_key, column_key)]
    maps: dict[str, dict[tuple[Any, Any], float | None]] = {}
    for cell in cells:
        title = ", ".join(f"{key}={plain(cell.choice[key])}" for key in others)
        place = _known(cell.choice[row_key]), _known(cell.choice[column_key])
        maps.setdefault(title, {})[place] = cell.mean
    rows, columns = values[row_key], values[column_key]
    if row_key == column_key:
        rows = [""]
        maps = {title: {("", column): v for (_, column), v in found.items()} for title, found in maps.items()}
    return [
        Map(title, row_key, column_key, rows, columns, [[found.get((r, c)) for c in columns] for r in rows])
        for title, found in maps.items()
    ]


def _known(value: Any) -> Any:
    """A value that can be looked up: lists and mappings become text."""
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def colour(loss: float, low: float, high: float) -> str:
    """From green (the sweep's lowest) to red (its highest), `#rrggbb`."""
    share = 0.0 if high <= low else (loss - low) / (high - low)
    mixed = (round(a + share * (b - a)) for a, b in zip(LOW, HIGH, strict=True))
    return "#" + "".join(f"{value:02x}" for value in mixed)


def render(title: str, cells: Sequence[Cell]) -> str:
    """Table and heat maps as one HTML document."""
    head, lines = table(cells)
    means = [cell.mean for cell in cells if cell.mean is not None]
    low, high = min(means, default=0.0), max(means, default=0.0)
    body = [
        f"<header><h1>{escape(title)}</h1><p>{len(cells)} combinations</p></header>",
        *(_map_html(item, name_of_loss(cells), low, high) for item in heat_maps(cells)),
        _scale(name_of_loss(cells), low, high),
        "<h2>All combinations, best first</h2>",
        _sheet([head], lines),
    ]
    return page(title, "\n".join(body), {})


def _map_html(item: Map, what: str, low: float, high: float) -> str:
    lines = []
    for value, losses in zip(item.rows, item.losses, strict=True):
        cells = "".join(
            "<td>-</td>"
            if loss is None
            else f'<td style="background:{colour(loss, low, high)};color:#111">{fixed(loss)}</td>'
            for loss in losses
        )
        lines.append(f"<tr><th>{escape(plain(value))}</th>{cells}</tr>")
    corner = item.column_key if item.row_key == item.column_key else f"{item.row_key} \\ {item.column_key}"
    names = "".join(f"<th>{escape(plain(value))}</th>" for value in item.columns)
    heading = f"<h2>Mean {what}{': ' + escape(item.title) if item.title else ''}</h2>"
    return (
        f'{heading}<div class="sheet"><table><thead><tr><th>{escape(corner)}</th>{names}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _scale(what: str, low: float, high: float) -> str:
    """What the colours stand for."""
    ends = ",".join(colour(value, 0.0, 1.0) for value in (0.0, 1.0))
    bar = f'<span style="background:linear-gradient(90deg,{ends})"></span>'
    means = f"{fixed(low)} {bar} {fixed(high)}" if high > low else fixed(low)
    return f'<p class="scale">mean {escape(what)}, lower is better: {means}; "-": no run that counts</p>'


def _sheet(heads: Sequence[Sequence[str]], lines: Sequence[Sequence[str]]) -> str:
    head = "".join("<tr>" + "".join(f"<th>{escape(c)}</th>" for c in line) + "</tr>" for line in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}</td>" for c in line) + "</tr>" for line in lines)
    return f'<div class="sheet"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def draw_png(path: Path, title: str, cells: Sequence[Cell]) -> bool:
    """The heat maps as a picture. Returns False, and writes nothing, without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    maps = heat_maps(cells)
    means = [cell.mean for cell in cells if cell.mean is not None]
    wide = max(3.0, 0.9 * len(maps[0].columns) + 2.2)
    size = (wide * len(maps), max(2.4, 0.6 * len(maps[0].rows) + 1.8))
    figure, axes = pyplot.subplots(1, len(maps), squeeze=False, figsize=size, layout="constrained")
    for axis, item in zip(axes[0], maps, strict=True):
        grid = [[math.nan if loss is None else loss for loss in line] for line in item.losses]
        shown = axis.imshow(grid, cmap="RdYlGn_r", vmin=min(means, default=0.0), vmax=max(means, default=1.0))
        axis.set_xticks(range(len(item.columns)), [plain(v) for v in item.columns])
        axis.set_yticks(range(len(item.rows)), [plain(v) for v in item.rows])
        axis.set_xlabel(item.column_key)
        axis.set_ylabel(item.row_key if item.row_key != item.column_key else "")
        axis.set_title(item.title, fontsize=9)
        for i, line in enumerate(item.losses):
            for j, loss in enumerate(line):
                axis.text(j, i, fixed(loss, 3), ha="center", va="center", fontsize=8)
    if means:
        figure.colorbar(shown, ax=axes[0], label=f"mean {name_of_loss(cells)}")
    figure.suptitle(f"{title}: mean {name_of_loss(cells)}", fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True
