"""Which stretches of the data order a run leaves out, and which data each of its steps reads.

The data order is cut into steps, counted from 1: step d holds the rows that step d of a run without skips
reads. A run with skips reads the same data in the same order without those stretches; everything that counts
steps (the learning rate, noise, checkpoints) counts steps of the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

Stretch = tuple[int, int]
"""First and last data step, both left out."""


def merged(stretches: Iterable[Sequence[int]]) -> list[Stretch]:
    """The same steps as ascending stretches that neither meet nor overlap."""
    out: list[Stretch] = []
    for first, last in sorted((int(a), int(b)) for a, b in stretches):
        if out and first <= out[-1][1] + 1:
            out[-1] = (out[-1][0], max(last, out[-1][1]))
        else:
            out.append((first, last))
    return out


@dataclass(frozen=True)
class Skips:
    """What a run leaves out.

    Args:
        given: by the recipe (`data.skip`).
        found: by the guard, in the order in which it found them.
    """

    given: tuple[Stretch, ...] = ()
    found: tuple[Stretch, ...] = ()

    @cached_property
    def _all(self) -> list[Stretch]:
        return merged([*self.given, *self.found])

    def position(self, step: int) -> int:
        """The data step that step `step` of the run reads, both counted from 1; 0 for 0."""
        for first, last in self._all:
            if first > step:
                break
            step += last - first + 1
        return step

    def add(self, first: int, last: int) -> Skips:
        """Also without these data steps."""
        return replace(self, found=(*self.found, (first, last)))

    def near(self, first: int, last: int, within: int) -> list[Stretch]:
        """What was found no further than `within` data steps before or after these."""
        return [(a, b) for a, b in self.found if a - last <= within and first - b <= within]

    def until(self, position: int) -> list[Stretch]:
        """What is left out up to a data step."""
        return [(first, min(last, position)) for first, last in self._all if first <= position]
