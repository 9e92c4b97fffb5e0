"""Sums that are kept in bf16: they follow those in fp32, or a line says what they lose."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hlat.backend.precision import round_to
from hlat.errors import UserError
from hlat.mesh import Layout
from hlat.optim import MADA, SGD, AdamW, Adan, AMSGrad, AVGrad, HyperAdam, Lion, Muon, Yogi
from hlat.optim.base import Elementwise
from hlat.optim.rounding import FALL, LARGE_STEPS, Average, share_summed, times_too_large, to_bf16
from hlat.parallel.buckets import ParamSpec
from hlat.parallel.plan import part_of
from hlat.recipe import load
from hlat.registry import register
from hlat.train.assembly import Assembly
from hlat.train.rounding import rounding_lines
from hlat.train.run import refuse_unsupported
from hlat.train.state import check_same_run

SLOW = (0.9, 0.999)


def last_state(kind: type[Elementwise], dtype: torch.dtype, rounding: str, steps: int, **options: Any) -> Any:
    """The state after gradients that fall to a tenth."""
    p = torch.nn.Parameter(torch.zeros(512))
    optimizer = kind([p], lr=0.0, **options)
    optimizer.set_precision(dtype, rounding, 0)
    for step in range(steps):
        p.grad = torch.full_like(p, 1.0 if step < LARGE_STEPS else FALL)
        optimizer.step()
    return optimizer.state[p]


@pytest.mark.parametrize(
    ("kind", "slot", "options"), [(AdamW, "exp_avg_sq", {"betas": SLOW}), (AVGrad, "mean_sq", {})]
)
def test_moments_in_bf16_follow_those_in_fp32_when_rounded_stochastically(kind, slot, options) -> None:
    """Past several windows of a thousand steps; to nearest they stand still."""
    wide = last_state(kind, torch.float32, "nearest", 3000, **options)[slot].mean()
    kept = last_state(kind, torch.bfloat16, "stochastic", 3000, **options)[slot].float().mean()
    lost = last_state(kind, torch.bfloat16, "nearest", 3000, **options)[slot].float().mean()
    assert float(kept) == pytest.approx(float(wide), rel=0.02) and lost > 5 * wide


@pytest.mark.parametrize("decay", [0.9, 0.99, 0.999])
def test_the_factor_is_that_of_the_optimizer(decay: float) -> None:
    at = {"betas": (decay, decay)}
    wide = last_state(AdamW, torch.float32, "nearest", 4000, **at)
    lost = last_state(AdamW, torch.bfloat16, "nearest", 4000, **at)
    for slot, power in (("exp_avg", 1), ("exp_avg_sq", 2)):
        found = float(lost[slot][0].float() / wide[slot][0])
        assert times_too_large(Average(decay, power)) == pytest.approx(found, rel=0.02)


def test_to_bf16_is_torchs() -> None:
    x = torch.randn(2000, dtype=torch.float64) * torch.logspace(-20, 20, 2000, dtype=torch.float64)
    assert [to_bf16(float(v)) for v in x.float()] == x.float().bfloat16().double().tolist()
    ones = torch.ones((), dtype=torch.bfloat16)
    for count in (8, 256, 300, 1000):
        total = torch.zeros((), dtype=torch.bfloat16)
        for _ in range(count):
            total += ones
        assert share_summed(count) == float(total) / count


def test_every_average_is_a_slot() -> None:
    for kind in (AdamW, AMSGrad, AVGrad, Yogi, Adan, Lion, SGD, Muon, MADA, HyperAdam):
        p = torch.nn.Parameter(torch.ones(4, 4))
        rows = [p, torch.nn.Parameter(torch.ones(4))]
        optimizer = kind(rows, lr=1e-3)
        for row in rows:
            row.grad = torch.ones_like(row)
        optimizer.step()
        slots = {name for state in optimizer.state.values() for name in state}
        assert optimizer.averages() and set(optimizer.averages()) <= slots
        assert all(a.decay is None or 0 < a.decay < 1 for a in optimizer.averages().values())


@pytest.mark.parametrize(
    ("overrides", "rounding"),
    [
        ((), "nearest"),
        (("precision.states=bf16",), "stochastic"),
        (("precision.accumulate=bf16",), "stochastic"),
        (("precision.master=none",), "stochastic"),  # compute is bf16
        (("precision.master=none", "precision.compute=fp32"), "nearest"),
        (("precision.reduce=bf16",), "nearest"),
        (("precision.states=bf16", "precision.rounding=nearest"), "nearest"),
    ],
)
def test_the_default_depends_on_what_is_summed_in_bf16(overrides, rounding: str) -> None:
    recipe = load("tiny", ["precision.compute=bf16", *overrides])
    assert recipe.precision.rounding == rounding
    assert type(recipe).from_dict(recipe.to_dict()) == recipe


def test_one_line_says_what_rounding_costs(tiny_run) -> None:
    assert rounding_lines(tiny_run()) == []
    options = ("precision.states=bf16", "optim.betas=[0.9, 0.999]")
    (note,) = rounding_lines(tiny_run(*options))
    assert note.startswith("note: moments in bf16 are rounded stochastically")
    (line,) = rounding_lines(tiny_run(*options, "precision.rounding=nearest"))
    assert line.startswith("warning: precision.rounding is nearest (stochastic avoids this): moments in bf16")
    assert "exp_avg (decay 0.9) 1.0 times what it should be, exp_avg_sq (decay 0.999) 15 times" in line
    everything = ["precision.compute=bf16", "precision.master=none", "precision.accumulate=bf16"]
    lines = rounding_lines(tiny_run(*everything, "precision.rounding=nearest", "data.micro_batch=2"))
    assert ["weights" in lines[0], "gradients" in lines[1], len(lines)] == [True, True, 2]
    assert "a weight above 0.51 does not" in lines[0] and "of 4 equal ones 100 % arrive" in lines[1]


def test_gradients_in_bf16_add_up_in_the_mean(tiny_run) -> None:
    """512 gradients of size 1: to nearest the sum stops at 256."""
    recipe = ("precision.accumulate=bf16", "data.micro_batch=2")
    sums = {}
    for rounding in ("nearest", "stochastic"):
        run = tiny_run(*recipe, f"precision.rounding={rounding}")
        bucket = max(run.buckets, key=lambda bucket: bucket.length)
        spec = bucket.specs[0]
        bucket.begin(512)
        for _ in range(512):
            parameter = torch.nn.Parameter(torch.zeros(spec.shape))
            parameter.grad = torch.ones(spec.shape)
            bucket.accumulate(spec, parameter)
        sums[rounding] = spec.view(bucket.grad).float()
    assert sums["nearest"].unique().tolist() == [256.0]
    assert sums["stochastic"].mean() == pytest.approx(512, rel=2e-3)
    assert len(sums["stochastic"].unique()) > 5  # every element has random bits of its own


def test_accumulating_in_bf16_trains_and_is_the_same_twice(tiny_run, train_steps) -> None:
    options = ("precision.accumulate=bf16", "data.micro_batch=2")
    once, again = (train_steps(tiny_run(*options), 4) for _ in range(2))
    wide = train_steps(tiny_run("data.micro_batch=2"), 4)
    assert once == again
    for (loss, norm), (loss_wide, norm_wide) in zip(once, wide, strict=True):
        assert loss == pytest.approx(loss_wide, abs=2e-3) and norm == pytest.approx(norm_wide, rel=1e-2)
    assert once != wide


def test_stretches_of_a_sum_are_rounded_as_the_whole(tiny_run, monkeypatch) -> None:
    found = []
    for size in (1 << 22, 100):
        monkeypatch.setattr("hlat.parallel.buckets.SUM_AT_ONCE", size)
        run = tiny_run("precision.accumulate=bf16")
        bucket = run.buckets[0]
        spec = bucket.specs[-1]
        bucket.begin(3)
        for number in range(3):
            parameter = torch.nn.Parameter(torch.zeros(spec.shape))
            parameter.grad = torch.linspace(-1, 1 + number, spec.numel).view(spec.shape)
            bucket.accumulate(spec, parameter)
        found.append(spec.view(bucket.grad).clone())
    assert torch.equal(*found)


def test_moments_of_other_optimizers_are_not_narrowed_in_silence() -> None:
    @register("optim", "rounding-test")
    def plain(params, lr=1e-3, *, weight_decay: float = 0.0):
        return torch.optim.Adam(params, lr)

    recipe = load("tiny", ["optim.name=rounding-test", "precision.states=bf16"])
    with pytest.raises(UserError, match=r"precision.states: optimizer 'rounding-test' keeps its moments"):
        refuse_unsupported(recipe)
    refuse_unsupported(load("tiny", ["optim.name=rounding-test"]))


@pytest.mark.parametrize("seed", [2**63 - 1, 2**40])
def test_seeds_of_63_bits(seed: int) -> None:
    x = torch.full((4096,), 1.0 + 2**-9)
    for step in (torch.tensor(1), torch.tensor(2.0**24)):
        rounded = round_to(x, torch.bfloat16, "stochastic", seed=seed, step=step, offset=0)
        assert float(rounded.float().mean()) == pytest.approx(float(x[0]), abs=2e-4)


def test_rounding_to_the_same_value_is_exact() -> None:
    """AMSGrad's largest moment does not creep upwards by being written again."""
    x = torch.rand(4096).bfloat16()
    for step in range(1, 50):
        again = round_to(x.float(), torch.bfloat16, "stochastic", seed=1, step=torch.tensor(step), offset=0)
        assert torch.equal(again, x)


