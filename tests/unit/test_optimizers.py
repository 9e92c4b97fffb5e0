"""Each optimizer against an independent reference, and MADA with frozen coefficients against each."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hlat.optim import MADA, SGD, AdamW, Adan, AMSGrad, AVGrad, HyperAdam, Lion, Muon, Yogi
from hlat.optim.base import create_state

STEPS, LR, DECAY = 200, 0.01, 0.1
Reference = Callable[[list[Tensor], Tensor], Tensor]


def gradient(p: Tensor, step: int) -> Tensor:
    """Of a bowl, with noise whose size changes from step to step."""
    make = torch.Generator().manual_seed(1000 + step)
    return 0.3 * p + torch.randn(p.shape, generator=make) * 10.0 ** (step % 4 - 2)


def start() -> Tensor:
    return torch.randn(9, 21, generator=torch.Generator().manual_seed(3))


def run(make: Callable[[list[Any]], Any], steps: int = STEPS) -> Tensor:
    p = torch.nn.Parameter(start())
    optimizer = make([p])
    for step in range(steps):
        p.grad = gradient(p.detach(), step)
        optimizer.step()
    return p.detach()


def together(make: Callable[[list[Any]], Any], other: Any, steps: int = STEPS) -> float:
    """Largest distance between two optimizers that are shown the gradients of the first one's place; `other`
    makes an optimizer, or is a function of a step's number, place and gradient.
    """
    p, twin = torch.nn.Parameter(start()), torch.nn.Parameter(start())
    a = make([p])
    b = None if isinstance(other, Plain) else other([twin])
    place, worst = start(), 0.0
    for step in range(steps):
        g = gradient(p.detach(), step)
        p.grad, twin.grad = g, g.clone()
        a.step()
        if b is None:
            place = other(step + 1, place, g)
            worst = max(worst, float((p.detach() - place).abs().max()))
        else:
            b.step()
            worst = max(worst, float((p.detach() - twin.detach()).abs().max()))
    assert (p.detach() - start()).abs().max() > 0.1
    return worst


class Plain:
    """A reference written out: keeps its state in a dict."""

    def __init__(self, rule: Callable[..., Tensor]) -> None:
        self.rule, self.state = rule, {}

    def __call__(self, t: int, p: Tensor, g: Tensor) -> Tensor:
        return self.rule(t, p, g, self.state)


def yogi(t: int, p: Tensor, g: Tensor, s: dict[str, Tensor], *, b1, b2, eps, initial) -> Tensor:
    s["m"] = b1 * s.get("m", 0.0) + (1 - b1) * g
    v = s.get("v", torch.full_like(g, initial))
    s["v"] = v - (1 - b2) * torch.sign(v - g**2) * g**2
    return p * (1 - LR * DECAY) - LR * (s["m"] / (1 - b1**t)) / ((s["v"] / (1 - b2**t)) ** 0.5 + eps)


def avgrad(t: int, p: Tensor, g: Tensor, s: dict[str, Any], *, b1, b2, eps) -> Tensor:
    s["m"] = b1 * s.get("m", 0.0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0.0) + (1 - b2) * g**2
    s["sum"] = s.get("sum", 0.0) + s["v"]
    scale = (s["sum"] / t / (1 - b2**t)) ** 0.5 + eps
    return p * (1 - LR * DECAY) - LR * (s["m"] / (1 - b1**t)) / scale


def lion(t: int, p: Tensor, g: Tensor, s: dict[str, Any], *, b1, b2) -> Tensor:
    c = b1 * s.get("m", torch.zeros_like(g)) + (1 - b1) * g
    s["m"] = b2 * s.get("m", 0.0) + (1 - b2) * g
    return p * (1 - LR * DECAY) - LR * torch.sign(c)


def lion_updated_first(t: int, p: Tensor, g: Tensor, s: dict[str, Any]) -> Tensor:
    s["m"] = 0.98 * s.get("m", 0.0) + 0.02 * g
    return p * (1 - LR * DECAY) - LR * torch.sign(0.95 * s["m"] + 0.05 * g)


def adan(t: int, p: Tensor, g: Tensor, s: dict[str, Any], *, b1, b2, b3, eps) -> Tensor:
    """The published algorithm in the published symbols: its betas are weights of the new value."""
    beta1, beta2, beta3 = 1 - b1, 1 - b2, 1 - b3
    diff = g - s.get("g", g)
    s["m"] = (1 - beta1) * s.get("m", 0.0) + beta1 * g
    s["v"] = (1 - beta2) * s.get("v", 0.0) + beta2 * diff
    s["n"] = (1 - beta3) * s.get("n", 0.0) + beta3 * (g + (1 - beta2) * diff) ** 2
    s["g"] = g
    m, v, n = s["m"] / (1 - b1**t), s["v"] / (1 - b2**t), s["n"] / (1 - b3**t)
    return (p - LR / (n**0.5 + eps) * (m + (1 - beta2) * v)) / (1 + LR * DECAY)


def adan_as_in_mada(t: int, p: Tensor, g: Tensor, s: dict[str, Any], *, b1, b2, b3, eps) -> Tensor:
    """MADA's: beta3 is Adan's second beta, n starts at 0 and is not bias-corrected, the gradient before the
    first is 0, decay is decoupled.
    """
    diff = g - s.get("g", 0.0)
    s["m"] = b1 * s.get("m", 0.0) + (1 - b1) * g
    s["n"] = b3 * s.get("n", 0.0) + (1 - b3) * diff
    s["v"] = b2 * s.get("v", 0.0) + (1 - b2) * (g + b3 * diff) ** 2
    s["g"] = g
    scale = (s["v"] / (1 - b2**t)) ** 0.5 + eps
    return p * (1 - LR * DECAY) - LR * (s["m"] / (1 - b1**t) + b3 * s["n"]) / scale


def plain(rule: Callable[..., Tensor], **fixed: float) -> Plain:
    return Plain(lambda t, p, g, s: rule(t, p, g, s, **fixed))


def frozen(**values: Any) -> Callable[[list[Any]], MADA]:
    return lambda p: MADA(p, lr=LR, weight_decay=DECAY, learn=(), **values)


def with_decay(kind: type, **options: Any) -> Callable[[list[Any]], Any]:
    return lambda p: kind(p, lr=LR, weight_decay=DECAY, **options)


@pytest.mark.parametrize(
    ("optimizer", "reference"),
    [
        (
            with_decay(AMSGrad, betas=(0.9, 0.99)),
            with_decay(torch.optim.AdamW, betas=(0.9, 0.99), amsgrad=True),
        ),
        (
            with_decay(Yogi, betas=(0.9, 0.99)),
            plain(yogi, b1=0.9, b2=0.99, eps=1e-3, initial=1e-6),
        ),
        (with_decay(AVGrad), plain(avgrad, b1=0.9, b2=0.95, eps=1e-6)),
        (with_decay(Lion), plain(lion, b1=0.9, b2=0.99)),
        (with_decay(Adan), plain(adan, b1=0.98, b2=0.92, b3=0.99, eps=1e-8)),
        (
            with_decay(HyperAdam, hyper_start=STEPS),
            with_decay(torch.optim.AdamW, betas=(0.9, 0.95), eps=1e-6),
        ),
    ],
    ids=["amsgrad", "yogi", "avgrad", "lion", "adan", "hyperadam before its start"],
)
def test_each_equals_its_reference(optimizer, reference) -> None:
    assert together(optimizer, reference) < 1e-6


@pytest.mark.parametrize(
    ("mada", "reference"),
    [
        (frozen(beta2=0.99, eps=1e-8), with_decay(torch.optim.AdamW, betas=(0.9, 0.99))),
        (frozen(beta1=0.5, beta2=0.8), with_decay(torch.optim.AdamW, betas=(0.5, 0.8), eps=1e-6)),
        (frozen(beta2=0.99), with_decay(AdamW, betas=(0.9, 0.99), eps=1e-6)),
        (frozen(rho=0.0), with_decay(AVGrad)),
        (frozen(rho=0.0, beta2=0.99), plain(avgrad, b1=0.9, b2=0.99, eps=1e-6)),
        (frozen(c=0.0, eps=1e-3), with_decay(Yogi, betas=(0.9, 0.95), initial=0.0)),
        (frozen(c=0.0, eps=1e-3), plain(yogi, b1=0.9, b2=0.95, eps=1e-3, initial=0.0)),
        (frozen(gamma=0.0), with_decay(Lion, betas=(0.95, 0.98))),
        (frozen(gamma=0.0), plain(lion, b1=0.95, b2=0.98)),
        (frozen(gamma=0.0, compat="authors"), Plain(lion_updated_first)),
        (frozen(beta3=0.9, beta2=0.99), plain(adan_as_in_mada, b1=0.9, b2=0.99, b3=0.9, eps=1e-6)),
    ],
    ids=["adamw", "adamw .5 .8", "own adamw", "avgrad", "avgrad plain", "yogi", "yogi plain", "lion"]
    + ["lion plain", "lion authors", "adan"],
)
def test_mada_equals_each_at_its_end_point(mada, reference) -> None:
    assert together(mada, reference) < 1e-6


def test_learning_frozen_by_its_start_equals_adamw_too() -> None:
    """All terms of the update are there, none of the coefficients has left its end."""
    learned = with_decay(MADA, hyper_start=STEPS, beta2=0.99)
    assert together(learned, with_decay(torch.optim.AdamW, betas=(0.9, 0.99), eps=1e-6)) < 1e-6


@pytest.mark.parametrize("kind", [Yogi, AVGrad, Lion, Adan, AMSGrad, HyperAdam, MADA])
def test_end_points_differ_from_each_other(kind) -> None:
    """The comparisons above can fail."""
    learning = {"hyper_start": 1, "eps": 1e-8} if issubclass(kind, MADA) else {}
    assert together(with_decay(kind, **learning), with_decay(AdamW)) > 1e-3


@pytest.mark.parametrize("kind", [Yogi, AVGrad, Lion, Adan, AMSGrad, HyperAdam, MADA])
def test_state_made_before_the_first_step_changes_nothing(kind) -> None:
    def early(params: list[Any]) -> Any:
        optimizer = kind(params)
        create_state(optimizer)
        return optimizer

    assert torch.equal(run(early, 6), run(kind, 6))


@pytest.mark.parametrize("kind", [Yogi, AVGrad, Lion, Adan, AMSGrad, MADA])
def test_low_precision_storage(kind) -> None:
    p = torch.nn.Parameter(start().bfloat16())
    optimizer = kind([p], lr=LR)
    optimizer.set_precision(torch.bfloat16, "stochastic", seed=1)
    for step in range(5):
        p.grad = gradient(p.detach().float(), step).bfloat16()
        optimizer.step()
    state = optimizer.state[p]
    assert {value.dtype for value in state.values() if value.numel() > 1} == {torch.bfloat16}
    assert {value.dtype for value in state.values() if value.numel() == 1} == {torch.float32}
    assert torch.isfinite(p).all() and not torch.equal(p, start().bfloat16())


@pytest.mark.parametrize("kind", [SGD, AdamW, AMSGrad, AVGrad, Yogi, Adan, Lion, HyperAdam, MADA, Muon])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-3}, "lr must be at least 0, not -0.001"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, not -0.1"),
        ({"lr": float("nan")}, "lr must be at least 0, not nan"),
        ({"eps": 0.0}, "eps must be positive, not 0.0"),
        ({"betas": (0.9, 1.0, 0.9)}, r"betas must lie in \[0, 1\), not \(0.9, 1.0, 0.9\)"),
    ],
)
def test_values_out_of_range_are_refused(kind, options: dict[str, Any], message: str) -> None:
    if not set(options) <= set(inspect.signature(kind).parameters):
        pytest.skip("no such option")
    with pytest.raises(ValueError, match=f"^{message}$"):
        kind([torch.nn.Parameter(start())], **options)
