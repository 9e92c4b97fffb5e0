"""Models on the same questions: how much they differ, and how sure that is.

Answers are paired question by question, which takes out how hard each question is. A figure is a ratio of
sums over the questions (a mean where each counts 1; bits over bytes for bits per byte), and so is a
difference; its standard error comes from the questions' contributions to it (delta method). Where every score
is 0 or 1 the p-value is that of McNemar's exact test (the binomial test on the questions only one of the two
got right), otherwise that of the paired z-test. All p-values of a table are corrected for their number (Holm
1979).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hlat.errors import UserError
from hlat.evaluate.results import Table
from hlat.evaluate.running import numbers

LEVEL = 0.05
Scores = dict[Any, tuple[float, float]]
"""Question -> (what it adds to the sum, what it weighs)."""


@dataclass(frozen=True)
class Difference:
    """A model against the first one. value: its figure minus the first one's. error: standard error of that,
    None with fewer than two questions. p: two-sided.
    """

    value: float
    error: float | None
    p: float
    questions: int


def question_scores(results: dict[str, Any], task: str, metric: str) -> Scores:
    """The scores of a task's questions in the harness's results; empty where the metric has none (a group's
    mean, a metric of the whole task).
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
    return scores


def compare_scores(first: Scores, second: Scores) -> Difference:
    """Second minus first, over the same questions. Raises UserError when they are not the same."""
    if first.keys() != second.keys():
        raise UserError("the models were asked different questions", fix="evaluate them with one command")
    pairs = [(first[key], second[key]) for key in first]
    weight = sum(size for (_, size), _ in pairs)
    deltas = [b - a for (a, _), (b, _) in pairs]
    value, count = sum(deltas) / weight, len(pairs)
    error: float | None = None
    if count > 1:
        rest = sum((d - value * size) ** 2 for d, ((_, size), _) in zip(deltas, pairs, strict=True))
        error = math.sqrt(rest * count / (count - 1)) / weight
    plain = all(score in ((0.0, 1.0), (1.0, 1.0)) for pair in pairs for score in pair)
    p = mcnemar(deltas.count(1.0), deltas.count(-1.0)) if plain else paired_z(value, error)
    return Difference(value, error, p, count)


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p-value of the exact test: of the questions that one model alone got right, as many on one
    side, if each side were as likely (McNemar 1947; binomial).
    """
    total = gained + lost
    tail = sum(math.comb(total, k) for k in range(min(gained, lost) + 1)) / 2**total
    return min(1.0, 2 * tail)


def paired_z(value: float, error: float | None) -> float:
    """Two-sided p-value of a difference under a normal law; 1 where nothing is known of its error."""
    if error is None or value == 0:
        return 1.0
    return math.erfc(abs(value) / error / math.sqrt(2)) if error else 0.0


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979)."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    corrected, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = highest
    return corrected


def comparison(names: Sequence[str], results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One object for each task and metric that has scores of single questions: `values` (value, error) of
    each model, and `differences` of all but the first from it, each with its corrected `p_corrected`.
    """
    rows: list[dict[str, Any]] = []
    figures = [numbers(result) for result in results]
    for task, metrics in figures[0].items():
        for metric in metrics:
            scores = [question_scores(result, task, metric) for result in results]
            if not all(scores):
                continue
            values = [dict(zip(("value", "error"), figure[task][metric], strict=True)) for figure in figures]
            found = [vars(compare_scores(scores[0], other)) for other in scores[1:]]
            differences = [{"model": name, **d} for name, d in zip(names[1:], found, strict=True)]
            rows.append({"task": task, "metric": metric, "values": values, "differences": differences})
    flat = [difference for row in rows for difference in row["differences"]]
    for difference, p in zip(flat, holm([d["p"] for d in flat]), strict=True):
        difference["p_corrected"] = p
    return rows


def comparison_table(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> Table:
    """Head and rows for people; a * marks differences that are significant at 5 % after correction."""
    many = len(names) > 2
    heads = [f"{name} - {names[0]}" if many else "difference" for name in names[1:]]
    table = [["task", "metric", *names, *(cell for head in heads for cell in (head, "p"))]]
    for row in rows:
        cells = [row["task"], row["metric"], *(_pm(v["value"], v["error"]) for v in row["values"])]
        for difference in row["differences"]:
            star = " *" if difference["p_corrected"] < LEVEL else ""
            cells += [_pm(difference["value"], difference["error"], "+.4f") + star]
            cells += [f"{difference['p_corrected']:.2g}"]
        table.append(cells)
    return table


def _pm(value: float, error: float | None, form: str = ".4f") -> str:
    return format(value, form) + (f" ± {error:.4f}" if error is not None else "")
