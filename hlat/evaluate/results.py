"""Results of the harness as text: a table with error bars and levels of chance, and published values beside
it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from hlat.errors import UserError
from hlat.evaluate.running import numbers
from hlat.observe.jsonl import replace_file

Table = list[list[str]]
_HIDDEN = ("sample_len", "alias")
_NOTES = {
    "truncated": "requests longer than the model's context lost tokens on the left",
    "dropped_tokens": "tokens were dropped by that",
    "shortened": "tasks wanted more new tokens than fit; half of the context was generated at most",
}


def table(results: dict[str, Any]) -> Table:
    """Head and rows: task, metric, value, standard error, level of chance, distance from it in errors."""
    rows = [["task", "metric", "value", "± error", "chance", "z"]]
    chance, better = results["hlat"]["chance"], results.get("higher_is_better", {})
    shots = results.get("n-shot", {})
    for task, metrics in numbers(results).items():
        for metric, (value, error) in metrics.items():
            if metric in _HIDDEN:
                continue
            level = chance.get(task, {}).get(metric)
            sign = 1 if better.get(task, {}).get(metric, True) else -1
            score = sign * (value - level) / error if level is not None and error else None
            name = f"{task} ({shots[task]}-shot)" if shots.get(task) else task
            rows.append([name, metric, *map(_number, (value, error, level)), _number(score, "+.1f")])
    return rows


def notes(results: dict[str, Any]) -> list[str]:
    """What was cut, one line each."""
    counted = results["hlat"]["notes"]
    return [f"{counted[key]} {text}" for key, text in _NOTES.items() if counted.get(key)]


def plain(rows: Table) -> str:
    """A table for a terminal: names left, numbers right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def markdown(rows: Table) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def html_table(rows: Table) -> str:
    """A table in HTML, in the style of `hlat.observe.page`."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:])
    return f'<div class="sheet"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def write_json(results: Any, path: str | Path) -> None:
    """Write results in the harness's schema; functions and the like as their text.

    Raises UserError when the disk refuses.
    """
    write_text(json.dumps(results, indent=2, default=_simple, ensure_ascii=False) + "\n", path)


def write_text(text: str, path: str | Path) -> None:
    """Write a file. Raises UserError when the disk refuses."""
    target = Path(path).expanduser()
    try:
        replace_file(target, text.encode("utf-8"))
    except OSError as error:
        raise UserError(f"cannot be written ({error.strerror})", where=str(path)) from error


def without_samples(results: dict[str, Any]) -> dict[str, Any]:
    """Results without every question and answer, as the harness writes them unless asked."""
    return {key: value for key, value in results.items() if key != "samples"}


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def _simple(value: Any) -> Any:
    if hasattr(value, "item") and getattr(value, "size", 0) == 1:
        return value.item()
    return getattr(value, "__name__", None) or str(value)


def reference_rows(tasks: Sequence[str]) -> Table:
    """Published values of models of HLAT-7B's size for the tasks evaluated, in percent, with their source."""
    from hlat.evaluate.reference import PUBLISHED

    rows = [["task", "metric", "model", "value", "source"]]
    for row in PUBLISHED:
        if row.task in tasks:
            rows.append([row.task, row.metric, row.model, f"{row.value:g}", row.source])
    return rows
