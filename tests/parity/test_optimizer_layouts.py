"""MADA's coefficients go the same way on every layout, and continue from a checkpoint of any; Muon too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("optimizer_ranks.py")
START = {"beta1": 0.85, "beta2": 0.9, "beta3": 0.3, "rho": 0.6, "c": 0.7, "gamma": 0.8}
SPEEDS = "{beta1: 0.2, beta2: 2.0, beta3: 4.0, rho: 3.0, c: 80.0, gamma: 0.2}"
MADA = (
    "model.layers=4",
    "model.vocab=96",
    "data.document_mask=true",
    f"optim={{name: mada, lr: 1e-3, clip_norm: 0.5, hyper_start: 1, hyper_lr: {SPEEDS}, hyper_momentum: 0.5,"
    f" groups: [{{match: embed.weight, lr: 4e-3}}], {', '.join(f'{k}: {v}' for k, v in START.items())}}}",
)
MUON = ("model.layers=4", "model.vocab=96", "optim={name: muon, lr: 1e-3}")
WORDS = {
    **{f"{axis}2": (2, f"parallel.{axis}=2") for axis in ("dp", "tp", "pp")},
    "zero1": (1, "parallel.zero1=true"),
    "sequence": (1, "parallel.sequence=true"),
    "tied": (1, "model.tie_embeddings=true"),
    "muon": (1, ""),
    "one": (1, ""),
}
STEPS, TIMEOUT = 20, 400

LAYOUTS = ["dp2", "dp2-zero1", "tp2", "tp2-sequence", "pp2", "dp2-tp2", "dp2-tp2-sequence-zero1", "dp2-pp2"]
TIED = ["pp2-tied", "dp2-zero1-tied"]
WHOLE = ["dp2-zero1-muon", "pp2-muon"]


def case(layout: str, **more: Any) -> dict[str, Any]:
    words = layout.split("-")
    world, overrides = 1, list(MUON if "muon" in words else MADA)
    for word in words:
        world *= WORDS[word][0]
        overrides += [WORDS[word][1]] if WORDS[word][1] else []
    micro = 8 // (2 if "dp2" in words else 1) // (2 if "pp2" in words else 1)
    overrides.append(f"data.micro_batch={micro}")
    return {"name": layout, "world": world, "overrides": overrides, "steps": STEPS, **more}


CASES = [
    case("one"),
    case("one-tied"),
    case("one-muon", steps=5),
    *(case(layout) for layout in LAYOUTS if layout != "dp2-tp2-sequence-zero1"),
    case("dp2-tp2-sequence-zero1", save=10),
    *(case(layout) for layout in TIED),
    *(case(layout, steps=5) for layout in WHOLE),
    case("dp2-tp2-sequence-zero1", name="again", **{"from": "dp2-tp2-sequence-zero1"}),
    case("pp2", name="moved", **{"from": "dp2-tp2-sequence-zero1"}),
    case("one", name="alone", **{"from": "dp2-tp2-sequence-zero1"}),
    case("dp2-zero1", name="unsummed", fault="no sum", steps=8),
    case("tp2", name="counted twice", fault="count copies", steps=8),
    case("dp2", name="counted by both", fault="count copies", steps=8),
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each rank of each case wrote. Four processes work through all cases."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "cases.json").write_text(json.dumps(CASES))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ranks = []
    for rank in range(4):
        with open(folder / f"rank-{rank}.log", "w") as log:
            command = [sys.executable, str(PROGRAM), str(folder / "cases.json"), str(folder), str(rank)]
            ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    deadline = time.monotonic() + TIMEOUT
    try:
        while any(process.poll() is None for process in ranks) and time.monotonic() < deadline:
            time.sleep(0.2)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    errors = sorted(folder.glob("*.error"))
    assert not errors, errors[0].read_text()
    logs = "\n".join((folder / f"rank-{rank}.log").read_text()[-1000:] for rank in range(4))
    wanted = {c["name"]: [folder / f"{c['name']}.{rank}.json" for rank in range(c["world"])] for c in CASES}
    assert all(file.exists() for files in wanted.values() for file in files), logs
    return {name: [json.loads(file.read_text()) for file in files] for name, files in wanted.items()}


def distance(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Largest difference of a coefficient at any step both have."""
    first, skip = ours["coefficients"], ours["first"] - theirs["first"]
    pairs = zip(first, theirs["coefficients"][skip:], strict=False)
    return max(abs(a[name] - b[name]) for a, b in pairs for name in START)


@pytest.mark.parametrize("layout", LAYOUTS + TIED)
def test_coefficients_go_the_same_way(results, layout: str) -> None:
    one = results["one-tied" if "tied" in layout else "one"][0]
    ranks = results[layout]
    assert all(rank["coefficients"] == ranks[0]["coefficients"] for rank in ranks), "ranks disagree"
    assert len(one["coefficients"]) == STEPS and distance(ranks[0], one) < 1e-6


def test_every_coefficient_moves(results) -> None:
    for name in ("one", "one-tied"):
        end = results[name][0]["coefficients"][-1]
        assert min(abs(end[key] - START[key]) for key in START) > 1e-3, end


@pytest.mark.parametrize("name", ["unsummed", "counted twice", "counted by both"])
def test_a_planted_mistake_is_seen(results, name: str) -> None:
    assert distance(results[name][0], results["one"][0]) > 1e-5


def test_resume_is_bitwise(results) -> None:
    for ours, theirs in zip(results["again"], results["dp2-tp2-sequence-zero1"], strict=True):
        assert ours["first"] == 10 and theirs["first"] == 0
        assert ours["coefficients"] == theirs["coefficients"][10:]
        assert ours["losses"] == theirs["losses"][10:] and ours["sums"] == theirs["sums"]


@pytest.mark.parametrize("name", ["moved", "alone"])
def test_resume_in_another_layout(results, name: str) -> None:
    assert distance(results[name][0], results["dp2-tp2-sequence-zero1"][0]) < 1e-6
    for ours, theirs in zip(
        results[name][-1]["losses"], results["dp2-tp2-sequence-zero1"][0]["losses"][10:], strict=True
    ):
        assert ours == pytest.approx(theirs, abs=5e-5)


@pytest.mark.parametrize("layout", WHOLE)
def test_muon_sees_whole_matrices(results, layout: str) -> None:
    """bf16 iterations amplify rounding, so the agreement is looser."""
    for ours, theirs in zip(results[layout][-1]["losses"], results["one-muon"][0]["losses"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-3)
