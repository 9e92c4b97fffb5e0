"""Watching the compiler: a run has a handful of graphs, and any other one is a mistake that costs minutes.

torch-xla records operations and compiles them at each graph boundary; a graph it knows costs nothing. What
makes a new one: a shape that changed, a Python number that changed, a value read on the host in the middle of
a step (which cuts the step's graph there).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field

from hlat.errors import TrainingStopped

WARM_UP = 3  # rounds in which a phase may compile: the first step's graph is not yet the steady one


@dataclass(frozen=True)
class Counts:
    """What torch-xla has counted since the process started: graphs compiled, seconds that took, values read
    on the host one by one.
    """

    graphs: int = 0
    seconds: float = 0.0
    reads: int = 0

    def __sub__(self, other: Counts) -> Counts:
        return Counts(self.graphs - other.graphs, self.seconds - other.seconds, self.reads - other.reads)


def count() -> Counts:
    """The counts now."""
    import torch_xla.debug.metrics as metrics

    compiled = metrics.metric_data("CompileTime")
    reads = [metrics.counter_value(name) for name in metrics.counter_names() if "_local_scalar_dense" in name]
    graphs, nanoseconds = (compiled[0], compiled[1]) if compiled else (0, 0.0)
    return Counts(int(graphs), nanoseconds / 1e9, sum(value or 0 for value in reads))


def extracting() -> bool:
    """Whether graphs are only collected, to be compiled ahead (`hlat train --precompile`)."""
    return os.environ.get("NEURON_EXTRACT_GRAPHS_ONLY", "0") == "1"


@dataclass
class GraphGuard:
    """Reports every compilation, and stops the run after too many that nobody expected.

    Each phase ("step", "eval", "checkpoint") may compile in its first `WARM_UP` rounds, and in as many after
    a change that was announced with `expect`.

    Args:
        limit: rounds with unexpected compilations that end the run; 0: never, as while graphs are collected.
        say: receives a line about each round that compiled.
        count: gives the counts (replaced in tests).
    """

    limit: int = field(default_factory=lambda: 0 if extracting() else 5)
    say: Callable[[str], None] = logging.getLogger(__name__).warning
    count: Callable[[], Counts] = count
    rounds: dict[str, int] = field(default_factory=dict)
    changes: dict[str, tuple[int, str]] = field(default_factory=dict)
    unexpected: int = 0
    total: int = 0
    _last: Counts = field(default_factory=Counts)
    _last_reads: int = -1

    def expect(self, phase: str, reason: str) -> None:
        """The next rounds of a phase compile, for this reason."""
        self.changes[phase] = self.rounds.get(phase, 0), reason

    def look(self, phase: str) -> None:
        """Call it at the end of each round of a phase. Raises TrainingStopped."""
        now = self.count()
        new, self._last = now - self._last, now
        self.rounds[phase] = number = self.rounds.get(phase, 0) + 1
        self.total += new.graphs
        usual, self._last_reads = new.reads == self._last_reads, new.reads
        if not new.graphs:
            return
        changed, why = self.changes.get(phase, (0, f"{phase} {number} since the start"))
        expected = number - changed <= WARM_UP
        if expected:
            reason = f"expected: {why}"
        elif new.reads and not usual:
            reason = (
                f"a value was read on the host {new.reads} times inside the {phase} (.item(), float(), if)"
            )
        else:
            reason = "a shape or a Python number in the graph changed"
        graphs = f"{new.graphs} graph{'s' * (new.graphs > 1)}"
        self.say(
            f"compiled {graphs} in {new.seconds:.1f} s at {phase} {number} ({self.total} in all): {reason}"
        )
        if expected:
            return
        self.unexpected += 1
        if self.limit and self.unexpected >= self.limit:
            raise TrainingStopped(
                f"{self.unexpected} rounds compiled graphs that nobody expected; the last: {reason}",
                where=f"{phase} {number}",
                fix="keep shapes and Python numbers the same in every step, read values only at log.every",
            )
