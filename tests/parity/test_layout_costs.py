"""What a layout costs: bytes counted and measured on every rank against the closed forms."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from hlat.parallel.costs import kept, sent
from hlat.recipe import Recipe, load

TWO = [
    "dp2-accumulate2",
    "dp2-zero1-accumulate2",
    "tp2-accumulate2",
    "tp2-sequence-accumulate2",
    "pp2-accumulate2",
    "tp2-full-accumulate2",
    "tp2-sequence-full-accumulate2",
    "tp2-sequence-kv1-tied",
    "pp2-interleaved-tied",
    "dp2-zero1-fp32",
]
FOUR = [
    "dp2-tp2-sequence-zero1-accumulate2",
    "dp2-pp2-zero1-accumulate2",
    "dp2-pp2-zero1-tied-accumulate2",
    "tp2-pp2-sequence-accumulate2",
    "tp4-sequence-kv1-selective",
]
DOCUMENT = Path(__file__).parents[2] / "docs" / "parallelism.md"
DOCUMENTED = {  # rows of its tables; the last one needs more ranks than a test should start
    "dp 2": "dp2-accumulate2",
    "dp 2, zero1": "dp2-zero1-accumulate2",
    "tp 2": "tp2-accumulate2",
    "tp 2, sequence": "tp2-sequence-accumulate2",
    "tp 2, sequence, recompute full": "tp2-sequence-full-accumulate2",
    "pp 2": "pp2-accumulate2",
    "dp 2 x tp 2, sequence, zero1": "dp2-tp2-sequence-zero1-accumulate2",
    "dp 2 x pp 2, zero1": "dp2-pp2-zero1-accumulate2",
    "tp 2 x pp 2, sequence": "tp2-pp2-sequence-accumulate2",
    "dp 2 x pp 2 x tp 2, sequence, zero1": "",
}
EIGHT = ["dp=2", "pp=2", "tp=2", "sequence=true", "zero1=true"]


@pytest.fixture(scope="module")
def measured(run_ranks) -> Callable[[str], Any]:
    """A function that gives the outcome of a layout: the `tiny` recipe on 16 rows of 64 tokens, one step
    before the measured one.
    """

    @cache
    def group(world: int) -> dict[str, Any]:
        more = {"recipe": "tiny", "rows": 16, "extra": ["data.seq_len=64"], "steps": 1, "measure": True}
        layouts = TWO if world == 2 else FOUR
        return run_ranks(world, [{"name": layout, "layout": layout, **more} for layout in layouts])

    return lambda layout: group(2 if layout in TWO else 4)[layout].check()


def recipe_of(outcome: Any) -> Recipe:
    return load("tiny", outcome.case["overrides"])


@pytest.mark.parametrize("layout", [*TWO, *FOUR])
def test_bytes_sent_are_what_the_closed_form_says(measured, layout: str) -> None:
    outcome = measured(layout)
    recipe, world = recipe_of(outcome), len(outcome.ranks)
    mesh = recipe.layout(world)
    for rank, result in enumerate(outcome.ranks):
        # Groups of equal ranks are one process group: their bytes are counted together.
        wanted: dict[str, float] = {}
        for name, size in asdict(sent(recipe, mesh, mesh.place(rank))).items():
            ranks = ",".join(map(str, result["groups"][name]))
            wanted[ranks] = wanted.get(ranks, 0.0) + size
        assert result["sent"] == {ranks: size for ranks, size in wanted.items() if size}, f"rank {rank}"


@pytest.mark.parametrize("layout", [*TWO, *FOUR])
def test_memory_is_what_the_closed_form_says(measured, layout: str) -> None:
    outcome = measured(layout)
    recipe, world = recipe_of(outcome), len(outcome.ranks)
    mesh = recipe.layout(world)
    for rank, result in enumerate(outcome.ranks):
        wanted = kept(recipe, mesh, mesh.place(rank))
        memory = result["memory"]
        for name in ("weights", "gradients", "masters", "states"):
            assert memory[name] == getattr(wanted, name), f"rank {rank}: {name}"
        # Nothing else of a parameter's size is alive: every tensor of the process is in this sum.
        assert memory["all"] == pytest.approx(wanted.total, rel=0.02), f"rank {rank}"


@pytest.mark.parametrize("row", DOCUMENTED)
def test_the_document_has_these_numbers(measured, row: str) -> None:
    if layout := DOCUMENTED[row]:
        recipe = recipe_of(measured(layout))
    else:
        batch = ["data.seq_len=64", "data.global_batch=16", "data.micro_batch=4"]
        recipe = load("tiny", [*batch, *(f"parallel.{text}" for text in EIGHT)])
    world = math.prod(int(number) for number in re.findall(r"[dpt]p (\d)", row))
    mesh = recipe.layout(world)
    places = [mesh.place(rank) for rank in range(world)]
    traffic = max((sent(recipe, mesh, place) for place in places), key=lambda x: x.total)
    memory = max((kept(recipe, mesh, place) for place in places), key=lambda x: x.total)
    rows = [
        (traffic.tp, traffic.pp, traffic.dp, traffic.world, traffic.total),
        (*(size for kind, size in asdict(memory).items() if kind != "frozen"), memory.total),
    ]
    for numbers in rows[: 1 if "recompute" in row else 2]:  # which keeps what the row above it keeps
        assert f"| {row} | " + " | ".join(f"{x:,.0f}" for x in numbers) + " |\n" in DOCUMENT.read_text()


def test_shares_of_the_ranks_add_up() -> None:
    """Weights of all ranks of a replica are the model's; ZeRO-1 divides masters and states by dp."""
    recipe = load("tiny", ["parallel.tp=2", "parallel.pp=2", "parallel.zero1=true", "data.micro_batch=4"])
    mesh = recipe.layout(8)
    ranks = [kept(recipe, mesh, mesh.place(rank)) for rank in range(8)]
    whole = kept(recipe, recipe.layout(4), recipe.layout(4).place(0))
    assert sum(rank.weights for rank in ranks[:4]) == pytest.approx(
        2 * recipe.model.parameter_count(), rel=0.01
    )
    assert ranks[0].states == pytest.approx(whole.states / 2, rel=0.01)
    assert ranks[0].total < whole.total


def test_one_process_sends_nothing() -> None:
    recipe = load("tiny")
    mesh = recipe.layout(1)
    assert sent(recipe, mesh, mesh.place(0)).total == 0


def test_torch_is_not_needed() -> None:
    probe = "import hlat.parallel.costs, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", probe]).returncode == 0
