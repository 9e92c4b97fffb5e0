"""Models on the same questions: how much they differ, and how sure that is.

Answers are paired question by question, which takes out how hard each question is. Where every score is 0 or
1 the p-value is that of McNemar's exact test (the binomial test on the questions only one of the two got
right), otherwise that of the paired t-test; `hlat.evaluate.statistics` says how an error is found. All
p-values of a table are corrected for their number (Holm 1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hlat.errors import UserError
from hlat.evaluate.results import Table, notes, question_scores
from hlat.evaluate.running import left_out, numbers
from hlat.evaluate.statistics import LEVEL, Scores, holm, is_binary, mcnemar, ratio, student_p

EXPLANATION = (
    "± is the standard error; there is none for fewer than 3 questions, nor where fewer than 6 say the same. "
    "p: paired over the questions (McNemar's exact test where scores are 0 or 1, else a t-test), corrected "
    "for the number of rows (Holm). * below 5 %."
)


@dataclass(frozen=True)
class Difference:
    """A model against the first one. value: its figure minus the first one's. error: standard error of that,
    None where so few questions say nothing about it. p: two-sided.
    """

    value: float
    error: float | None
    p: float
    questions: int


def compare_scores(first: Scores, second: Scores) -> Difference:
    """Second minus first, over the same questions. Raises UserError when they are not the same."""
    if first.keys() != second.keys():
        raise UserError("the models were asked different questions", fix="evaluate them with one command")
    pairs = [(first[key], second[key]) for key in first]
    deltas = [(b - a, size) for (a, size), (b, _) in pairs]
    found = ratio(deltas, [max(abs(a), abs(b)) for (a, _), (b, _) in pairs])
    if is_binary([*first.values(), *second.values()]):
        changes = [delta for delta, _ in deltas]
        p = mcnemar(changes.count(1.0), changes.count(-1.0))
    else:
        p = student_p(found.value, found.error, found.count)
    return Difference(found.value, found.known_error, p, found.count)


def comparison(names: Sequence[str], results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One object for each task and metric that has scores of single questions: `values` (value, error) of
    each model, and `differences` of all but the first from it, each with its corrected `p_corrected`. All of
    these are None in a task of which one of the models has no figure.
    """
    rows: list[dict[str, Any]] = []
    figures = [numbers(result) for result in results]
    without = {task for result in results for task in left_out(result)}
    names_of: dict[tuple[str, str], None] = {}
    for figure in figures:
        names_of |= {(task, metric): None for task, metrics in figure.items() for metric in metrics}
    for task, metric in names_of:
        scores = [question_scores(result, task, metric) for result in results]
        if task not in without and not all(scores):
            continue
        values = [
            dict(zip(("value", "error"), figure.get(task, {}).get(metric, (None, None)), strict=True))
            for figure in figures
        ]
        others = [
            _NOTHING if task in without else vars(compare_scores(scores[0], other)) for other in scores[1:]
        ]
        differences = [{"model": name, **found} for name, found in zip(names[1:], others, strict=True)]
        rows.append({"task": task, "metric": metric, "values": values, "differences": differences})
    made = [d for row in rows for d in row["differences"] if d["p"] is not None]
    for difference, p in zip(made, holm([d["p"] for d in made]), strict=True):
        difference["p_corrected"] = p
    return rows


_NOTHING = dict.fromkeys(("value", "error", "p", "questions", "p_corrected"))


def comparison_notes(names: Sequence[str], results: Sequence[dict[str, Any]]) -> list[str]:
    """What was cut or left out of each model's answers, one line each."""
    return [f"{name}: {line}" for name, result in zip(names, results, strict=True) for line in notes(result)]


def comparison_table(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> Table:
    """Head and rows for people; a * marks differences that are significant at 5 % after correction."""
    many = len(names) > 2
    heads = [f"{name} - {names[0]}" if many else "difference" for name in names[1:]]
    table = [["task", "metric", *names, *(cell for head in heads for cell in (head, "p"))]]
    for row in rows:
        cells = [row["task"], row["metric"], *(_pm(v["value"], v["error"]) for v in row["values"])]
        for difference in row["differences"]:
            p = difference["p_corrected"]
            star = " *" if p is not None and p < LEVEL else ""
            cells += [_pm(difference["value"], difference["error"], "+.4f") + star]
            cells += ["-" if p is None else f"{p:.2g}"]
        table.append(cells)
    return table


def _pm(value: float | None, error: float | None, form: str = ".4f") -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return format(value, form) + (f" ± {error:.4f}" if error is not None else "")
