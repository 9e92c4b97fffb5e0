"""Optimizers against torch.optim, the guard's select, storage below fp32, and groups."""

import pytest
import torch

from hlat.backend.precision import hash_bits, round_to, stochastic_round
from hlat.errors import UserError
from hlat.optim import SGD, AdamW
from hlat.optim.base import CHUNK, Elementwise, create_state, guarded_step
from hlat.optim.groups import Group, Override, assign_groups


def pair(shape: tuple[int, ...], seed: int = 0) -> tuple[torch.nn.Parameter, torch.nn.Parameter]:
    start = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())


def gradient(step: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1000 + step)) * 10 ** (step % 5 - 3)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", [(7, 33), (CHUNK + 5,)])
def test_adamw_equals_torch(shape: tuple[int, ...], compiled: bool) -> None:
    ours, theirs = pair(shape)
    mine = AdamW([ours], lr=torch.tensor(1e-2), betas=(0.9, 0.95), weight_decay=0.1)
    if compiled:
        mine.compile()
    reference = torch.optim.AdamW([theirs], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(100):
        ours.grad = gradient(step, shape)
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    assert (ours - pair(shape)[0]).abs().max() > 0.1


def test_sgd_equals_torch() -> None:
    ours, theirs = pair((50,))
    mine = SGD([ours], lr=1e-2, momentum=0.9)
    reference = torch.optim.SGD([theirs], lr=1e-2, momentum=0.9)
    for step in range(50):
        ours.grad = gradient(step, (50,))
        theirs.grad = ours.grad.clone()
        mine.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)


def test_closure_runs_with_gradients() -> None:
    p = torch.nn.Parameter(torch.tensor([3.0]))
    optimizer = AdamW([p], lr=0.1, weight_decay=0.0)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9.0
    assert p.item() == pytest.approx(2.9, abs=1e-4)


class Plain(torch.optim.SGD):
    """An optimizer that knows nothing of HLAT."""


@pytest.mark.parametrize("make", [AdamW, SGD, lambda p, lr: Plain(p, lr=lr, momentum=0.9)])
def test_a_skipped_step_changes_no_bit_and_a_kept_one_is_ordinary(make) -> None:
    p, twin = pair((300,))
    optimizer, ordinary = make([p], lr=0.1), make([twin], lr=0.1)
    yes, no, one = torch.tensor(True), torch.tensor(False), torch.tensor(1.0)
    for step in range(3):
        p.grad, twin.grad = gradient(step, (300,)), gradient(step, (300,))
        guarded_step(optimizer, yes, one)
        ordinary.step()
    torch.testing.assert_close(p, twin, rtol=0, atol=0)
    before = p.detach().clone()
    saved = {k: v.clone() for k, v in optimizer.state[p].items() if torch.is_tensor(v)}
    p.grad = torch.full((300,), float("nan"))
    guarded_step(optimizer, no, one)
    assert torch.equal(p, before)
    assert saved and all(torch.equal(optimizer.state[p][k], v) for k, v in saved.items())


def test_clip_scales_the_gradient() -> None:
    p, twin = pair((40,))
    a, b = SGD([p], lr=0.1), SGD([twin], lr=0.1)
    p.grad = gradient(1, (40,))
    twin.grad = p.grad * 0.25
    a.step(clip=torch.tensor(0.25))
    b.step()
    torch.testing.assert_close(p, twin, rtol=1e-6, atol=1e-7)


def test_state_can_be_made_before_the_first_step() -> None:
    p, twin = pair((20,))
    early, late = AdamW([p], lr=0.1), AdamW([twin], lr=0.1)
    create_state(early)
    assert torch.equal(p, twin) and any(v.numel() == 20 for v in early.state[p].values())
    p.grad, twin.grad = gradient(0, (20,)), gradient(0, (20,))
    early.step()
    late.step()
    assert torch.equal(p, twin)


