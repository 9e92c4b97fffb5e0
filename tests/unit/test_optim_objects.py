"""Optimizers as objects of any PyTorch loop: copied, pickled, given groups later, loaded with another's
state, in double precision; and optimizers that are not HLAT's.
"""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from hlat import registry
from hlat.checkpoint.store import CheckpointStore
from hlat.optim import MADA, SGD, AdamW, Adan, AMSGrad, AVGrad, HyperAdam, Lion, Muon, Yogi
from hlat.optim.base import create_state, guarded_step
from hlat.train import state

ALL = [SGD, AdamW, AMSGrad, AVGrad, Yogi, Adan, Lion, HyperAdam, MADA, Muon]
TRUE, FALSE, ONE = torch.tensor(True), torch.tensor(False), torch.tensor(1.0)


def start(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Parameter:
    make = torch.Generator().manual_seed(seed)
    return Parameter(torch.randn(shape, generator=make, dtype=torch.float64).to(dtype))


def train(optimizer: Any, steps: int, first: int = 0) -> list[Tensor]:
    """Of a bowl with noise, all parameters; where they end."""
    held = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(first, first + steps):
        for p in held:
            make = torch.Generator().manual_seed(step)
            p.grad = 0.3 * p.detach() + torch.randn(p.shape, generator=make, dtype=torch.float64).to(p.dtype)
        optimizer.step()
    return [p.detach().clone() for p in held]


def early(kind: Any, *options: Any, **more: Any) -> Any:
    """With coefficients that move from the first step."""
    return kind(*options, **more, **({"hyper_start": 1} if issubclass(kind, MADA) else {}))


@pytest.mark.parametrize("kind", ALL)
def test_copies_and_pickles_go_on_alike(kind: Any) -> None:
    whole = early(kind, [start(6, 4)], lr=0.01)
    torch.optim.lr_scheduler.CosineAnnealingLR(whole, 10)  # leaves a `step` of its own in the optimizer
    whole.compile()
    train(whole, 3)
    copied = copy.deepcopy(whole)
    file = io.BytesIO()
    torch.save(whole, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    ends = [train(one, 3, first=3)[0] for one in (whole, copied, loaded)]
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])
    assert not torch.equal(ends[0], start(6, 4))
    if isinstance(whole, MADA):
        assert copied.coefficients() == whole.coefficients() and copied.coefficients()["beta1"] != 0.9


@pytest.mark.parametrize("kind", ALL)
def test_double_precision_stays_so(kind: Any) -> None:
    still = start(6, 4, dtype=torch.float64)
    train(kind([still], lr=0.0, weight_decay=0.0), 2)
    assert torch.equal(still, start(6, 4, dtype=torch.float64))
    p = start(6, 4, dtype=torch.float64)
    optimizer = kind([p], lr=0.01)
    train(optimizer, 3)
    slots = [value for value in optimizer.state[p].values() if value.dim()]
    assert all(value.dtype == torch.float64 for value in slots) and (slots or kind is SGD)


def test_adamw_in_double_precision_equals_torch() -> None:
    ours, theirs = start(6, 4, dtype=torch.float64), start(6, 4, dtype=torch.float64)
    train(AdamW([ours], lr=0.01, weight_decay=0.1), 50)
    train(torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), weight_decay=0.1), 50)
    torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=0)


def test_groups_added_later_are_treated_as_those_of_the_start() -> None:
    one, two = Muon([start(6, 4)], lr=0.01), Muon([start(6, 4), start(4, 4)], lr=0.01, momentum=0.5)
    one.param_groups[0]["momentum"] = 0.5
    one.add_param_group({"params": [start(4, 4)], "momentum": 0.5})
    for a, b in zip(train(one, 4), train(two, 4), strict=True):
        assert torch.equal(a, b)
    assert all("momentum_buffer" in state for state in one.state.values())
    plain = SGD([start(5)], lr=0.01, momentum=0.0)
    train(plain, 2)
    assert set(plain.state[plain.param_groups[0]["params"][0]]) == {"step"}
    plain.add_param_group({"params": [start(5, seed=1)], "momentum": 0.9})
    reference = torch.optim.SGD([start(5)], lr=0.01)
    train(reference, 2)
    reference.add_param_group({"params": [start(5, seed=1)], "momentum": 0.9})
    plain.param_groups[0]["weight_decay"] = plain.param_groups[1]["weight_decay"] = 0.0
    for a, b in zip(train(plain, 4, 2), train(reference, 4, 2), strict=True):
        torch.testing.assert_close(a, b)


