"""MeZO and MeZO-SVRG in a plain PyTorch loop, against a straightforward version of their equations."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hlat.method import MeZO, MeZOSVRG
from hlat.method.anneal import Annealing
from hlat.method.field import CHUNK
from hlat.method.noise import noise


def model(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)


def batches(dtype: torch.dtype = torch.float64) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    while True:
        x = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        yield x.to(dtype), x.sum(1, keepdim=True).to(dtype)


def closure_of(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[], Tensor]:
    return lambda: (net(batch[0]) - batch[1]).square().mean()


def losses(net: nn.Module, make, steps: int, **options) -> list[float]:
    """Train with batches that come one by one and the first one as anchor."""
    optimizer, source = make(net.named_parameters(), **options), batches()
    anchor = closure_of(net, next(source))
    return [float(optimizer.step(closure_of(net, next(source)), anchor)) for _ in range(steps)]


class Plain:
    """The same methods with whole noises, copies of the parameters and no tricks."""

    def __init__(self, net: nn.Module, mu: float = 1e-3) -> None:
        self.net, self.mu, self.theta = net, mu, {k: p.detach().clone() for k, p in net.named_parameters()}

    def z(self, step: int, draw: int = 0) -> dict[str, Tensor]:
        return {k: noise(0, k, p.shape, step=step, draw=draw).double() for k, p in self.theta.items()}

    def slope(self, closure, theta: dict[str, Tensor], z: dict[str, Tensor]) -> float:
        values = []
        for sign in (1, -1):
            self.load({k: theta[k] + sign * self.mu * z[k] for k in theta})
            values.append(float(closure().detach()))
        return (values[0] - values[1]) / (2 * self.mu)

    def move(self, *steps: tuple[float, dict[str, Tensor]]) -> None:
        for amount, z in steps:
            self.theta = {k: p + amount * z[k] for k, p in self.theta.items()}
        self.load(self.theta)

    def load(self, theta: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, p in self.net.named_parameters():
                p.copy_(theta[name])


def mezo_by_hand(net: nn.Module, lr: float, steps: int) -> None:
    plain, source = Plain(net), batches()
    next(source)
    for t in range(steps):
        closure, z = closure_of(net, next(source)), plain.z(t)
        plain.move((-lr * plain.slope(closure, plain.theta, z), z))


def svrg_by_hand(net: nn.Module, lrs: tuple[float, float], q: int, kind: str, steps: int) -> None:
    plain, source = Plain(net), batches()
    anchor = closure_of(net, next(source))
    for t in range(steps):
        closure, z = closure_of(net, next(source)), plain.z(t)
        if t % q == 0:
            bar, z_0 = plain.theta, z
            p_0 = plain.slope(anchor, bar, z)
            plain.move((-lrs[0] * p_0, z))
            continue
        other = z if kind == "shared" else plain.z(t, 1)
        p = plain.slope(closure, plain.theta, z)
        if kind == "authors":
            plain.move((-lrs[1] * p, z))
            bar = plain.theta
        p_bar = plain.slope(closure, bar, other)
        if kind != "authors":
            plain.move((-lrs[1] * p, z))
        plain.move((lrs[1] * p_bar, other), (-lrs[1] * p_0, z_0))


def same(a: nn.Module, b: nn.Module, tolerance: float) -> bool:
    return all((p - q).abs().max() <= tolerance for p, q in zip(a.parameters(), b.parameters(), strict=True))


def test_mezo_is_its_equation() -> None:
    ours, theirs, start = model(), model(), model()
    losses(ours, MeZO, 30, lr=1e-2)
    mezo_by_hand(theirs, 1e-2, 30)
    assert same(ours, theirs, 1e-10) and not same(ours, start, 1e-3)


@pytest.mark.parametrize("restore", ["in_place", "copy"])
@pytest.mark.parametrize("snapshot", ["copy", "seed_log"])
@pytest.mark.parametrize("kind", ["shared", "two", "authors"])
@pytest.mark.parametrize("q", [2, 5])
def test_svrg_is_its_equation(kind: str, snapshot: str, restore: str, q: int) -> None:
    ours, theirs, start = model(), model(), model()
    options = {"shared_z": kind == "shared", "compat": "authors" if kind == "authors" else "none"}
    losses(
        ours, MeZOSVRG, 17, lr_anchor=1e-2, lr_inner=5e-3, anchor_every=q, snapshot=snapshot, restore=restore,
        **options,
    )  # fmt: skip
    svrg_by_hand(theirs, (1e-2, 5e-3), q, kind, 17)
    assert same(ours, theirs, 1e-9) and not same(ours, start, 1e-3)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small field keeps its noise for the step; a large one draws it chunk by chunk."""
    options = {"lr_anchor": 1e-2, "lr_inner": 5e-3, "anchor_every": 3, "snapshot": "seed_log"}
    small, large = model(), model()
    losses(small, MeZOSVRG, 8, **options)
    monkeypatch.setitem(CHUNK, "cpu", 4)
    losses(large, MeZOSVRG, 8, **options)
    assert same(small, large, 0.0)


