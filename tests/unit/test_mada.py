"""MADA's arithmetic: hyper-gradients against autograd, whole trajectories against a plain reference."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hlat.optim import MADA
from hlat.optim.base import CHUNK, guarded_step
from hlat.optim.mada_step import COEFFICIENTS, Terms, at_step, sensitivities

MIDDLE = {"beta1": 0.83, "beta2": 0.9, "beta3": 0.4, "rho": 0.6, "c": 0.7, "gamma": 0.8}


def reference_step(
    old: dict[str, Tensor], g: Tensor, h: dict[str, Tensor], t: int, eps: float, stop: bool, authors: bool
) -> tuple[Tensor, dict[str, Tensor]]:
    """Direction and new state of step t, written from the paper's equations, for autograd."""
    g_prev = torch.zeros_like(g) if authors else old["g_prev"]
    n_old, v_old = (g * g, torch.full_like(g, 1e-15)) if authors and t == 1 else (old["n"], old["v"])
    d = g - g_prev
    ghat = g + h["beta3"] * d
    s = torch.sign(ghat**2 - v_old).detach()
    target = h["c"] * ghat**2 + (1 - h["c"]) * (v_old + ghat**2 * s)
    m = h["beta1"] * old["m"] + (1 - h["beta1"]) * g
    v = h["beta2"] * v_old + (1 - h["beta2"]) * target
    n = h["beta3"] * n_old + (1 - h["beta3"]) * d
    lion = 0.98 * old["lion"] + 0.02 * g
    u = 0.95 * (lion if authors else old["lion"]) + 0.05 * g
    mean = (v + (t - 1) * old["mean"]) / t
    m_hat = m / (1 - h["beta1"] ** t)
    v_hat = (h["rho"] * v + (1 - h["rho"]) * (mean.detach() if stop else mean)) / (1 - h["beta2"] ** t)
    adaptive = (m_hat + h["beta3"] * n) / (torch.sqrt(v_hat) + eps)
    move = h["gamma"] * adaptive + (1 - h["gamma"]) * torch.sign(u).detach()
    new = {"m": m, "v": v, "n": n, "mean": mean, "lion": lion, "g_prev": g}
    return move, {name: value.detach() for name, value in new.items()}


def random_state(seed: int, size: int = 200) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)

    def draw(scale: float = 1.0) -> Tensor:
        return scale * torch.randn(size, generator=make, dtype=torch.float64)

    names = ("m", "n", "lion", "g_prev")
    old = {name: draw(0.1) for name in names} | {name: draw(0.1).square() for name in ("v", "mean")}
    return old, draw(0.1), draw()


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("authors", [False, True])
@pytest.mark.parametrize(("seed", "t"), [(0, 1), (1, 2), (2, 7), (3, 400)])
def test_hyper_gradients_equal_autograd(seed: int, t: int, authors: bool, stop: bool) -> None:
    old, g, following = random_state(seed)
    if t == 1:
        old = {name: torch.zeros_like(value) for name, value in old.items()}
    make = torch.Generator().manual_seed(50 + seed)
    values = {n: float(0.55 + 0.4 * torch.rand((), generator=make)) for n in COEFFICIENTS}
    h = {n: torch.tensor(v, dtype=torch.float64, requires_grad=True) for n, v in values.items()}
    move, _ = reference_step(old, g, h, t, 1e-6, stop, authors)
    wanted = torch.autograd.grad((following * move).sum(), [h[name] for name in COEFFICIENTS])
    step = torch.tensor(float(t), dtype=torch.float64)
    detached = {name: value.detach() for name, value in h.items()}
    found = sensitivities(
        old, g, at_step(detached, step), Terms(authors=authors), 1e-6, through_mean=not stop
    )
    for name, value in zip(COEFFICIENTS, wanted, strict=True):
        got = float((following * found[name]).sum())
        assert got == pytest.approx(float(value), rel=1e-10, abs=1e-10), name
        assert abs(value) > 1e-3 or t == 1, name  # in the first step v is its own mean, and all there is of v̂


def quadratic(size: int = 60, seed: int = 4) -> tuple[Tensor, Tensor]:
    """Curvatures and a start, float64."""
    make = torch.Generator().manual_seed(seed)
    curvature = torch.logspace(-2, 1, size, dtype=torch.float64)
    return curvature, torch.randn(size, generator=make, dtype=torch.float64)


def noisy_gradient(curvature: Tensor, x: Tensor, step: int) -> Tensor:
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(900 + step), dtype=torch.float64)
    return curvature * x + 0.05 * noise


