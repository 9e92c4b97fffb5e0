"""The guard: what it skips, and that it decides without the host."""

import math

import pytest
import torch

from hlat.errors import TrainingStopped, UserError
from hlat.train.guard import NoGuard, RewindGuard, SkipGuard, StopGuard

NAN, INF = float("nan"), float("inf")


def feed(guard: SkipGuard, values: list[tuple[float, float]]) -> list[bool]:
    return [bool(guard(torch.tensor(loss), torch.tensor(norm))) for loss, norm in values]


def test_non_finite_values_are_skipped_from_the_first_step() -> None:
    guard = SkipGuard(window=4)
    assert feed(guard, [(NAN, 1.0), (1.0, INF), (-INF, 1.0), (2.0, 1.0)]) == [False, False, False, True]
    assert float(guard.state()["seen"]) == 1


def test_a_spike_is_skipped_once_half_a_window_is_known() -> None:
    quiet = [(3.0 + 0.01 * (i % 3), 1.0 + 0.01 * (i % 2)) for i in range(20)]
    assert feed(SkipGuard(window=32), [*quiet[:10], (30.0, 1.0)])[-1] is True, "too early to judge"
    assert feed(SkipGuard(window=32), [*quiet, (30.0, 1.0), *quiet]) == [True] * 20 + [False] + [True] * 20
    assert feed(SkipGuard(window=32), [*quiet, (3.0, 50.0)])[-1] is False
    assert feed(SkipGuard(window=32, sigma=0), [*quiet, (30.0, 1.0)])[-1] is True
    assert feed(SkipGuard(window=32), [*quiet, (0.1, 0.01)])[-1] is True, "a drop is no spike"


EVEN = [(3.0 + 0.01 * (i % 3), 1.0 + 0.01 * (i % 2)) for i in range(20)]
ABSURD = {"loss": (1.6e6, 1.0), "norm": (3.0, 1e9), "both": (1e38, 1e38)}