def test_who_is_called_when() -> None:
    net, calls = model(), []
    optimizer = MeZOSVRG(net.parameters(), 1e-3, 1e-4, anchor_every=3)
    x, y = next(batches())

    def tell(name: str) -> Callable[[], Tensor]:
        return lambda: (calls.append(name), closure_of(net, (x, y))())[1]

    for step in range(6):
        optimizer.step(tell("mini"), tell("anchor") if step % 3 == 0 else None)
    assert calls == (["anchor"] * 2 + ["mini"] * 8) * 2
    with pytest.raises(ValueError, match="step 6 is an anchor step: give anchor_closure"):
        optimizer.step(tell("mini"))


@pytest.mark.parametrize("scale", [0.02, 1.0])
def test_a_hundred_restorations(scale: float) -> None:
    """In place, fp32 drifts by at most 1e-6 of its rms; from a copy it comes back bit for bit."""
    start = torch.randn(300, 300, generator=torch.Generator().manual_seed(0)) * scale
    for restore, limit in (("in_place", 1e-6), ("copy", 0.0)):
        w = nn.Parameter(start.clone())
        optimizer = MeZO([w], lr=0.0, restore=restore)
        for _ in range(100):
            optimizer.step(lambda w=w: w.square().mean())
        drift = (w.detach() - start).double().square().mean().sqrt() / start.double().square().mean().sqrt()
        assert drift <= limit, (restore, drift)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_parameters_come_back_exactly(dtype: torch.dtype) -> None:
    w = nn.Parameter(torch.randn(64, 64).to(dtype))
    start, optimizer = w.detach().clone(), MeZOSVRG([w], 0.0, 0.0)
    for _ in range(20):
        loss = optimizer.step(lambda: w.float().square().mean(), lambda: w.float().square().mean())
    assert torch.equal(w, start) and loss.dtype == torch.float32
    moving = MeZO([w], lr=0.1)
    moving.step(lambda: w.float().square().mean())
    assert not torch.equal(w, start)


@pytest.mark.parametrize("snapshot", ["copy", "seed_log"])
def test_state_dict_continues_bitwise(snapshot: str) -> None:
    options = {"lr_anchor": 1e-2, "lr_inner": 1e-3, "anchor_every": 4, "snapshot": snapshot, "anneal": 2.0}
    net, source = model(), batches()
    anchor, rows = closure_of(net, next(source)), [next(source) for _ in range(11)]
    optimizer = MeZOSVRG(net.named_parameters(), **options)
    for t in range(6):
        optimizer.step(closure_of(net, rows[t]), anchor)
    again, saved = copy.deepcopy(net), copy.deepcopy(optimizer.state_dict())
    other = MeZOSVRG(again.named_parameters(), **options)
    other.load_state_dict(saved)
    for t in range(6, 11):
        optimizer.step(closure_of(net, rows[t]), anchor)
        other.step(closure_of(again, rows[t]), closure_of(again, next(batches())))
    assert same(net, again, 0.0)


def test_frozen_and_tied_parameters() -> None:
    net = model()
    net[0].bias.requires_grad_(False)
    net.register_parameter("again", net[0].weight)
    frozen = net[0].bias.detach().clone()
    losses(net, MeZO, 3, lr=1e-2)
    assert torch.equal(net[0].bias, frozen)
    for p in net.parameters():
        p.requires_grad_(False)
    start = copy.deepcopy(net)
    losses(net, MeZO, 3, lr=1e-2)
    assert not same(net, start, 1e-6)  # an inference model, whose parameters ask for no gradient at all


@pytest.mark.parametrize("shape", [(), (7,), (5, 1), (4, 3, 3, 3)])
def test_any_shape_and_stride(shape: tuple[int, ...]) -> None:
    start = torch.randn(shape, dtype=torch.float64)
    w = nn.Parameter(start.clone())
    other = start.clone()
    if len(shape) == 4:
        other = other.to(memory_format=torch.channels_last)
    elif len(shape) == 2:
        other = start.T.clone(memory_format=torch.contiguous_format).T
    strided = nn.Parameter(other)
    for p in (w, strided):
        optimizer = MeZOSVRG([p], 1e-2, 1e-2)
        for _ in range(4):
            optimizer.step(lambda p=p: (p - 1).square().sum(), lambda p=p: (p - 1).square().sum())
    assert torch.allclose(w, strided, rtol=0, atol=1e-6) and not torch.equal(w, start)


