"""Learning-rate schedules: pure functions of the step, as a factor of the peak rate.

`step` is the number of updates done before this one, so with a warm-up the very first update has learning
rate 0, as in HLAT's published runs (awslabs/HLAT 7b/scheduler.py). A schedule knows `horizon_steps`, never
where a run is stopped, so stopping and continuing cannot bend the curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated

from pydantic import Field

from hlat.registry import lookup, register

Schedule = Callable[[int], float]


@register("schedule", "constant")
def constant(progress: float, *, floor: float) -> float:
    """1 throughout."""
    return 1.0


@register("schedule", "linear")
def linear(progress: float, *, floor: float) -> float:
    """A straight line from 1 to `floor` at the horizon."""
    return 1.0 - (1.0 - floor) * progress


@register("schedule", "cosine")
def cosine(progress: float, *, floor: float) -> float:
    """Half a cosine from 1 to `floor`, which it reaches exactly at the horizon."""
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * progress))


@register("schedule", "clamped_cosine")
def clamped_cosine(progress: float, *, floor: float) -> float:
    """HLAT's: half a cosine from 1 to 0, never below `floor`. With floor 0.1 the floor is reached at 79.5 %
    of the way.
    """
    return max(floor, 0.5 * (1.0 + math.cos(math.pi * progress)))


@register("schedule", "wsd")
def wsd(progress: float, *, floor: float, decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.2) -> float:
    """Warm-up, stable, decay (arXiv 2404.06395): 1, then a straight line to `floor` over the last
    `decay_fraction`.
    """
    if progress <= 1.0 - decay_fraction:
        return 1.0
    return 1.0 - (1.0 - floor) * (progress - (1.0 - decay_fraction)) / decay_fraction


def make_schedule(
    name: str, *, warmup_steps: int, horizon_steps: int, floor: float, **options: float
) -> Schedule:
    """The factor of the peak learning rate at each step.

    Linear from 0 over `warmup_steps`, then the named curve over the rest of `horizon_steps`, then its last
    value.
    """
    curve = lookup("schedule", name, "schedule.name")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        progress = (step - warmup_steps) / max(1, horizon_steps - warmup_steps)
        return float(curve(min(1.0, progress), floor=floor, **options))

    return factor