def reference_run(
    steps: int, *, lr: float, hyper_lr: float, momentum: float, start: int, limit: float, authors: bool
) -> tuple[Tensor, dict[str, float]]:
    """MADA with autograd through the last update, in float64: the graph is kept until the next gradient."""
    low = {"beta1": 0.01, "beta2": 0.501, "beta3": 0.0, "rho": 0.0, "c": 0.0, "gamma": 0.0}
    high = {"beta1": 0.99, "beta2": 0.99, "beta3": 0.99, "rho": 1.0, "c": 1.0, "gamma": 1.0}
    curvature, x = quadratic()
    h, run = dict(MIDDLE), dict.fromkeys(COEFFICIENTS, 0.0)
    state = {name: torch.zeros_like(x) for name in ("m", "v", "n", "mean", "lion", "g_prev")}
    for step in range(steps):
        g = noisy_gradient(curvature, x.detach(), step)
        if step >= max(start, 1):
            slopes = torch.autograd.grad((g * x).sum(), list(leaves.values()))  # noqa: F821
            for name, slope in zip(COEFFICIENTS, slopes, strict=True):
                run[name] = momentum * run[name] + min(max(float(slope), -limit), limit)
                h[name] = min(max(h[name] - hyper_lr * run[name], low[name]), high[name])
        leaves = {n: torch.tensor(v, dtype=torch.float64, requires_grad=True) for n, v in h.items()}
        clipped = g * 0.5
        move, state = reference_step(state, clipped, leaves, step + 1, 1e-6, True, authors)
        x = x.detach() * (1 - lr * 0.1) - lr * move
    return x.detach(), h


@pytest.mark.parametrize("authors", [False, True])
def test_a_whole_run_equals_one_through_autograd(authors: bool) -> None:
    """Gradients clipped to a half for the update and whole in the inner product, a late start, momentum."""
    options = {"lr": 0.02, "hyper_lr": 0.05, "momentum": 0.5, "start": 3, "limit": 0.02}
    wanted, values = reference_run(60, **options, authors=authors)
    curvature, start = quadratic()
    p = torch.nn.Parameter(start.float())
    optimizer = MADA(
        [p],
        lr=0.02,
        **MIDDLE,
        hyper_lr=0.05,
        hyper_momentum=0.5,
        hyper_clip=0.02,
        hyper_start=3,
        compat="authors" if authors else "none",
    )
    for step in range(60):
        p.grad = noisy_gradient(curvature, p.detach().double(), step).float()
        optimizer.step(clip=torch.tensor(0.5))
    found = optimizer.coefficients()
    assert min(abs(values[name] - MIDDLE[name]) for name in COEFFICIENTS) > 2e-3
    for name in COEFFICIENTS:
        assert found[name] == pytest.approx(values[name], abs=2e-5), name
    torch.testing.assert_close(p.detach().double(), wanted, atol=2e-5, rtol=0)


def train(optimizer: MADA, params: list[torch.nn.Parameter], steps: int, first: int = 0) -> None:
    for step in range(first, first + steps):
        for i, p in enumerate(params):
            make = torch.Generator().manual_seed(100 * step + i)
            p.grad = (0.3 * p.detach().float() + torch.randn(p.shape, generator=make)).to(p.dtype)
        optimizer.step()


def params(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    make = torch.Generator().manual_seed(5)
    return [torch.nn.Parameter(torch.randn(shape, generator=make).to(dtype)) for shape in shapes]


def slots(optimizer: MADA, p: Tensor) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in optimizer.state[p].items()}


def moved(optimizer: MADA) -> dict[str, float]:
    return {name: abs(value - MIDDLE[name]) for name, value in optimizer.coefficients().items()}


SPEEDS = {"beta1": 0.01, "beta2": 0.01, "beta3": 0.1, "rho": 0.2, "c": 0.3, "gamma": 0.01}
FAST = {"lr": 0.02, "hyper_lr": SPEEDS, "hyper_start": 1}


def test_cutting_parameters_up_changes_nothing() -> None:
    """Two tensors, one, or shards with a sum over their holders: the coefficients are the same."""
    one, two = params((40, 3)), params((40, 3))[0].detach().clone()
    parts = [torch.nn.Parameter(two[:7].clone()), torch.nn.Parameter(two[7:].clone())]
    a, b = MADA(one, **MIDDLE, **FAST), MADA(parts, **MIDDLE, **FAST)
    for step in range(20):
        g = torch.randn(40, 3, generator=torch.Generator().manual_seed(step))
        one[0].grad, parts[0].grad, parts[1].grad = g, g[:7].clone(), g[7:].clone()
        a.step()
        b.step()
    assert min(moved(a).values()) > 1e-3
    for name, value in a.coefficients().items():
        assert b.coefficients()[name] == pytest.approx(value, abs=1e-6)


