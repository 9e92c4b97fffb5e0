"""How sure a figure is that was measured on a few questions.

A figure is a ratio of sums over the questions (a mean where each counts 1; bits over bytes for bits per
byte), and its standard error comes from the questions' contributions to it (delta method; for a mean the
usual s / sqrt(n)). Scores of 0 or 1 have exact laws: McNemar's test for a difference, Wilson's interval for a
share. For all others the error is itself an estimate from the same few questions, so their law is Student's t
with n - 1 degrees of freedom; a normal law would call 29 % of differences of nothing significant at two
questions, and 9 % at ten.

Where nothing can be known of an error there is none: with fewer than three questions, and where it is 0 with
fewer than six (six equal differences have a probability of 1/32 under the sign test, five of 1/16).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

FEWEST = 3
FEWEST_ALIKE = 6
LEVEL = 0.05
_ROUNDING = 1e-12
Scores = dict[Any, tuple[float, float]]
"""Question -> (what it adds to the sum, what it weighs)."""


@dataclass(frozen=True)
class Estimate:
    """A ratio of sums. error: its standard error; 0 where all questions say the same, None with fewer than
    two of them or without any weight. count: of the questions.
    """

    value: float
    error: float | None
    count: int

    @property
    def known_error(self) -> float | None:
        """The standard error where it says something."""
        return error_known(self.error, self.count)


def error_known(error: float | None, count: int) -> float | None:
    """A standard error, or None where so few questions say nothing about it."""
    if error is None or not math.isfinite(error) or count < FEWEST:
        return None
    return None if error == 0 and count < FEWEST_ALIKE else error


def ratio(pairs: Collection[tuple[float, float]], sizes: Collection[float] = ()) -> Estimate:
    """Sum over weight of (score, weight) pairs, nan without any weight.

    Args:
        sizes: of the numbers that the scores are differences of: those are exact to their last bits only.
    """
    weight, count = math.fsum(size for _, size in pairs), len(pairs)
    if not weight:
        return Estimate(math.nan, None, count)
    value = math.fsum(score for score, _ in pairs) / weight
    if count < 2:
        return Estimate(value, None, count)
    rests = [score - value * size for score, size in pairs]
    # Equal differences of inexact scores differ in their last bits, which is no spread.
    largest = max(map(abs, [*sizes, *(score for score, _ in pairs)]))
    if max(map(abs, rests)) <= _ROUNDING * largest:
        return Estimate(value, 0.0, count)
    return Estimate(
        value, math.sqrt(math.fsum(r * r for r in rests) * count / (count - 1)) / abs(weight), count
    )


def student_p(value: float, error: float | None, count: int) -> float:
    """Two-sided p-value of a difference from 0 by Student's t law; 1 where nothing is known of its error.
    Where all questions differ by the same, that of the sign test.
    """
    known = error_known(error, count)
    if known is None or value == 0:
        return 1.0
    if known == 0:
        return 2.0 ** (1 - count)
    from scipy.special import stdtr

    return float(2 * stdtr(count - 1, -abs(value) / known))


def mcnemar(gained: int, lost: int) -> float:
    """Two-sided p-value of the exact test: of the questions that one model alone got right, as many on one
    side, if each side were as likely (McNemar 1947; binomial).
    """
    total = gained + lost
    tail = sum(math.comb(total, k) for k in range(min(gained, lost) + 1)) / 2**total
    return min(1.0, 2 * tail)


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979)."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    corrected, highest = [0.0] * len(values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = highest
    return corrected


def is_binary(pairs: Collection[tuple[float, float]]) -> bool:
    """Whether every score is 0 or 1 and counts once."""
    return all(pair in ((0.0, 1.0), (1.0, 1.0)) for pair in pairs)


def interval(pairs: Collection[tuple[float, float]]) -> tuple[float, float] | None:
    """The 95 % interval of a figure, None where nothing is known of its error: Wilson's score interval (1927)
    of a share, otherwise value ± Student's t times the standard error.
    """
    from scipy.special import ndtri, stdtrit

    found = ratio(pairs)
    if found.count >= FEWEST and is_binary(pairs):
        z, n, share = float(ndtri(1 - LEVEL / 2)), found.count, found.value
        centre = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
        return max(0.0, centre - half), min(1.0, centre + half)
    if not found.known_error:
        return None
    half = float(stdtrit(found.count - 1, 1 - LEVEL / 2)) * found.known_error
    return found.value - half, found.value + half
