"""MADA, Muon and compressed reductions do on NxD what they do on the native backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.nxd

STEPS = {"mada": 20, "muon": 6, "reduce": 12}
START = {"beta1": 0.85, "beta2": 0.9, "beta3": 0.3, "rho": 0.6, "c": 0.7, "gamma": 0.8}
SPEEDS = "{beta1: 0.2, beta2: 2.0, beta3: 10.0, rho: 3.0, c: 80.0, gamma: 0.8}"
MADA = [
    f"optim={{name: mada, lr: 1e-3, clip_norm: 0.5, hyper_start: 1, hyper_lr: {SPEEDS}, hyper_momentum: 0.5,"
    f" {', '.join(f'{k}: {v}' for k, v in START.items())}}}"
]
MUON = ["optim={name: muon, lr: 1e-3}"]
CONEF = ["reduce={name: conef, start_step: 3, ratio: 0.1, size: 0.2}"]
POWER = ["reduce={name: powersgd, start_step: 3, rank: 2}"]
LAYOUTS = {
    "tp2": ["parallel.tp=2"],
    "pp2": ["parallel.pp=2", "data.micro_batch=2"],
    "dp2": ["parallel.dp=2", "data.micro_batch=4"],
    "dp2-zero1": ["parallel.dp=2", "parallel.zero1=true", "data.micro_batch=4"],
    "dp2-tp2": ["parallel.tp=2", "data.micro_batch=4"],
    "dp2-tp2-zero1": ["parallel.tp=2", "parallel.zero1=true", "data.micro_batch=4"],
}
# name -> (ranks, layout, plug-in, kind)
CASES: dict[str, tuple[int, str, list[str], str]] = {
    "mada-tp2": (2, "tp2", MADA, "mada"),
    "mada-pp2": (2, "pp2", MADA, "mada"),
    "mada-dp2-zero1": (2, "dp2-zero1", MADA, "mada"),
    "muon-dp2-zero1": (2, "dp2-zero1", MUON, "muon"),
    "conef-dp2": (2, "dp2", CONEF, "reduce"),
    "conef-dp2-zero1": (2, "dp2-zero1", CONEF, "reduce"),
    "powersgd-dp2": (2, "dp2", POWER, "reduce"),
    "mada-dp2-tp2-zero1": (4, "dp2-tp2-zero1", MADA, "mada"),
    "conef-dp2-tp2": (4, "dp2-tp2", CONEF, "reduce"),
    "conef-dp2-tp2-zero1": (4, "dp2-tp2-zero1", CONEF, "reduce"),
}
# What a case is compared with, where that is not a native run on the same ranks (NxD takes away torch's way
# of making the groups that four of them need): (ranks, result).
OTHER = {
    "mada-dp2-tp2-zero1": (2, "native-mada-dp2-zero1"),
    "conef-dp2-tp2": (4, "conef-dp2-tp2-zero1"),
    "conef-dp2-tp2-zero1": (4, "conef-dp2-tp2"),
}
XLA = ("mada-tp2", "mada-dp2-zero1", "conef-dp2", "conef-dp2-zero1")
IDS = [("cpu-mode", name) for name in CASES] + [("xla-mode", name) for name in XLA]
Rows = list[dict[str, float]]


def cases(mode: str, world: int) -> list[dict[str, Any]]:
    names = [name for m, name in IDS if m == mode and CASES[name][0] == world]
    found = []
    for name in names:
        _, layout, words, kind = CASES[name]
        more = {"overrides": [*words, *LAYOUTS[layout]], "steps": STEPS[kind]}
        found.append({"name": name, "job": "metrics", **more})
        if mode == "cpu-mode" and name not in OTHER:
            found.append({"name": f"native-{name}", "job": "native_metrics", **more})
    return found


@pytest.fixture
def pair(nxd_result: Callable) -> Callable[[str, str], tuple[Rows, Rows]]:
    """A function (mode, name) -> metrics on NxD, and those they are compared with."""

    def get(mode: str, name: str) -> tuple[Rows, Rows]:
        world = CASES[name][0]
        ours = nxd_result(mode, world, cases(mode, world), name)
        ranks, other = OTHER.get(name, (world, f"native-{name}"))
        return ours, nxd_result("cpu-mode", ranks, cases("cpu-mode", ranks), other)

    return get


def worst(ours: Rows, theirs: Rows, keys: tuple[str, ...]) -> float:
    """Largest relative difference of these metrics over all steps."""
    assert len(ours) == len(theirs)
    pairs = [(a[key], b[key]) for a, b in zip(ours, theirs, strict=True) for key in keys]
    return max(abs(a - b) / max(abs(b), 1e-3) for a, b in pairs)


@pytest.mark.parametrize(("mode", "name"), IDS, ids=[f"{m}-{n}" for m, n in IDS])
def test_it_trains_as_on_the_native_backend(mode: str, name: str, pair: Callable) -> None:
    ours, theirs = pair(mode, name)
    assert ours[-1]["loss"] < ours[0]["loss"]
    assert worst(ours, theirs, ("loss", "grad_norm")) < 1e-5


@pytest.mark.parametrize(
    ("mode", "name"),
    [case for case in IDS if "mada" in case[1]],
    ids=[f"{m}-{n}" for m, n in IDS if "mada" in n],
)
def test_the_coefficients_go_the_same_way(mode: str, name: str, pair: Callable) -> None:
    ours, theirs = pair(mode, name)
    for key, start in START.items():
        assert abs(ours[-1][f"optim/{key}"] - start) > 1e-3, f"{key} has not moved"
        gap = max(abs(a[f"optim/{key}"] - b[f"optim/{key}"]) for a, b in zip(ours, theirs, strict=True))
        assert gap < 1e-5, key


@pytest.mark.parametrize(
    ("mode", "name"),
    [case for case in IDS if "conef" in case[1] or "powersgd" in case[1]],
    ids=[f"{m}-{n}" for m, n in IDS if "conef" in n or "powersgd" in n],
)
def test_the_same_is_sent_and_remembered(mode: str, name: str, pair: Callable) -> None:
    ours, theirs = pair(mode, name)
    for a, b in zip(ours, theirs, strict=True):
        for key in ("reduce/wire_bytes", "reduce/dense_bytes", "reduce/error_bytes"):
            assert a[key] == b[key] or name in OTHER, "without ZeRO-1 there is less padding"
        assert a["reduce/error_norm"] == pytest.approx(b["reduce/error_norm"], rel=1e-4, abs=1e-6)
    assert ours[2]["reduce/wire_bytes"] == ours[2]["reduce/dense_bytes"] > ours[3]["reduce/wire_bytes"]
    assert ours[-1]["reduce/error_norm"] > 0
