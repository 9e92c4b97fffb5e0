"""What a progress display knows: smoothed values, the loss over the whole run, time left. No drawing."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_BLOCKS = "▁▂▃▄▅▆▇█"


class Smooth:
    """Exponential mean with the start-up bias removed. Values that are None or not finite are passed over."""

    def __init__(self, span: float) -> None:
        self._decay = 1.0 - 2.0 / (span + 1.0)
        self._sum = self._weight = 0.0

    def add(self, value: float | None) -> None:
        """Take the next value."""
        if value is not None and math.isfinite(value):
            self._sum = self._decay * self._sum + (1 - self._decay) * value
            self._weight = self._decay * self._weight + (1 - self._decay)

    @property
    def value(self) -> float | None:
        """The mean so far; None before the first value."""
        return self._sum / self._weight if self._weight else None


class Trace:
    """A series of any length in constant memory: means of equally long stretches, at most `points` many."""

    def __init__(self, points: int = 128) -> None:
        self._limit = 2 * (points // 2)
        self._means: list[float] = []
        self._stretch = 1
        self._sum, self._count = 0.0, 0

    def add(self, value: float | None) -> None:
        """Take the next value; None or not finite is passed over."""
        if value is None or not math.isfinite(value):
            return
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count < self._stretch:
            return
        self._means.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self._means) == self._limit:
            pairs = zip(self._means[::2], self._means[1::2], strict=True)
            self._means = [(a + b) / 2 for a, b in pairs]
            self._stretch *= 2

    def values(self) -> list[float]:
        """The means, oldest first, the unfinished stretch last."""
        return self._means + ([self._sum / self._count] if self._count else [])


class Arrivals:
    """When which step was done, over a run of any length in constant memory: the last `recent` times, and as
    many evenly over all of them.
    """

    def __init__(self, recent: int = 256) -> None:
        self._limit = 2 * (recent // 2)
        self.clear()

    def clear(self) -> None:
        """Forget all."""
        self._recent: deque[tuple[float, int]] = deque(maxlen=self._limit)
        self._thinned: list[tuple[float, int]] = []
        self._count, self._stride = 0, 1

    def add(self, now: float, step: int) -> None:
        """All steps up to `step` are done, at time `now` (seconds)."""
        self._recent.append((now, step))
        if self._count % self._stride == 0:
            self._thinned.append((now, step))
        self._count += 1
        if len(self._thinned) == self._limit:
            self._thinned, self._stride = self._thinned[::2], 2 * self._stride

    def seconds_a_step(self) -> float | None:
        """Mean over the last `recent` arrivals, or over the last quarter of the time where that is longer:
        what comes once in many steps (an evaluation, a save) then has its share. None before there are two.
        """
        if self._count < 2:
            return None
        (first, _), (last, last_step) = self._thinned[0], self._recent[-1]
        before = [entry for entry in self._thinned if entry[0] <= last - (last - first) / 4]
        then, step = min(before[-1], self._recent[0])
        return (last - then) / (last_step - step) if last_step > step else None


def sparkline(values: list[float], width: int) -> str:
    """Values as at most `width` block characters, drawn on a logarithmic scale when all are positive.

    The logarithm keeps the late, slow part of a loss curve visible beside its steep start.
    """
    if not values or width < 1:
        return ""
    cells = min(width, len(values))
    edges = [index * len(values) // cells for index in range(cells + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    if min(means) > 0:
        means = [math.log(mean) for mean in means]
    low, high = min(means), max(means)
    if high - low <= 1e-12 * max(1.0, abs(high)):
        return _BLOCKS[0] * cells
    scale = (len(_BLOCKS) - 1) / (high - low)
    return "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)


@dataclass
class Progress:
    """The state of a run as its metric rows tell it.

    Args:
        total: steps of the whole run.
        step: steps already done when the display starts (a resumed run).
    """

    total: int
    step: int = 0
    started: float = 0.0
    last: Mapping[str, Any] = field(default_factory=dict)
    loss: Smooth = field(default_factory=lambda: Smooth(20))
    per_second: Smooth = field(default_factory=lambda: Smooth(20))
    mfu: Smooth = field(default_factory=lambda: Smooth(20))
    trace: Trace = field(default_factory=Trace)
    skipped: int = 0
    held_out: tuple[int, Mapping[str, Any]] | None = None
    checkpoint: tuple[int, float] | None = None
    _arrivals: Arrivals = field(default_factory=Arrivals)
    _is_new: bool = False

    def train(self, row: Mapping[str, Any]) -> None:
        """Take a row of kind `train`."""
        self.step, self.last = int(row["step"]), row
        self.skipped += bool(row.get("skipped"))
        for name, smooth in (("loss", self.loss), ("tokens_per_second", self.per_second), ("mfu", self.mfu)):
            smooth.add(row.get(name))
        self.trace.add(row.get("loss"))
        self._is_new = True

    def arrived(self, now: float) -> bool:
        """The rows since the last call came together, at time `now` (seconds): the newest of them says which
        step was done by then. Returns whether there were any.
        """
        is_new, self._is_new = self._is_new, False
        if is_new:
            self._arrivals.add(now, self.step)
        return is_new

    def rewind(self, step: int) -> None:
        """The run goes back to the end of an earlier step."""
        self.step, self._is_new = step, False
        self._arrivals.clear()

    def evaluated(self, row: Mapping[str, Any]) -> None:
        """Take a row of kind `eval`."""
        self.held_out = (int(row["step"]), row)

    def seconds_left(self) -> float | None:
        """Remaining time at the recent pace, evaluations and saves included; None before there is a pace.

        The first step, which may compile, only sets the start of the clock.
        """
        if self.step >= self.total:
            return 0.0
        pace = self._arrivals.seconds_a_step()
        return None if pace is None else (self.total - self.step) * pace