@pytest.mark.parametrize(("name", "alike"), [("norm.weight", True), ("layers.0.mlp.up.weight", False)])
@pytest.mark.parametrize("sequence", [False, True])
def test_copies_with_the_whole_gradient_round_alike(tiny_run, name: str, alike: bool, sequence: bool) -> None:
    """Tensor-parallel ranks that hold the same norms, and each have all of their gradient, would drift apart
    for good; everything else has random bits of its own on each rank.
    """
    run = tiny_run("precision.accumulate=bf16")
    layout, total, sums = Layout(dp=2, tp=2, sequence=sequence), torch.full((4096,), 1 + 2**-9), []
    for rank in range(layout.world):
        place = layout.place(rank)
        part = part_of(name, (64,) if alike else (64, 64), run.recipe.model, layout, place)
        bucket = replace(run.buckets[0], specs=[ParamSpec(name, part, 0, name)], round_sum=None)
        backend = SimpleNamespace(
            layout=layout, place=place, rank=rank, world=4, rounding=run.backend.rounding
        )
        Assembly(run.recipe, backend, None).round_sums([bucket], run.updates)  # type: ignore[arg-type]
        assert bucket.round_sum is not None
        sums.append(bucket.round_sum(total, 0, 1))
    assert torch.equal(sums[0], sums[1]) is (alike and not sequence)
    assert not torch.equal(sums[0], sums[2])  # another replica sees another gradient


def test_a_run_that_rounded_to_nearest_by_default_is_told_how_to_go_on(tiny_recipe) -> None:
    recipe = tiny_recipe("precision.states=bf16")
    former = recipe.to_dict()
    former["precision"]["rounding"] = "nearest"
    with pytest.raises(UserError) as error:
        check_same_run(recipe, "", {"recipe": former, "step": 3}, "run")
    assert error.value.fix.startswith("write precision.rounding=nearest to go on")
