"""How far a running average that is kept in bf16 and rounded to nearest can stay behind.

bf16 keeps 8 significant bits, so a change below 2^-9 of the value is lost: an average with a long memory
stops moving while what it averages goes on. Rounded stochastically it moves by the right amount in the mean.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

LARGE_STEPS, STEPS, FALL = 300, 4000, 0.1


@dataclass(frozen=True)
class Average:
    """A running average a = decay a + (1 - decay) x^power of gradients x; with decay None their mean over
    time.
    """

    decay: float | None
    power: int = 1

    def __str__(self) -> str:
        return "decay 1 - 1/t" if self.decay is None else f"decay {self.decay:g}"


def times_too_large(average: Average) -> float:
    """The average in bf16 over the same in fp64, after 300 steps with gradients of size 1 and 3,700 with
    gradients of 0.1.
    """
    exact = narrow = 0.0
    for step in range(1, STEPS + 1):
        x = (1.0 if step <= LARGE_STEPS else FALL) ** average.power
        weight = 1 / step if average.decay is None else 1 - average.decay
        exact += weight * (x - exact)
        narrow = to_bf16(narrow + weight * (x - narrow))
    return narrow / exact


def share_summed(count: int) -> float:
    """The sum of so many equal numbers in bf16, rounded to nearest each time, over the exact sum."""
    total = 0.0
    for _ in range(count):
        total = to_bf16(total + 1.0)
    return total / count


def to_bf16(x: float) -> float:
    """The nearest number with 8 significant bits, ties to even; bf16 but for its range."""
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(mantissa * 256), exponent - 8)
