"""Results of the harness as text: a table with error bars and levels of chance, and published values beside
it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hlat.errors import UserError
from hlat.evaluate.harness import note_lines
from hlat.evaluate.running import left_out, numbers
from hlat.evaluate.statistics import Scores, interval, ratio
from hlat.observe.jsonl import finite, replace_file
from hlat.observe.markup import escape
from hlat.paths import expand

Table = list[list[str]]
_HIDDEN = ("sample_len", "alias")


def table(results: dict[str, Any]) -> Table:
    """Head and rows: task, metric, value, standard error, 95 % interval, level of chance, distance from it in
    errors.
    """
    rows = [["task", "metric", "value", "± error", "95 %", "chance", "z"]]
    chance, better = results["hlat"]["chance"], results.get("higher_is_better", {})
    shots = results.get("n-shot", {})
    for task, metrics in numbers(results).items():
        for metric, (value, error) in metrics.items():
            if metric in _HIDDEN:
                continue
            level = chance.get(task, {}).get(metric)
            sign = 1 if better.get(task, {}).get(metric, True) else -1
            score = None if value is None or level is None or not error else sign * (value - level) / error
            name = f"{task} ({shots[task]}-shot)" if shots.get(task) else task
            scores = question_scores(results, task, metric) if value is not None else {}
            span = interval(list(scores.values())) if scores else None
            between = "-" if span is None else f"{span[0]:.4f} to {span[1]:.4f}"
            numbers_ = [*map(_number, (value, error)), between, _number(level), _number(score, "+.1f")]
            rows.append([name, metric, *numbers_])
    return rows


def question_scores(results: dict[str, Any], task: str, metric: str) -> Scores:
    """The scores of a task's questions in the harness's results; empty where the metric has none: a group's
    mean, a metric of the whole task, or one that is not their mean (a perplexity is an exponential of it).
    """
    name, _, filtered = metric.partition(" (")
    wanted = filtered.rstrip(")") or "none"
    scores: Scores = {}
    for sample in results.get("samples", {}).get(task, []):
        value = sample.get(name)
        if sample["filter"] != wanted or value is None:
            continue
        if name == "bits_per_byte":
            scores[sample["doc_id"]] = -value[0] / math.log(2), float(value[1])
        elif isinstance(value, int | float):
            scores[sample["doc_id"]] = float(value), 1.0
    figure = results.get("results", {}).get(task, {}).get(f"{name},{wanted}")
    mean = ratio(list(scores.values())).value
    same = isinstance(figure, int | float) and math.isclose(mean, figure, rel_tol=1e-6, abs_tol=1e-9)
    return scores if same else {}


def notes(results: dict[str, Any]) -> list[str]:
    """What was cut or left out, one line each."""
    said = results["hlat"]
    lines = note_lines({**said, "broken": {}})
    lines += [f"{task}: no figure: {reason}" for task, reason in left_out(results).items()]
    if said.get("chat_template") == "not applied":
        lines.append(
            "the tokenizer has a chat template, and the questions were asked without it: "
            "--apply-chat-template asks with it"
        )
    return lines


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


def html_notes(lines: Sequence[str]) -> str:
    """Notes below a table, in the same style."""
    return "".join(f'<p class="note">{escape(line)}</p>' for line in lines)


def write_json(results: Any, path: str | Path) -> None:
    """Write results in the harness's schema; functions and the like as their text, null for what is no finite
    number: JSON has no word for it.

    Raises UserError when the disk refuses.
    """
    text = json.dumps(finite(results), indent=2, default=_simple, ensure_ascii=False, allow_nan=False)
    write_text(text + "\n", path)


def write_text(text: str, path: str | Path) -> None:
    """Write a file. Raises UserError when the disk refuses."""
    target = expand(path)
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
        return finite(value.item())
    return getattr(value, "__name__", None) or str(value)


def reference_rows(tasks: Sequence[str]) -> Table:
    """Published values of models of HLAT-7B's size for the tasks evaluated, in percent, with their source."""
    from hlat.evaluate.reference import PUBLISHED

    rows = [["task", "metric", "model", "value", "source"]]
    for row in PUBLISHED:
        if row.task in tasks:
            rows.append([row.task, row.metric, row.model, f"{row.value:g}", row.source])
    return rows