class Largest(TorchDispatchMode):
    """Elements of the largest new tensor that operations made; views are not new."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.most = known, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.most = max(self.most, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


@pytest.mark.parametrize("make", [
    lambda p: MeZO(p, 1e-3),
    lambda p: MeZO(p, 1e-3, restore="copy"),
    lambda p: MeZO(p, 1e-3, noise="rademacher"),
    lambda p: MeZOSVRG(p, 1e-3, 1e-4),
    lambda p: MeZOSVRG(p, 1e-3, 1e-4, snapshot="seed_log"),
])  # fmt: skip
def test_no_temporary_is_larger_than_a_chunk(make) -> None:
    parameters = [nn.Parameter(torch.zeros(700, 700)), nn.Parameter(torch.zeros(490_000))]
    optimizer = make(parameters)
    for _ in range(2):
        optimizer.step(lambda: torch.zeros(()), lambda: torch.zeros(()))
    held = [*parameters, *(s["anchor"] for s in optimizer.state.values()), *(optimizer.kept or [])]
    with Largest({tensor.untyped_storage().data_ptr() for tensor in held}) as seen:
        for _ in range(2):
            optimizer.step(lambda: torch.zeros(()), lambda: torch.zeros(()))
    assert 4 * 700 < seen.most <= CHUNK["cpu"] < 490_000


def test_bytes_held_in_units_of_the_parameters() -> None:
    def held(optimizer: torch.optim.Optimizer) -> int:
        state = [t for s in optimizer.state.values() for t in s.values()]
        return sum(t.numel() for t in [*state, *(optimizer.kept or [])]) // 90_000

    w = nn.Parameter(torch.zeros(300, 300))
    for make, copies in (
        (lambda: MeZO([w], 1e-3), 0),
        (lambda: MeZO([w], 1e-3, restore="copy"), 1),
        (lambda: MeZOSVRG([w], 1e-3, 1e-4), 1),
        (lambda: MeZOSVRG([w], 1e-3, 1e-4, snapshot="seed_log"), 0),
    ):
        optimizer = make()
        for _ in range(3):
            optimizer.step(lambda: w.sum(), lambda: w.sum())
        assert held(optimizer) == copies


def test_a_guard_that_says_no_moves_nothing() -> None:
    for restore in ("in_place", "copy"):
        net = model(dtype=torch.float32)
        start, source = copy.deepcopy(net), batches(torch.float32)
        optimizer = MeZOSVRG(net.parameters(), 1e-2, 1e-2, restore=restore)
        optimizer.guard = lambda loss, norm: torch.isfinite(loss) & torch.isfinite(norm)
        for _ in range(3):
            optimizer.step(lambda: torch.tensor(float("nan")), lambda: torch.tensor(float("inf")))
        assert same(net, start, 1e-6 if restore == "in_place" else 0.0)
        for _ in range(4):
            optimizer.step(closure_of(net, next(source)), closure_of(net, next(source)))
        assert not same(net, start, 1e-4) and all(p.isfinite().all() for p in net.parameters())


def test_annealing_rule() -> None:
    """v1/v2 > 1.05 at an epoch's end, once more than four epochs are known; floors; rates never rise."""
    annealing = Annealing(4.0, 2, torch.device("cpu"))
    rate = lambda name, value: float(annealing(name, torch.tensor(value)))  # noqa: E731
    for loss in [1.0] * 6 + [2.0, 2.0]:
        annealing.note(torch.tensor(loss))
    assert rate("lr_anchor", 1e-2) == pytest.approx(1e-2)  # 8 losses are not more than 4 x 2
    annealing.note(torch.tensor(2.0))
    assert rate("lr_anchor", 1e-2) == pytest.approx(1e-2)  # not the end of an epoch
    annealing.note(torch.tensor(2.0))  # (2, 2) against (1, 1) two epochs earlier
    assert rate("lr_anchor", 1e-2) == pytest.approx(2.5e-3)
    assert rate("lr_anchor", 2e-5) == pytest.approx(1e-5) and rate("lr_inner", 1e-7) == pytest.approx(1e-7)
    for _ in range(8):
        annealing.note(torch.tensor(2.05))  # 2.5 % above is not enough
    assert rate("lr_anchor", 1e-2) == pytest.approx(2.5e-3)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda p: MeZO(p, -1.0), "lr must be one number of at least 0"),
        (lambda p: MeZO([{"params": [q], "lr": 10.0**-i} for i, q in enumerate(p)], 1e-3), "for all groups"),
        (lambda p: MeZO(p, 1e-3, mu=0.0), "mu must be above 0"),
        (lambda p: MeZO(p, 1e-3, noise="uniform"), "noise is normal or rademacher"),
        (lambda p: MeZO(p, 1e-3, restore="never"), "restore is auto"),
        (lambda p: MeZO([("a", p[0]), ("a", p[1])], 1e-3), "'a' is there twice"),
        (lambda p: MeZOSVRG(p, 1e-3, 1e-3, anchor_every=1), "anchor_every must be at least 2"),
        (lambda p: MeZOSVRG(p, 1e-3, 1e-3, snapshot="log"), "snapshot is copy or seed_log"),
        (lambda p: MeZOSVRG(p, 1e-3, 1e-3, anneal=0.5), "anneal and anneal_every"),
    ],
)
def test_bad_options(make, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make(list(model().parameters()))


def test_a_loss_that_is_no_scalar() -> None:
    w = nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="scalar loss, not one of shape"):
        MeZO([w], 1e-3).step(lambda: w * 2)
    assert float(MeZO([w], 1e-3).step(lambda: 1.5)) == 1.5  # a number is as good as a tensor
