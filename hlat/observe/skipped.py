"""Skipped updates as the rows of a run tell of them: where they were many, and which of them were skipped for
no reason of their own.

Guards once divided the sums over their window by all steps so far. From the second window on their thresholds
were off, and from the 36th on, with 6 standard deviations, they let nothing through. What such a version has
skipped is found by judging the rows again, by its rule and by the right one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hlat.observe.jsonl import read_rows

if TYPE_CHECKING:
    from hlat.observe.runs import Run

Array = np.ndarray[Any, np.dtype[np.float64]]
Row = tuple[int, float, float, bool]  # step, loss, norm (NaN where not finite), skipped
SHARE = 0.01  # of the steps of a stretch; more skipped ones than that are worth a line
_LEAST = 100  # steps in a stretch
_MARGIN = 1e-3  # of the distance to a threshold: fp32 on a device and fp64 here may differ by rounding
_SHOWN = 5
_GUARDS = ("skip", "stop", "rewind")
_SKIPPED = re.compile(rb'"skipped":\s*true')


def stretch(every: int) -> int:
    """Steps over which a share of skipped ones is taken: the fewest whole windows of `every` steps that make
    100.
    """
    return every * math.ceil(_LEAST / every)


class OftenSkipped:
    """Says while a run trains that more than 1 % of a stretch of its steps were skipped.

    After the n-th time it is silent for 2^n stretches, so a run of any length hears of it a few times only.
    """

    def __init__(self, every: int = 1) -> None:
        self.size = stretch(every)
        self._stretch, self._skipped, self._step = 0, 0, 0
        self._silent, self._said = 0, 0

    def row(self, row: Mapping[str, Any]) -> str | None:
        """Take a train row; the line, if a stretch has ended with too many."""
        step = int(row["step"])
        line = None if (step - 1) // self.size == self._stretch else self.end()
        self._stretch, self._step = (step - 1) // self.size, step
        self._skipped += bool(row.get("skipped"))
        return self.end() if step % self.size == 0 else line

    def end(self) -> str | None:
        """The stretch ends here, as a run does: its line, if there is one."""
        skipped, self._skipped = self._skipped, 0
        if skipped <= SHARE * self.size or self._stretch < self._silent:
            return None
        self._said += 1
        self._silent = self._stretch + 2**self._said
        said = often_text(self._stretch * self.size + 1, self._step, skipped)
        return f"{said}; optim.lr may be too high, or guard.sigma too low"

    def rewind(self) -> None:
        """The run goes back: what was counted is taken back."""
        self._skipped = 0


def often_skipped(steps: Array, skipped: Array, every: int = 1) -> list[tuple[int, int, int]]:
    """(first step, last step, skipped ones) of each stretch with more than 1 % skipped; neighbours joined.

    Args:
        steps: the steps there are rows of, ascending.
        skipped: for each, 1 where its update was skipped; NaN counts as 0.
        every: steps in a window of metrics.
    """
    size = stretch(every)
    number = (steps.astype(np.int64) - 1) // size
    counts = np.bincount(number, np.nan_to_num(skipped)) if len(steps) else np.zeros(0)
    found: list[tuple[int, int, int]] = []
    for index in np.flatnonzero(counts > SHARE * size).tolist():
        first, last, count = index * size + 1, min((index + 1) * size, int(steps[-1])), int(counts[index])
        if found and found[-1][1] == first - 1:
            first, count = found[-1][0], count + found.pop()[2]
        found.append((first, last, count))
    return found


def often_text(first: int, last: int, skipped: int) -> str:
    """`37 updates were skipped in steps 101 to 1,000 (4.1 %)`."""
    share = 100 * skipped / (last - first + 1)
    return f"{skipped:,} updates were skipped in steps {first:,} to {last:,} ({share:.1f} %)"


def often_lines(found: Sequence[tuple[int, int, int]]) -> Iterator[str]:
    """What `often_skipped` found, in a few lines."""
    yield from (often_text(*stretch_) for stretch_ in found[:_SHOWN])
    if len(found) > _SHOWN:
        rest = found[_SHOWN:]
        count = sum(skipped for _, _, skipped in rest)
        yield f"{count:,} more in {len(rest)} later stretches of steps with more than 1 % skipped"


@dataclass(frozen=True)
class WrongSkips:
    """Updates skipped though loss and norm were within `sigma` deviations: their steps, ascending (a step
    that was taken back and skipped again counts each time). `rows`: skipped steps in metrics.jsonl, whatever
    for.
    """

    steps: Sequence[int] = ()
    rows: Sequence[int] = ()

    def text(self, resumed: int | None = None) -> str:
        """The finding in a line; empty where nothing was found.

        Args:
            resumed: the step from which the run is continued now.
        """
        if not self.steps:
            return ""
        count = len(self.steps)
        updates = "1 update, that of" if count == 1 else f"{count:,} updates, from"
        on = "" if count == 1 else " on"
        line = f"an earlier version's guard skipped {updates} step {self.steps[0]:,}{on}, for no reason: "
        line += "it misjudged what comes after its first window"
        after = 0 if resumed is None else sum(step > resumed for step in self.steps)
        again = "all of them" if after == count else f"{after:,} of them"
        return f"{line}; {again} lie after this checkpoint and are done again" if after else line


def wrong_skips(run: Path, guard: Mapping[str, Any]) -> WrongSkips:
    """Look through the rows of a run folder, also those that were taken back, for updates skipped in error.

    A row counts when it is skipped, within `sigma` deviations of the mean of the last `window` finite steps,
    and above the threshold of the versions that divided by all steps.

    Args:
        run: the run folder; one without rows has nothing to look through.
        guard: that section of its recipe.
    """
    window, sigma = guard.get("window"), guard.get("sigma")
    if guard.get("name") not in _GUARDS or not window or not sigma:
        return WrongSkips()
    kept = {row[0]: row for row in _train_rows(run / "metrics.jsonl")}
    course = [kept[step] for step in sorted(kept)]
    found = _judge(course, 0, window, sigma)
    for part in _parts(_train_rows(run / "logs" / "rewound.jsonl")):
        # What comes before is there even where no step of it was skipped.
        course = course or sorted(_train_rows(run / "metrics.jsonl", everything=True))
        before = [row for row in course if row[0] < part[0][0]]
        found += _judge([*before, *part], len(before), window, sigma)
    return WrongSkips(sorted(found), [row[0] for row in course if row[3]])


def _train_rows(path: Path, everything: bool = False) -> list[Row]:
    """The train rows of a file; none, unless `everything` is wanted, where no step of it was skipped, which
    is seen without parsing them.
    """
    try:
        with path.open("rb") as file:
            if not everything and not any(_SKIPPED.search(line) for line in file):
                return []
        return [
            (
                int(row["step"]),
                _number(row.get("loss")),
                _number(row.get("grad_norm")),
                row.get("skipped") is True,
            )
            for row in read_rows(path)
            if row.get("kind") == "train" and isinstance(row.get("step"), int)
        ]
    except OSError:
        return []


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _parts(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """What was taken back, in stretches of successive steps."""
    part: list[Row] = []
    for row in rows:
        if part and row[0] != part[-1][0] + 1:
            yield part
            part = []
        part.append(row)
    if part:
        yield part


def _judge(rows: Sequence[Row], begin: int, window: int, sigma: float) -> list[int]:
    """Steps of rows, from the one numbered `begin` on, that were skipped in error. Where rows are missing
    nothing is said before a window of them is known again.
    """
    if not any(row[3] for row in rows[begin:]):
        return []
    values: list[tuple[float, float]] = []  # of the finite steps since the last gap
    found, seen, last = [], 0, 0
    for number, (step, loss, norm, skipped) in enumerate(rows):
        if step != last + 1:
            seen, values = seen + step - last - 1, []
        last = step
        if not (math.isfinite(loss) and math.isfinite(norm)):
            continue
        if skipped and number >= begin and len(values) >= window and seen > window:
            recent, now = np.array(values[-window:]), np.array([loss, norm])
            if _above(now, recent, seen, sigma) and not _above(now, recent, window, sigma * (1 - _MARGIN)):
                found.append(step)
        values.append((loss, norm))
        seen += 1
    return found


def _above(now: Array, recent: Array, count: int, sigma: float) -> bool:
    """Whether a loss or a norm lies above mean and deviations, with sums over `recent` divided by `count`."""
    mean = recent.sum(0) / count
    deviation = np.sqrt(np.square(recent - mean).sum(0) / count)
    least = 1e-6 * np.maximum(1.0, np.abs(mean))
    return bool((now > mean + sigma * np.maximum(deviation, least)).any())


def skipped_lines(run: Run) -> list[str]:
    """Where many steps were skipped, and which for no reason of their own."""
    steps, recipe = run.train["step"], run.recipe
    often = often_skipped(
        steps, run.train.get("skipped", np.zeros(len(steps))), int(recipe.get("log.every", 1))
    )
    guard = {key.removeprefix("guard."): value for key, value in recipe.items() if key.startswith("guard.")}
    wrong = wrong_skips(run.path, guard).text()
    return [*([wrong] if wrong else []), *often_lines(often)]
