"""Runs as a report reads them: metric rows as arrays, recipe and environment as flat tables."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from hlat.errors import UserError
from hlat.observe.jsonl import Row, read_rows
from hlat.observe.runfolder import RunFolder
from hlat.storage.fingerprint import Stretch, read_stretches, with_steps

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Run:
    """One run. `train`, `held_out` and `tasks` map a field to an array, one element a row, NaN where it has
    none; `anomalies` are the rows of that kind, `supervised` what `hlat supervise` says at the end of each
    job, `stretches` what the rows stand for, empty where that is not known.
    """

    name: str
    path: Path
    train: Mapping[str, Array]
    held_out: Mapping[str, Array]
    recipe: Mapping[str, Any]
    starts: list[dict[str, Any]]
    tasks: Mapping[str, Array] = field(default_factory=dict)
    storage: list[Row] = field(default_factory=list)
    anomalies: Sequence[Row] = ()
    supervised: Sequence[Row] = ()
    stretches: Sequence[Stretch] = ()

    @property
    def tokens_per_step(self) -> float:
        """Tokens of one step, from the last row; NaN when the run does not say."""
        return float(self.train["tokens"][-1] / self.train["step"][-1])

    @property
    def planned_steps(self) -> int | None:
        """The steps the recipe asks for; None when the run folder has no resolved recipe."""
        steps = self.recipe.get("run.steps")
        return steps if isinstance(steps, int) else None


def load_runs(paths: Iterable[Path]) -> list[Run]:
    """Runs from their folders, with names that differ. Raises UserError for a missing or empty run."""
    runs = [load_run(path) for path in paths]
    names = _distinct_names([run.path for run in runs])
    return [replace(run, name=name) for name, run in zip(names, runs, strict=True)]


def load_run(path: Path) -> Run:
    """One run from its folder. Raises UserError when there is no folder, no metrics file or no step in it."""
    folder = RunFolder(path)
    if not folder.path.is_dir():
        raise UserError("no such run folder", where=str(path), fix="give the run.dir of a training run")
    if not folder.metrics.is_file():
        fix = "give the folder that holds it (run.dir of a training run)"
        raise UserError("not a run folder: it has no metrics.jsonl", where=str(path), fix=fix)
    tables = {"train": Table("step", "loss", "tokens"), "eval": Table("step"), "tasks": Table("step")}
    anomalies = []
    storage: list[Row] = []
    try:
        for row in read_rows(folder.metrics):
            step, kind = row.get("step"), row.get("kind")
            if kind == "storage":
                storage.append(row)
            if kind == "anomaly":
                anomalies.append(row)
            if kind in tables and isinstance(step, (int, float)):
                tables[kind].add(step, row)
    except OSError as error:
        raise UserError(f"cannot read it ({error.strerror})", where=str(folder.metrics)) from error
    columns = {kind: table.columns() for kind, table in tables.items()}
    if not len(columns["train"]["step"]):
        raise UserError(
            "no training step in it yet", where=str(folder.metrics), fix="report a run that has trained"
        )
    return Run(
        name=folder.path.name,
        path=folder.path,
        train=columns["train"],
        held_out=columns["eval"],
        recipe=_flat_recipe(folder.resolved),
        starts=folder.starts(),
        tasks=columns["tasks"],
        storage=storage,
        anomalies=anomalies,
        stretches=with_steps(read_stretches(folder.path), int(columns["train"]["step"][-1])),
        supervised=_finishes(folder.logs / "supervisor" / "events.jsonl"),
    )


def _finishes(events: Path) -> list[Row]:
    """The last event of each job, as its first machine has written it."""
    try:
        return [row for row in read_rows(events) if row.get("event") == "finish" and not row.get("node")]
    except OSError:
        return []


def smooth(values: Array, span: int) -> Array:
    """Mean over the `span` values around each one, over fewer near the ends. NaN are left out.

    The window shrinks on both sides at the start, where a loss falls fast, so that the curve keeps its place.
    """
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    index = np.arange(len(values))
    half = np.minimum(span // 2, index)
    low, high = index - half, np.minimum(index + half + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys; lists are values."""
    if not isinstance(tree, Mapping):
        return {prefix: tree} if prefix else {}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{prefix}.{key}" if prefix else str(key)))
    return flat


def differences(tables: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The keys whose values differ between the tables, in order of appearance, with one value a table."""
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = {key: [table.get(key) for table in tables] for key in keys}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values[1:])}


class Table:
    """Rows as they come, one for each step: eight bytes a value, as a run may have millions of them. A step
    that was repeated counts as it went the last time.

    Args:
        needed: fields that are columns even where no row has them.
    """

    def __init__(self, *needed: str) -> None:
        self._places: dict[float, int] = {}
        self._values = {name: array("d") for name in needed}

    def add(self, step: float, row: Row) -> None:
        """Take a row."""
        for name in [name for name in row if name not in self._values and name != "kind"]:
            self._values[name] = array("d", (math.nan,)) * len(self._places)
        place = self._places.setdefault(step, len(self._places))
        for name, column in self._values.items():
            column[place : place + 1] = array("d", (_number(row.get(name)),))

    def columns(self) -> dict[str, Array]:
        """Each field as an array in the order of steps, NaN where a row has none."""
        order = np.argsort(np.fromiter(self._places, np.float64, len(self._places)), kind="stable")
        return {name: np.asarray(column, dtype=np.float64)[order] for name, column in self._values.items()}


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (bool, int, float)) else math.nan


def _flat_recipe(path: Path) -> dict[str, Any]:
    try:
        return flatten(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        first_line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"cannot read the resolved recipe ({first_line})", where=str(path)) from error


def _distinct_names(paths: list[Path]) -> list[str]:
    """Folder names, with as many parents in front as it takes to tell them apart."""
    for depth in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({index})" for index, path in enumerate(paths, 1)]  # the same run given twice
