"""Results of a sweep: a table for people, and heat maps over two of its keys as HTML or PNG. No training."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from hlat.observe.page import page
from hlat.observe.text import fixed

LOW, HIGH = (0x4F, 0xD1, 0xA1), (0xD9, 0x48, 0x0F)  # colours of the lowest and the highest loss


@dataclass
class Cell:
    """One combination of values, `choice` (key -> value), and what its seeds gave (None: not finished)."""

    choice: dict[str, Any]
    losses: list[float | None] = field(default_factory=list)

    @property
    def done(self) -> list[float]:
        """The losses there are."""
        return [loss for loss in self.losses if loss is not None and math.isfinite(loss)]

    @property
    def mean(self) -> float | None:
        """Mean over the seeds that finished; None before the first."""
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


def table(cells: Sequence[Cell]) -> tuple[list[str], list[list[str]]]:
    """Head and lines, best mean first; unfinished combinations last."""
    keys = list(cells[0].choice)
    order = sorted(cells, key=lambda cell: math.inf if cell.mean is None else cell.mean)
    lines = [
        [
            *(plain(cell.choice[key]) for key in keys),
            fixed(cell.mean),
            "-" if cell.spread is None else fixed(cell.spread),
            fixed(max(cell.done, default=None)),
            f"{len(cell.done)}/{len(cell.losses)}",
        ]
        for cell in order
    ]
    return [*keys, "held-out loss", "± over seeds", "worst seed", "seeds"], lines


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
        *(_map_html(item, low, high) for item in heat_maps(cells)),
        "<h2>All combinations, best first</h2>",
        _sheet([head], lines),
    ]
    return page(title, "\n".join(body), {})


def _map_html(item: Map, low: float, high: float) -> str:
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
    heading = f"<h2>Mean held-out loss{': ' + escape(item.title) if item.title else ''}</h2>"
    return (
        f'{heading}<div class="sheet"><table><thead><tr><th>{escape(corner)}</th>{names}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


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
        axis.imshow(grid, cmap="RdYlGn_r", vmin=min(means, default=0.0), vmax=max(means, default=1.0))
        axis.set_xticks(range(len(item.columns)), [plain(v) for v in item.columns])
        axis.set_yticks(range(len(item.rows)), [plain(v) for v in item.rows])
        axis.set_xlabel(item.column_key)
        axis.set_ylabel(item.row_key if item.row_key != item.column_key else "")
        axis.set_title(item.title or title, fontsize=9)
        for i, line in enumerate(item.losses):
            for j, loss in enumerate(line):
                axis.text(j, i, fixed(loss, 3), ha="center", va="center", fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True
