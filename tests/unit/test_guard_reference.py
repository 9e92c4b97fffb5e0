"""The guard against a plain reference, over tens of windows: whatever it has counted, each decision is by
mean and standard deviation of the last `window` finite steps.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hlat.errors import TrainingStopped
from hlat.train.guard import RewindGuard, SkipGuard, StopGuard

NEAR = 1e-4  # of a threshold: there fp32 and fp64 may differ, and the guard's word counts


class Reference:
    """What the documentation says, in fp64 and with a deque."""

    def __init__(self, window: int, sigma: float) -> None:
        self.window, self.sigma = window, sigma
        self.recent: deque[tuple[float, float]] = deque(maxlen=window)
        self.in_a_row = 0

    def copy(self) -> Reference:
        other = Reference(self.window, self.sigma)
        other.recent, other.in_a_row = self.recent.copy(), self.in_a_row
        return other

    def limits(self) -> np.ndarray:
        """The highest loss and norm let through."""
        if not self.sigma or not self.recent:
            return np.full(2, np.inf)
        values = np.array(self.recent)
        if len(values) < self.window // 2:
            return (10, 1000) * np.exp(np.log(np.maximum(values, (10, 1000))).mean(0))
        mean = values.mean(0)
        return mean + self.sigma * np.maximum(values.std(0), 1e-6 * np.maximum(1, np.abs(mean)))

    def agrees(self, now: np.ndarray, keep: bool) -> bool:
        """Whether a decision is right; takes note of the step."""
        finite, limits = bool(np.isfinite(now).all()), self.limits()
        unsure = finite and bool((np.abs(now - limits) < NEAR * (1 + np.abs(limits))).any())
        right = keep == (finite and bool((now <= limits).all())) or unsure
        if finite:
            self.recent.append((float(now[0]), float(now[1])))
        self.in_a_row = 0 if keep else self.in_a_row + 1
        return right


def steps(seed: int, count: int, window: int) -> Iterator[np.ndarray]:
    """Loss and norm of each step as fp32: noise around levels that change now and then, spikes, values that
    are not finite, constant stretches.
    """
    make = np.random.default_rng(seed)
    level, noise = make.uniform(0.1, 9, 2), 10.0 ** make.uniform(-7, -1)
    for _ in range(count):
        if make.random() < 0.3 / window:
            level, noise = make.uniform(0.1, 9, 2), 10.0 ** make.uniform(-7, -1)
        now = level * (1 + noise * make.standard_normal(2))
        kind = make.random()
        if kind < 0.05:
            now[make.integers(2)] *= 1 + 10.0 ** make.uniform(-2, 6)
        elif kind < 0.09:
            now[make.integers(2)] = (np.nan, np.inf, -np.inf)[make.integers(3)]
        yield now.astype(np.float32)


def decide(guard: SkipGuard, now: np.ndarray) -> bool:
    loss, norm = torch.from_numpy(now)
    return bool(guard(loss, norm))


def copied(guard: SkipGuard) -> SkipGuard:
    """Another guard with the same state, as a checkpoint gives it."""
    own = {"bad_steps": guard.bad_steps} if isinstance(guard, RewindGuard) else {}
    other = type(guard)(window=guard.window, sigma=guard.sigma, **own)
    for name, tensor in other.state().items():
        tensor.copy_(guard.state()[name])
    return other


def grown(guard: SkipGuard, seen: int) -> SkipGuard:
    """The state that versions saved whose count grew with the steps: the same ring, `seen` of them ago."""
    whole = copied(guard)
    whole.state()["seen"].fill_(seen - (seen - int(whole.state()["seen"])) % guard.window)
    return whole


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    window=st.sampled_from((2, 3, 5, 8, 13)),
    sigma=st.sampled_from((0.0, 0.5, 2.0, 6.0)),
    kind=st.sampled_from((SkipGuard, StopGuard, RewindGuard)),
    former=st.sampled_from((None, 1000, 4_608, 2**24 - 7)),
)
def test_each_decision_is_that_of_the_last_window(
    seed: int, window: int, sigma: float, kind: Any, former: int | None
) -> None:
    """Over 25 windows, with a save and a load in the middle; also from a state of a version that counted all
    steps, up to where fp32 stops counting.
    """
    guard, reference = kind(window=window, sigma=sigma), Reference(window, sigma)
    length = 25 * window
    for number, now in enumerate(steps(seed, length, window)):
        if number in (length // 3, length // 2):
            guard = copied(guard)
        if former and number == length // 4:
            guard = grown(guard, former)
            reference.in_a_row = 0
        assert reference.agrees(now, decide(guard, now)), (number, now, reference.limits(), guard.state())
        assert float(guard.metrics()["skips_in_a_row"]) == reference.in_a_row
        assert float(guard.state()["seen"]) < 2 * window, "a count that grows stops counting some day"
    assert {t.dtype for t in guard.state().values()} == {torch.float32}, "what checkpoints hold so far"


@pytest.mark.parametrize("seen", [2**24 - 3, 2**24])
def test_a_state_where_fp32_stops_counting(seen: int) -> None:
    """Just below, the ring goes on; where the count has stood still the ring is no measure, and half a window
    is hardly judged.
    """
    make, guard = np.random.default_rng(0), SkipGuard(window=16)
    even = (np.array([3, 1]) + 0.01 * make.standard_normal((4 * 16, 2))).astype(np.float32)
    assert all(decide(guard, now) for now in even)
    guard.state()["seen"].fill_(seen)
    guard.state()["skips_in_a_row"].fill_(99)
    far = np.array([3.5, 1], np.float32)
    assert decide(copied(guard), far) is (seen == 2**24)
    other = copied(guard)
    decide(other, np.array([np.nan, 1], np.float32))
    other.check(float(other.metrics()["skips_in_a_row"]))  # skips for a count too large are forgiven
    level = even - np.array([2, 0.5], np.float32)  # lower than the ring, then up again: both are news
    assert all(decide(guard, now) for now in [*level, *level])
    assert not decide(guard, far) and decide(guard, level[0])


def test_equal_values_are_no_spikes() -> None:
    """Neither rounding of large equal values nor the squares of the largest mislead it."""
    guard = SkipGuard(window=8)
    large = [np.array([11.3, 4000.0 + (i == 30) / 2048], np.float32) for i in range(40)]
    assert all(decide(guard, now) for now in large)
    assert not decide(guard, np.array([11.4, 4000], np.float32))
    huge = SkipGuard(window=128)
    even = [np.array([3 + i % 3, 1], np.float32) for i in range(200)]
    assert all(decide(huge, now) for now in even)
    for _ in range(3):
        assert not decide(huge, np.array([1e30, 1], np.float32))
    assert decide(huge, even[0])


def test_stop_ends_a_run_at_the_first_and_not_before() -> None:
    guard, make = StopGuard(window=16), np.random.default_rng(1)
    for _ in range(60 * 16):
        decide(guard, (np.array([3, 1]) + 0.01 * make.standard_normal(2)).astype(np.float32))
        guard.check(float(guard.metrics()["skips_in_a_row"]))
    decide(guard, np.array([3.5, 1], np.float32))
    with pytest.raises(TrainingStopped):
        guard.check(float(guard.metrics()["skips_in_a_row"]))


@settings(max_examples=6, deadline=None)
@given(seed=st.integers(0, 2**32), bad_steps=st.integers(1, 3), every=st.integers(3, 9))
def test_going_back_goes_back_to_the_window_of_then(seed: int, bad_steps: int, every: int) -> None:
    """Steps are taken back as the reference says, and the window is that of the checkpoint again."""
    window, data = 8, list(steps(seed, 200, 8))
    guard, reference = RewindGuard(window=window, bad_steps=bad_steps), Reference(window, 6.0)
    number, saved, back = 0, (0, copied(guard), reference.copy()), 0
    left_out: set[int] = set()
    while number < len(data):
        now = data[number]
        number += 1
        if number - 1 in left_out:
            continue
        keep = decide(guard, now)
        assert reference.agrees(now, keep)
        finite = [float(v) if np.isfinite(v) else None for v in now]
        row = {"loss": finite[0], "grad_norm": finite[1], "skips_in_a_row": reference.in_a_row}
        expected = reference.in_a_row if None not in finite or reference.in_a_row >= bad_steps else 0
        if not keep:
            assert guard.steps_back(row) == expected
        if not keep and expected:
            back += 1
            left_out.add(number - 1)
            number, guard, reference = saved[0], copied(saved[1]), saved[2].copy()
        elif number % every == 0 and keep:
            saved = (number, copied(guard), reference.copy())
    assert back or bad_steps > 1