def test_a_group_has_no_coefficients_of_its_own() -> None:
    with pytest.raises(ValueError, match="beta1 belongs to the optimizer"):
        MADA([{"params": [start(3)], "beta1": 0.5}])


@pytest.mark.parametrize(
    ("saved", "loading"),
    [
        (lambda p: AdamW(p), lambda p: MADA(p)),
        (lambda p: MADA(p), lambda p: AdamW(p)),
        (lambda p: MADA(p, learn=("beta1",)), lambda p: MADA(p, learn=("beta1", "beta2"))),
        (lambda p: MADA(p, compat="authors"), lambda p: MADA(p)),
        (lambda p: AMSGrad(p), lambda p: AdamW(p)),
        (lambda p: torch.optim.Adagrad(p), lambda p: Lion(p)),
        (lambda p: AdamW(p), lambda p: MADA(p, learn=())),  # moments of the same names
        (lambda p: torch.optim.AdamW(p), lambda p: MADA(p, learn=(), c=0.5)),
        (lambda p: MADA(p, learn=()), lambda p: AdamW(p)),
        (lambda p: Yogi(p), lambda p: MADA(p, learn=())),
    ],
)
def test_the_state_of_another_optimizer_is_refused(saved: Any, loading: Any) -> None:
    other, one = saved([start(4)]), loading([start(4)])
    train(other, 2)
    train(one, 1)
    kept = {name: value.clone() for name, value in one.state[one.param_groups[0]["params"][0]].items()}
    message = "parameter 0 is that of another optimizer or of other opt|group 0 of the state is another"
    with pytest.raises(ValueError, match=message):
        one.load_state_dict(other.state_dict())
    now = one.state[one.param_groups[0]["params"][0]]
    assert all(torch.equal(now[name], value) for name, value in kept.items())


@pytest.mark.parametrize("kind", ALL)
def test_a_state_from_before_the_first_step_starts_anew(kind: Any) -> None:
    used, fresh = early(kind, [start(4, 4)], lr=0.01), early(kind, [start(4, 4)], lr=0.01)
    train(used, 5)
    used.load_state_dict(fresh.state_dict())
    with torch.no_grad():
        used.param_groups[0]["params"][0].copy_(start(4, 4))
    if isinstance(used, MADA):
        assert used.coefficients() == fresh.coefficients()
    assert torch.equal(train(used, 4)[0], train(fresh, 4)[0])


def reference_of_two(steps: int, present: Any, optimizer: MADA, p: list[Parameter]) -> float:
    """Largest distance of MADA's two parameters from the equations with each one's own steps, where `present`
    says which has a gradient; the coefficients are the optimizer's.
    """
    place = [x.detach().clone() for x in p]
    m, v, t = [0.0, 0.0], [0.0, 0.0], [0, 0]
    for step in range(steps):
        for j, x in enumerate(p):
            g = 0.3 * place[j] + torch.randn(6, generator=torch.Generator().manual_seed(10 * step + j))
            x.grad = g if present(j, step) else None
        optimizer.step(keep=torch.tensor(step % 7 != 5))
        c = optimizer.coefficients()
        for j, x in enumerate(p):
            if x.grad is None or step % 7 == 5:
                continue
            t[j] += 1
            m[j] = c["beta1"] * m[j] + (1 - c["beta1"]) * x.grad
            v[j] = c["beta2"] * v[j] + (1 - c["beta2"]) * x.grad**2
            root = (v[j] / (1 - c["beta2"] ** t[j])) ** 0.5 + 1e-6
            place[j] = place[j] - 0.05 * m[j] / (1 - c["beta1"] ** t[j]) / root
    return max(float((x.detach() - y).abs().max()) for x, y in zip(p, place, strict=True))