def test_stochastic_rounding_is_unbiased_and_to_a_neighbour() -> None:
    x = torch.tensor([1.0 + 2**-9, -3.0 - 2**-10, 1e-3, 0.0, 7.0]).repeat_interleave(40_000)
    bits = hash_bits(x.numel(), seed=3, step=torch.tensor(5), offset=0, device=x.device)
    assert bits.min() >= 0 and bits.max() < 1 << 16
    y = stochastic_round(x, bits).float()
    spacing = torch.tensor([2**-7, 2**-6, 2**-17, 1.0, 2**-5])
    error = (y - x).view(5, -1)
    assert (error.abs() < spacing[:, None]).all()
    # The mean of n draws with spacing s has a standard deviation of at most s / (2 sqrt(n)); five of those.
    assert (error.mean(1).abs() < 5 * spacing / (2 * 200)).all()
    assert y.view(5, -1)[3:].unique().tolist() == [0.0, 7.0]
    assert y.view(5, -1)[0].unique().numel() == 2


def test_stochastic_rounding_keeps_non_finite_values_and_depends_on_step_and_place() -> None:
    odd = torch.tensor([float("inf"), -float("inf"), float("nan")])
    rounded = stochastic_round(odd, torch.full((3,), 65535, dtype=torch.int32))
    assert rounded[0] == float("inf") and rounded[1] == -float("inf") and rounded[2].isnan()
    x = torch.full((4096,), 1.0 + 2**-9)

    def draw(step: int, offset: int = 0) -> torch.Tensor:
        return round_to(x, torch.bfloat16, "stochastic", seed=1, step=torch.tensor(step), offset=offset)

    assert torch.equal(draw(1), draw(1))
    # Two independent draws that round up with probability 1/4 differ with probability 3/8.
    assert float((draw(1) != draw(2)).float().mean()) == pytest.approx(3 / 8, abs=0.04)
    assert torch.equal(draw(1)[100:], draw(1, 100)[:-100])


def test_bf16_masters_learn_only_with_stochastic_rounding() -> None:
    """A step of a tenth of bf16's spacing is lost by rounding to nearest and kept in the mean by the
    stochastic one.
    """
    means = {}
    for rounding in ("nearest", "stochastic"):
        p = torch.nn.Parameter(torch.full((2000,), 1.0, dtype=torch.bfloat16), requires_grad=False)
        optimizer = SGD([p], lr=1.0, momentum=0.0)
        optimizer.set_precision(torch.bfloat16, rounding)
        for _ in range(20):
            p.grad = torch.full_like(p, 2**-8 / 10)
            optimizer.step()
        assert set(optimizer.state[p]) == {"step"}  # no momentum, no sum
        other = SGD([p], lr=0.0)
        other.set_precision(torch.bfloat16, rounding)
        other.step()
        assert other.state[p]["momentum_buffer"].dtype == torch.bfloat16
        means[rounding] = float(p.float().mean())
    assert means["nearest"] == 1.0
    assert means["stochastic"] == pytest.approx(1.0 - 20 * 2**-8 / 10, rel=2e-4)


def test_slots_are_declared() -> None:
    with pytest.raises(NotImplementedError):
        optimizer = Elementwise([torch.nn.Parameter(torch.ones(2))], {"lr": 0.1})
        optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
        optimizer.step()


SHAPES = [("embed.weight", (8, 4)), ("layers.0.attention.q.weight", (4, 4)), ("norm.weight", (4,))]


def test_decay_by_role_and_overrides() -> None:
    base = assign_groups(SHAPES, lr=1e-3, weight_decay=0.1)
    assert [base[name].weight_decay for name, _ in SHAPES] == [0.1, 0.1, 0.0]
    everything = assign_groups(SHAPES, lr=1e-3, weight_decay=0.1, decay="all")
    assert {g.weight_decay for g in everything.values()} == {0.1}
    chosen = assign_groups(
        SHAPES,
        lr=1e-3,
        weight_decay=0.1,
        overrides=[Override("embed.*", lr=1e-2), Override("*", weight_decay=0.5)],
    )
    assert chosen["embed.weight"] == Group(1e-2, 0.1)
    assert chosen["norm.weight"] == Group(1e-3, 0.5)
    with pytest.raises(UserError, match=r"optim.groups\[0\].match: pattern 'emb.*' matches no parameter"):
        assign_groups(SHAPES, lr=1e-3, weight_decay=0.1, overrides=[Override("emb.weight")])