def test_copies_are_counted_once() -> None:
    whole, copies = params((30,), (8,)), params((30,), (8,), (8,))
    copies[2].data.copy_(copies[1].data)
    a = MADA(whole, **MIDDLE, **FAST)
    groups = [{"params": copies[:2]}, {"params": copies[2:], "counted": False}]
    b, asked = MADA(groups, **MIDDLE, **FAST), []

    def add_up(tensor: Tensor) -> Tensor:
        asked.append(tensor.shape)
        return tensor

    b.all_reduce = add_up
    for step in range(15):
        for optimizer, held in ((a, whole), (b, copies)):
            for i, p in enumerate(held):
                make = torch.Generator().manual_seed(10 * step + min(i, 1))
                p.grad = torch.randn(p.shape, generator=make)
            optimizer.step()
    assert a.coefficients() == b.coefficients() and torch.equal(copies[1], copies[2])
    assert asked == [(6,)] * 15


@pytest.mark.parametrize("learn", [("beta1",), ("rho",), ("c", "beta2"), ("beta3",), ("gamma",), ()])
def test_a_choice_of_coefficients_moves_those_only(learn: tuple[str, ...]) -> None:
    p = params((50, 2))
    speeds = {name: speed for name, speed in SPEEDS.items() if name in learn}
    optimizer = MADA(p, **MIDDLE, learn=learn, **{**FAST, "hyper_lr": speeds})
    train(optimizer, p, 12)
    changed = {name for name, size in moved(optimizer).items() if size > 1e-7}
    assert changed == set(learn)
    assert set(optimizer.metrics()) == set(learn)


@pytest.mark.parametrize(
    ("learn", "fixed", "buffers"),
    [
        ((), {}, 2),
        ((), {"rho": 0.0}, 3),
        ((), {"beta3": 0.9}, 4),
        ((), {"gamma": 0.0}, 1),
        (("beta1", "beta2"), {}, 3),
        (("beta1", "beta2", "c"), {}, 3),
        (("beta1", "beta2", "rho"), {}, 4),
        (("beta1", "beta2", "gamma"), {}, 4),
        (("beta1", "beta2", "rho", "c", "gamma"), {}, 5),
        (("beta1", "beta2", "beta3"), {}, 5),
        (COEFFICIENTS, {}, 7),
        (COEFFICIENTS, {"compat": "authors"}, 6),
    ],
)
def test_memory_is_paid_for_what_is_learned(learn, fixed, buffers: int) -> None:
    """The table of docs/methods/mada.md."""
    p = params((64, 4))
    optimizer = MADA(p, learn=learn, **fixed)
    train(optimizer, p, 2)
    sizes = [value.numel() for value in optimizer.state[p[0]].values()]
    assert sizes.count(256) == buffers == sum(sizes) // 256


def test_a_skipped_step_skips_the_hyper_step() -> None:
    p = params((300,))
    optimizer = MADA(p, **MIDDLE, **FAST)
    train(optimizer, p, 4)
    before, state = p[0].detach().clone(), slots(optimizer, p[0])
    p[0].grad = torch.full((300,), float("nan"))
    guarded_step(optimizer, torch.tensor(False), torch.tensor(1.0))
    assert torch.equal(p[0], before)
    assert all(torch.equal(value, state[name]) for name, value in optimizer.state[p[0]].items())
    assert set(state) >= {"beta1", "gamma_momentum", "updates", "lr", "step", "grad", "grad_prev"}
    twin = params((300,))
    other = MADA(twin, **MIDDLE, **FAST)
    train(other, twin, 4)
    train(optimizer, p, 3, first=4)
    train(other, twin, 3, first=4)
    assert torch.equal(p[0], twin[0]) and optimizer.coefficients() == other.coefficients()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_continues_bitwise(dtype: torch.dtype) -> None:
    shapes = ((20, 3), (5,))
    p, twin = params(*shapes, dtype=dtype), params(*shapes, dtype=dtype)
    optimizer, other = MADA(p, **MIDDLE, **FAST), MADA(twin, **MIDDLE, **FAST)
    train(optimizer, p, 5)
    saved = optimizer.state_dict()
    with torch.no_grad():
        for a, b in zip(p, twin, strict=True):
            b.copy_(a)
    other.load_state_dict(saved)
    for held, one in ((p, optimizer), (twin, other)):
        train(one, held, 5, first=5)
    assert all(torch.equal(a, b) for a, b in zip(p, twin, strict=True))
    assert optimizer.coefficients() == other.coefficients() and min(moved(other).values()) > 1e-4


