"""Schedules against HLAT's published numbers and closed forms."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hlat.errors import UserError
from hlat.optim.schedule import make_schedule
from hlat.registry import names

HLAT = {"warmup_steps": 2000, "horizon_steps": 500_000, "floor": 0.1}


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 0.0),
        (1, 1.5e-7),
        (2000, 3e-4),
        (23_842, 2.986e-4),
        (100_000, 2.722e-4),
        (200_000, 1.9743e-4),
        (300_000, 1.044e-4),
    ],
)
def test_hlat_7b_learning_rates(step: int, rate: float) -> None:
    found = 3e-4 * make_schedule("clamped_cosine", **HLAT)(step)
    assert found == pytest.approx(rate, abs=1e-12 if step < 2 else 5e-8)  # published with four digits


def test_hlat_reaches_the_floor_at_step_397994_and_stays() -> None:
    factor = make_schedule("clamped_cosine", **HLAT)
    assert 3e-4 * factor(397_994) == pytest.approx(3e-5, rel=1e-12)
    assert factor(397_900) > 0.1
    assert {factor(step) for step in (398_000, 450_000, 500_000, 900_000)} == {0.1}
    p = (397_994 - 2000) / 498_000
    assert p == pytest.approx(math.acos(-0.8) / math.pi, abs=2e-5)


def test_cosine_differs_from_the_clamped_one() -> None:
    plain, clamped = make_schedule("cosine", **HLAT), make_schedule("clamped_cosine", **HLAT)
    assert plain(400_000) > clamped(400_000) == 0.1
    assert plain(500_000) == pytest.approx(0.1)
    assert plain(251_000) == pytest.approx(0.1 + 0.9 * 0.5)


def test_linear_wsd_constant() -> None:
    settings = {"warmup_steps": 10, "horizon_steps": 110, "floor": 0.0}
    assert make_schedule("linear", **settings)(60) == pytest.approx(0.5)
    wsd = make_schedule("wsd", **settings, decay_fraction=0.2)
    assert (wsd(90), wsd(100), wsd(110)) == (1.0, pytest.approx(0.5), pytest.approx(0.0))
    assert make_schedule("constant", **settings)(5000) == 1.0
    assert make_schedule("constant", **settings)(5) == 0.5


@given(
    name=st.sampled_from(names("schedule")),
    warmup=st.integers(0, 50),
    length=st.integers(1, 500),
    floor=st.floats(0, 1),
)
def test_every_schedule_rises_then_never_rises(name: str, warmup: int, length: int, floor: float) -> None:
    factor = make_schedule(name, warmup_steps=warmup, horizon_steps=warmup + length, floor=floor)
    values = [factor(step) for step in range(warmup + length + 5)]
    assert values[warmup] == pytest.approx(1.0)
    assert all(a < b for a, b in zip(values[:warmup], values[1 : warmup + 1], strict=True))
    assert all(a >= b - 1e-12 for a, b in zip(values[warmup:-1], values[warmup + 1 :], strict=True))
    assert min(values[warmup:]) >= min(floor, 1.0) - 1e-9


def test_unknown_schedule() -> None:
    with pytest.raises(UserError, match="did you mean 'clamped_cosine'"):
        make_schedule("clamp_cosine", **HLAT)
