"""What MeZO-SVRG is for, on least squares: larger steps than MeZO bears, and a lower floor."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from hlat.method import MeZO, MeZOSVRG

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[1] / "bench" / "mezo_least_squares.py"
    spec = importlib.util.spec_from_file_location("mezo_least_squares", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def problems(script: ModuleType) -> list:
    torch.set_num_threads(1)
    return [script.Problem(seed) for seed in script.SEEDS]


def test_a_rate_at_which_mezo_diverges(script: ModuleType, problems: list) -> None:
    for problem in problems:
        assert problem.excess(lambda p, s: MeZOSVRG(p, 4e-3, 4e-5, seed=s)) < 1e-3
        assert not problem.excess(lambda p, s: MeZO(p, 4e-3, seed=s), steps=1000) < 1e3


def test_sharing_the_direction_is_what_cancels_the_noise(script: ModuleType, problems: list) -> None:
    for problem in problems:
        assert problem.excess(script.CASES["SVRG, both rates 2e-3"]) < 1e-3
        for name in ("the same, two z", "the same, compat authors"):
            assert not problem.excess(script.CASES[name], steps=2000) <= 0.1


def test_a_hundredth_of_mezos_floor_at_equal_queries(script: ModuleType, problems: list) -> None:
    """At MeZO's best rate, 1e-4: `--equal-queries` has the others."""
    steps = script.QUERIES // (2 * script.BATCH)
    for problem in problems[:1]:
        ours = problem.excess(lambda p, s: MeZOSVRG(p, 4e-3, 4e-5, seed=s))
        assert 100 * ours < problem.excess(lambda p, s: MeZO(p, 1e-4, seed=s), steps)