def test_a_parameter_without_a_gradient_keeps_its_last_step() -> None:
    """As an expert to which nothing is routed for some steps: what it did last is replayed as it was done."""
    p = [start(6), start(6, seed=1)]
    options = {"beta1": 0.6, "beta2": 0.7, "lr": 0.05, "hyper_lr": 0.02, "weight_decay": 0.0}
    optimizer = MADA(p, **options, hyper_start=1, learn=("beta1", "beta2"))  # type: ignore[arg-type]
    far = reference_of_two(60, lambda j, step: j == 0 or step % 3 == 0, optimizer, p)
    assert far < 5e-6
    assert abs(optimizer.coefficients()["beta1"] - 0.6) > 0.02


FOREIGN = [
    (torch.optim.AdamW, {}),
    (torch.optim.NAdam, {}),
    (torch.optim.Adagrad, {"initial_accumulator_value": 0.5}),
    (torch.optim.Rprop, {}),
    (torch.optim.ASGD, {}),
    (torch.optim.RMSprop, {"momentum": 0.5}),
    (torch.optim.SGD, {}),
]


@pytest.mark.parametrize(("kind", "options"), FOREIGN)
def test_torch_optimizers_start_as_they_do_alone(kind: Any, options: dict[str, Any]) -> None:
    """Not all from zeros; also where the first step, or a later one, is put back."""
    ours, theirs = start(6), start(6)
    one, two = kind([ours], lr=0.01, **options), kind([theirs], lr=0.01, **options)
    for step in range(12):
        kept = step not in (0, 1, 6)
        ours.grad = 0.3 * ours.detach() + torch.randn(6, generator=torch.Generator().manual_seed(step))
        theirs.grad = ours.grad.clone()
        if not kept:
            ours.grad.fill_(float("nan"))
        guarded_step(one, TRUE if kept else FALSE, ONE)
        if kept:
            two.step()
    assert torch.equal(ours, theirs) and not torch.equal(ours, start(6))


@pytest.mark.parametrize(("kind", "options"), FOREIGN)
def test_state_made_to_be_loaded_into(kind: Any, options: dict[str, Any]) -> None:
    p, twin = start(6), start(6)
    one, two = kind([p], lr=0.01, **options), kind([twin], lr=0.01, **options)
    train(one, 3)
    create_state(two)
    assert torch.equal(twin, start(6)) and twin.grad is None
    for name, value in two.state[twin].items():
        if torch.is_tensor(value):
            value.copy_(one.state[p][name])
    with torch.no_grad():
        twin.copy_(p)
    assert torch.equal(train(one, 3, 3)[0], train(two, 3, 3)[0])


class Guest(torch.optim.NAdam):
    """One whose state does not start from zeros."""

    def __init__(self, params: Any, lr: float | Tensor = 1e-3, *, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay)


def test_a_guest_trains_and_resumes_as_alone(
    tiny_run: Any, train_steps: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(registry._registered, ("optim", "test-nadam"), Guest)
    recipe = ("optim={name: test-nadam, lr: 1e-3}", "run.steps=8")
    whole = tiny_run(*recipe)
    assert not whole.optimizer.state
    train_steps(whole, 1)
    products = [float(one["mu_product"]) for one in whole.optimizer.state.values()]
    assert products and all(0.4 < value < 0.5 for value in products)  # 1 times about 0.9 (1 - 0.5)
    train_steps(whole, 2)
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    store.save(whole.step, state.tensors(whole), state.meta(whole), 0, wait=True)
    again = tiny_run(*recipe)
    state.restore(again, store.newest())
    assert train_steps(whole, 3) == train_steps(again, 3)
