"""Where the time of a supervised run went, and how much of it made steps that lasted.

Goodput is the time of steps that stayed, over the wall time from the first start to the end. A step that was
trained again after a restart counts once; the first step of an attempt, which may compile, does not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hlat.observe.heartbeat import STEP, Heartbeat
from hlat.observe.jsonl import read_rows
from hlat.supervise.watch import kind_of

DOWN = "down"  # no rank runs, or none has said anything yet


@dataclass
class Span:
    """One attempt as seen from outside. start, end: monotonic seconds. first: the first step it trained, 0
    for none. steps: seconds by step. other: seconds by kind of phase.
    """

    start: float
    end: float = 0.0
    first: int = 0
    steps: dict[int, float] = field(default_factory=dict)
    other: dict[str, float] = field(default_factory=dict)


class Timeline:
    """Books the time between two looks on what the lowest rank did at the second of them."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self._last = 0.0

    def start(self, now: float) -> None:
        """An attempt begins."""
        self.spans.append(Span(now, now))
        self._last = now

    def look(self, now: float, beats: Mapping[int, Heartbeat]) -> None:
        """The heartbeats at this moment."""
        span, seconds = self.spans[-1], now - self._last
        self._last = span.end = now
        beat = beats[min(beats)] if beats else None
        if beat is None:
            span.other[DOWN] = span.other.get(DOWN, 0.0) + seconds
            return
        span.first = span.first or beat.first
        if beat.phase == STEP:
            span.steps[beat.step] = span.steps.get(beat.step, 0.0) + seconds
        else:
            kind = kind_of(beat.phase)
            span.other[kind] = span.other.get(kind, 0.0) + seconds

    def finish(self, now: float) -> None:
        """The attempt has ended; what came after the last look made no step."""
        span = self.spans[-1]
        span.other[DOWN] = span.other.get(DOWN, 0.0) + now - self._last
        self._last = span.end = now


def table(spans: Sequence[Span]) -> dict[str, float]:
    """Seconds by what they were spent on; their sum is the wall time. `stepping` is what lasted, `repeated`
    what a later attempt trained again, `down` includes the pauses between attempts.
    """
    total = {"stepping": 0.0, "repeated": 0.0}
    for number, span in enumerate(spans):
        later = [other.first for other in spans[number + 1 :] if other.first]
        again = min(later, default=None)
        for step, seconds in span.steps.items():
            total["stepping" if again is None or step < again else "repeated"] += seconds
        for kind, seconds in span.other.items():
            total[kind] = total.get(kind, 0.0) + seconds
    pauses = sum(b.start - a.end for a, b in zip(spans, spans[1:], strict=False))
    total[DOWN] = total.get(DOWN, 0.0) + pauses
    return total


def goodput(spans: Sequence[Span]) -> float:
    """Between 0 and 1; 0 before anything ran."""
    wall = spans[-1].end - spans[0].start if spans else 0.0
    return table(spans)["stepping"] / wall if wall > 0 else 0.0


def goodput_of_metrics(metrics: Path, spans: Sequence[Span]) -> float:
    """The same from the rows of metrics.jsonl, which has each step once, with its own time."""
    wall = spans[-1].end - spans[0].start if spans else 0.0
    seconds = 0.0
    for row in read_rows(metrics) if metrics.exists() else ():
        if row.get("kind") == "train":
            step = row["step"]
            made_by = next((span for span in reversed(spans) if 0 < span.first <= step), None)
            if made_by is not None and made_by.first != step:
                seconds += row.get("step_seconds") or 0.0
    return seconds / wall if wall > 0 else 0.0