def test_rows_never_touched_do_not_poison_the_sums() -> None:
    """Zero gradients for ever: second moments underflow to 0 in the end, where 0 / 0 waits."""
    p = params((4, 8))
    optimizer = MADA(p, **{**MIDDLE, "beta2": 0.51}, **{**FAST, "hyper_lr": 1e-4})
    optimizer.init_state()
    for step in range(20):
        if step == 10:
            optimizer.state[p[0]]["exp_avg_sq"][1:] = 0.0
            optimizer.state[p[0]]["mean_sq"][1:] = 0.0
        p[0].grad = torch.zeros(4, 8)
        p[0].grad[0] = torch.randn(8, generator=torch.Generator().manual_seed(step))
        if step == 0:
            p[0].grad[1] = 1e-3
        optimizer.step()
    assert float(optimizer.state[p[0]]["exp_avg_sq"][1:].max()) == 0.0
    assert all(value == value for value in optimizer.coefficients().values())
    assert min(moved(optimizer)[name] for name in ("beta1", "rho", "c")) > 0


class NoHostReads(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func), "a value is read on the host"
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_on_the_host() -> None:
    p = params((10, 3))
    optimizer = MADA(p, **{**FAST, "lr": torch.tensor(0.01)})
    train(optimizer, p, 2)
    p[0].grad = torch.ones(10, 3)
    with NoHostReads():
        optimizer.step(keep=torch.tensor(True), clip=torch.tensor(0.3))
        optimizer.metrics()
    with pytest.raises(AssertionError), NoHostReads():
        optimizer.coefficients()


def test_compiled_equals_eager() -> None:
    size = CHUNK + 1024
    p, twin = params((size,)), params((size,))
    a, b = MADA(p, **MIDDLE, **FAST), MADA(twin, **MIDDLE, **FAST)
    a.compile()
    for step in range(6):
        g = torch.randn(size, generator=torch.Generator().manual_seed(step)) / 10
        p[0].grad, twin[0].grad = g.clone(), g.clone()
        a.step(clip=torch.tensor(0.9))
        b.step(clip=torch.tensor(0.9))
    for name, value in b.coefficients().items():
        assert a.coefficients()[name] == pytest.approx(value, abs=1e-6)
    torch.testing.assert_close(p[0], twin[0], atol=1e-6, rtol=1e-5)
    assert min(moved(a).values()) > 1e-4


def test_parameters_of_any_layout_and_dtype() -> None:
    values = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    plain, turned = torch.nn.Parameter(values.clone()), torch.nn.Parameter(values.t().contiguous().t())
    scalar = torch.nn.Parameter(torch.tensor(2.0))
    a, b = MADA([plain], **FAST), MADA([turned], **FAST)
    c = MADA([{"params": [scalar], "lr": 0.1}], lr=1e-3)
    for _ in range(3):
        plain.grad = plain.detach() * 0.3
        turned.grad = (turned.detach() * 0.3).t().contiguous().t()
        scalar.grad = scalar.detach().clone()
        for optimizer in (a, b, c):
            optimizer.step()
    assert not turned.is_contiguous() and torch.equal(plain, turned.contiguous())
    assert scalar.item() < 1.8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta2": 0.999}, r"beta2 must lie in \[0.501, 0.99\] when learned, not 0.999"),
        ({"rho": 1.5, "learn": ()}, "rho must lie in"),
        *(({name: 1.0, "learn": ()}, f"{name} must lie in .* a beta below 1") for name in COEFFICIENTS[:3]),
        ({"learn": ("beta4",)}, "learn names 'beta4'"),
        ({"gamma": 0.0, "learn": ("beta1",)}, "Lion"),
        ({"eps": 0.0}, "eps"),
        ({"compat": "author"}, "compat must be 'none' or 'authors', not 'author'"),
        (
            {"hyper_lr": {"bta1": 1.0}},
            "hyper_lr names 'bta1', which is not learned; learn says beta1, beta2,",
        ),
        ({"hyper_clip": {"rho": 1.0}, "learn": ("c",)}, "hyper_clip names 'rho', .*; learn says c$"),
        ({"hyper_lr": -1.0}, "hyper_lr must be at least 0, not -1.0"),
        ({"hyper_momentum": {"c": 1.0}}, "hyper_momentum must be at least 0 and below 1, not 1.0"),
        ({"hyper_clip": 0.0}, "hyper_clip must be more than 0, not 0.0"),
        ({"hyper_start": 0}, "hyper_start must be a whole number from 1, not 0"),
    ],
)
def test_wrong_options(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MADA(params((2,)), **options)


def test_defaults_start_as_adamw() -> None:
    """Before the coefficients move, MADA is AdamW whatever it is going to learn."""
    for learn in itertools.islice(itertools.combinations(COEFFICIENTS, 3), 4):
        p, twin = params((30, 4)), params((30, 4))
        a = MADA(p, lr=0.01, learn=learn, hyper_start=100)
        b = torch.optim.AdamW(twin, lr=0.01, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.1)
        train(a, p, 20)
        train(b, twin, 20)  # type: ignore[arg-type]
        torch.testing.assert_close(p[0], twin[0], atol=1e-6, rtol=0)
