"""The guard: what it skips, and that it decides without the host."""

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
