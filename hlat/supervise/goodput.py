"""Where the time of a supervised run went, and how much of it made steps that lasted.

Goodput is the time of steps that stayed, over the wall time from the first start to the end. A step that was
trained again after a restart counts once; the first step of an attempt, which may compile, does not count.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from hlat.observe.heartbeat import STEP, Heartbeat
from hlat.supervise.watch import kind_of

DOWN = "down"  # no rank runs, or none has said anything yet
REPEATED = "repeated"


class StepTimes:
    """Seconds by step, from some step on: eight bytes each, as an attempt may have millions."""

    def __init__(self) -> None:
        self._first, self._seconds = 0, array("d")

    def add(self, first: int, last: int, seconds: float) -> None:
        """The steps from `first` to `last` took so long together."""
        if not self._seconds:
            self._first = first
        if first < self._first:
            self._seconds[:0] = array("d", bytes(8 * (self._first - first)))
            self._first = first
        self._seconds.extend(array("d", bytes(8 * max(0, last + 1 - self._first - len(self._seconds)))))
        for place in range(first - self._first, last + 1 - self._first):
            self._seconds[place] += seconds / (last + 1 - first)

    def take_after(self, step: int) -> float:
        """Forget the steps after this one. Returns what they took."""
        keep = max(0, step + 1 - self._first)
        taken = sum(self._seconds[keep:])
        del self._seconds[keep:]
        return taken

    def total(self, before: int | None = None) -> float:
        """Seconds of all steps, or of those before one."""
        count = len(self._seconds) if before is None else max(0, before - self._first)
        return sum(self._seconds[:count])


@dataclass
class Span:
    """One attempt as seen from outside. start, end: monotonic seconds. first: the first step it trained, 0
    for none. steps: seconds by step. other: seconds by kind of phase.
    """

    start: float
    end: float = 0.0
    first: int = 0
    steps: StepTimes = field(default_factory=StepTimes)
    other: dict[str, float] = field(default_factory=dict)

    def book(self, kind: str, seconds: float) -> None:
        """So many seconds of one kind."""
        self.other[kind] = self.other.get(kind, 0.0) + seconds


class Timeline:
    """Books what the lowest rank of this machine says it spent its time on. What nobody accounts for (the
    launcher starts, a rank is dead or stopped) is `down`.
    """

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._last: Heartbeat | None = None

    def start(self, now: float) -> None:
        """An attempt begins."""
        self.spans.append(Span(now, now))
        self._last = None

    def look(self, beats: Mapping[int, Heartbeat]) -> None:
        """The newest heartbeats."""
        beat = beats[min(beats)] if beats else None
        if beat is None or (self._last is not None and beat.stamp == self._last.stamp):
            return
        span, last = self.spans[-1], self._last
        before = last.spent if last is not None and last.pid == beat.pid else {}
        span.first = span.first or beat.first
        reached = last.step if last is not None and last.pid == beat.pid else 0
        if beat.rewinds > (last.rewinds if last is not None and last.pid == beat.pid else 0):
            reached = beat.back_to - 1
            span.book(REPEATED, span.steps.take_after(reached))
        for phase, seconds in beat.spent.items():
            new = seconds - before.get(phase, 0.0)
            if new <= 0:
                continue
            if phase != STEP:
                span.book(kind_of(phase), new)
                continue
            span.steps.add(min(reached + 1, beat.step) if reached else beat.step, beat.step, new)
        self._last = beat

    def finish(self, now: float) -> None:
        """The attempt has ended."""
        span = self.spans[-1]
        span.end = now
        booked = span.steps.total() + sum(span.other.values())
        span.book(DOWN, max(0.0, now - span.start - booked))


def table(spans: Sequence[Span]) -> dict[str, float]:
    """Seconds by what they were spent on; their sum is the wall time. `stepping` is what lasted, `repeated`
    what a later attempt trained again, `down` includes the pauses between attempts.
    """
    total = {"stepping": 0.0, REPEATED: 0.0}
    for number, span in enumerate(spans):
        later = [other.first for other in spans[number + 1 :] if other.first]
        again = min(later, default=None)
        lasted = span.steps.total(again)
        total["stepping"] += lasted
        total[REPEATED] += span.steps.total() - lasted
        for kind, seconds in span.other.items():
            total[kind] = total.get(kind, 0.0) + seconds
    pauses = sum(b.start - a.end for a, b in zip(spans, spans[1:], strict=False))
    total[DOWN] = total.get(DOWN, 0.0) + pauses
    return total


def goodput(spans: Sequence[Span]) -> float:
    """Between 0 and 1; 0 before anything ran."""
    wall = spans[-1].end - spans[0].start if spans else 0.0
    return table(spans)["stepping"] / wall if wall > 0 else 0.0
