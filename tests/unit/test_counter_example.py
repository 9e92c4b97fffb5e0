"""The counter-example to Adam: where each ends, and that the script's MADA is HLAT's."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hlat.optim import MADA, AdamW, AMSGrad

STEPS = 2_000_000


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[1] / "bench" / "counter_example.py"
    spec = importlib.util.spec_from_file_location("counter_example", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_adam_goes_the_wrong_way_amsgrad_and_mada_the_right_one(script) -> None:
    assert script.adam(STEPS)[0] > 0.99
    assert script.adam(STEPS, amsgrad=True)[0] < -0.9
    x, regret, h = script.mada(STEPS)
    assert x < -0.8 and h["rho"] < 0.1
    assert regret < script.adam(STEPS)[1]


def play(script, optimizer: torch.optim.Optimizer, p: torch.nn.Parameter, steps: int) -> list[float]:
    out = []
    for t in range(1, steps + 1):
        p.grad = torch.full((1,), script.gradient(t))
        optimizer.step()
        p.data.clamp_(-1.0, 1.0)
        out.append(float(p.detach()))
    return out


def test_the_scripts_optimizers_are_those_of_hlat(script) -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = MADA(
        [p],
        lr=1e-3,
        beta2=0.99,
        weight_decay=0.0,
        learn=("beta3", "rho", "c"),
        hyper_lr=0.1,
        hyper_momentum=0.9,
        hyper_start=1,
    )
    places = play(script, optimizer, p, 400)
    x, _, h = script.mada(400)
    assert places[-1] == pytest.approx(x, abs=2e-5)
    assert h["rho"] < 0.9999 and h["beta3"] > 1e-4
    for name, value in h.items():
        assert optimizer.coefficients()[name] == pytest.approx(value, abs=2e-4)
    for kind, amsgrad in ((AdamW, False), (AMSGrad, True)):
        p = torch.nn.Parameter(torch.zeros(1))
        plain = kind([p], lr=1e-3, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.0)
        assert play(script, plain, p, 400)[-1] == pytest.approx(script.adam(400, amsgrad)[0], abs=1e-5)