@pytest.mark.parametrize("kind", [SkipGuard, StopGuard, RewindGuard])
@pytest.mark.parametrize("what", ABSURD)
@pytest.mark.parametrize("before", [1, 2, 20])
def test_absurd_first_steps_are_skipped(kind: type[SkipGuard], what: str, before: int) -> None:
    """With the window that a recipe has by default, and again when they come one after the other."""
    course = [*EVEN[:before], *[ABSURD[what]] * max(1, before // 4), *EVEN]
    wanted = [True] * before + [False] * max(1, before // 4) + [True] * 20
    assert feed(kind(), course) == wanted
    assert all(feed(kind(sigma=0), course)), "only what is not finite"


def test_an_absurd_first_step_does_not_hide_what_is_normal() -> None:
    assert all(feed(SkipGuard(), [(1e30, 1e30), *EVEN])) and all(feed(SkipGuard(), [(0.0, 0.0), *EVEN]))


@pytest.mark.parametrize("window", [2, 4, 16, 128, 1000])
def test_an_early_state_of_an_earlier_version_goes_on(window: int) -> None:
    """The same tensors mean the same: nothing was added."""
    guard = SkipGuard(window=window)
    assert {name: tuple(t.shape) for name, t in guard.state().items()} == {
        "history": (2, window),
        "seen": (),
        "skips_in_a_row": (),
    }


def courses() -> dict[str, list[tuple[float, float]]]:
    """Losses and norms of healthy beginnings, 64 steps each."""
    make = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 2, generator=make).tolist()
    steps = list(enumerate(noise))
    return {
        "falling evenly": [(11.0 - 0.1 * i, 3.0 * 0.95**i) for i, _ in steps],
        "falling by orders": [(11.0 * 0.8**i, 1e3 * 0.8**i) for i, _ in steps],
        "warm-up that overshoots": [
            (10.8 + 20 * math.exp(-((i - 30) ** 2) / 50), 1 + 200 * (25 < i < 35)) for i, _ in steps
        ],
        "too large at the beginning": [(700.0 / (1 + i), 1e5 / (1 + i) ** 2) for i, _ in steps],
        "from weights that know all": [
            (1e-7, 1e-8) if i % 9 else (15 * abs(a), 400 * abs(b)) for i, (a, b) in steps
        ],
        "a batch of one": [(3 * math.exp(a), math.exp(2 * b)) for _, (a, b) in steps],
        "slopes along random directions": [
            (3 + 0.1 * a, 100 * abs(b) if i % 3 else 0.0) for i, (a, b) in steps
        ],
        "batches with nothing to learn": [
            (0.0, 0.0) if i % 2 == 0 else (9.0 + a, 40.0) for i, (a, _) in steps
        ],
        "sums over tokens": [(1e5 * math.exp(0.5 * a), 1e5 * math.exp(b)) for _, (a, b) in steps],
        "a loss below zero": [(-5.0 - 0.1 * i + a, 2.0) for i, (a, _) in steps],
    }


@pytest.mark.parametrize("name", courses())
def test_healthy_beginnings_are_left_alone(name: str) -> None:
    assert all(feed(SkipGuard(), courses()[name]))


def test_a_lasting_change_of_level_is_accepted() -> None:
    guard = SkipGuard(window=16)
    kept = feed(guard, [(3.0 + 0.01 * (i % 3), 1.0) for i in range(20)] + [(9.0, 1.0)] * 20)
    assert kept[20] is False and kept[-1] is True


def test_patience() -> None:
    guard = SkipGuard(patience=3)
    feed(guard, [(NAN, 1.0)] * 2)
    guard.check(float(guard.metrics()["skips_in_a_row"]))
    feed(guard, [(NAN, 1.0)])
    with pytest.raises(TrainingStopped, match="3 steps in a row"):
        guard.check(float(guard.metrics()["skips_in_a_row"]))
    feed(guard, [(1.0, 1.0)])
    assert float(guard.metrics()["skips_in_a_row"]) == 0


def test_state_continues_bitwise() -> None:
    values = [(3.0 + 0.01 * (i % 5), 1.0) for i in range(30)]
    whole, first, second = SkipGuard(window=8), SkipGuard(window=8), SkipGuard(window=8)
    feed(whole, values)
    feed(first, values[:13])
    for name, tensor in second.state().items():
        tensor.copy_(first.state()[name])
    feed(second, values[13:])
    assert all(torch.equal(second.state()[name], tensor) for name, tensor in whole.state().items())


def test_nothing_is_read_on_the_host() -> None:
    """On the meta device any read of a value raises."""
    guard = SkipGuard().to(torch.device("meta"))
    scalar = torch.empty((), device="meta")
    assert guard(scalar, scalar).device.type == "meta"


def test_when_steps_are_taken_back() -> None:
    def row(loss: float | None, in_a_row: int) -> dict:
        return {"loss": loss, "grad_norm": 1.0, "skips_in_a_row": float(in_a_row), "skipped": in_a_row > 0}

    patient, quick = RewindGuard(bad_steps=3), RewindGuard()
    assert [patient.steps_back(row(None, n)) for n in (1, 2, 3, 4)] == [0, 0, 3, 4]
    assert [patient.steps_back(row(9.0, n)) for n in (1, 2)] == [1, 2], "a spike at once"
    assert quick.steps_back(row(None, 1)) == 1
    patient.check(1e9)
    with pytest.raises(TrainingStopped, match="a step is bad"):
        StopGuard().check(1.0)


def test_going_back_is_refused_where_it_cannot_be_done(tiny_recipe) -> None:
    recipe = tiny_recipe("guard.name=rewind")
    RewindGuard.refuse(recipe)
    section = recipe.checkpoint.model_copy(update={"format": "nxd"})
    with pytest.raises(UserError, match="complete some steps late"):
        RewindGuard.refuse(recipe.model_copy(update={"checkpoint": section}))


def test_no_guard_keeps_all() -> None:
    assert bool(NoGuard()(torch.tensor(NAN), torch.tensor(1.0)))
