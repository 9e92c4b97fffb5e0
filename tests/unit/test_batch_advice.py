"""A batch that does not fit the processes: the advice keeps the batch, and following it works."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hlat.errors import UserError
from hlat.mesh import micro_batches
from hlat.recipe import load
from hlat.recipe_sections import ParallelSection
from hlat.section import divisors, largest_divisor


@pytest.mark.parametrize("world", [1, 2, 4])
def test_tiny_runs_as_shipped_with_one_batch(world: int) -> None:
    recipe = load("tiny")
    assert recipe.accumulate(world) * recipe.data.micro_batch * world == recipe.data.global_batch == 32


def test_the_advice_names_the_key_that_keeps_the_batch() -> None:
    with pytest.raises(UserError, match=r"data\.micro_batch: .* x dp 2; take data\.micro_batch 16$"):
        load("tiny", ["data.micro_batch=32"]).accumulate(2)
    with pytest.raises(UserError, match=r"data\.micro_batch: .*; take micro_batch 8$"):
        load("tiny", ["data.micro_batch=12"])
    with pytest.raises(UserError, match=r"dp 3: no micro_batch fits; take parallel\.dp 2: start 2 processes"):
        load("tiny", ["parallel.dp=3"])


SCHEDULES = st.sampled_from(["1f1b", "gpipe", "interleaved"])
SIZES = st.integers(1, 6)


@settings(max_examples=200, deadline=None)
@given(SCHEDULES, st.integers(1, 48), SIZES, SIZES, SIZES)
def test_following_the_advice_ends_in_a_step(schedule, units, micro_batch, dp, pp) -> None:
    rows = units * micro_batch  # a section's own check
    for _ in range(4):  # layout, then micro-batch: each piece of advice is followed to the letter
        parallel = ParallelSection.model_validate({"pp": pp, "schedule": schedule})
        try:
            number = micro_batches(parallel, rows, micro_batch, dp)
        except ValueError as error:
            fix = error.context["fix"]
            assert "batch" not in fix.replace("micro_batch", "")
            if found := re.match(r"take data\.micro_batch (\d+)$", fix):
                assert int(found[1]) <= micro_batch
                micro_batch = int(found[1])
            elif found := re.match(r"take parallel\.pp (\d+) or", fix):
                pp = int(found[1])
            else:
                dp = int(re.match(r"start (\d+) process", fix)[1]) // pp
        else:
            assert number * micro_batch * dp == rows
            return
    pytest.fail(f"advice goes round in circles: {rows=} {micro_batch=} {dp=} {pp=}")


def test_divisors_of_a_number_beyond_any_batch() -> None:
    assert divisors(36) == [n for n in range(1, 37) if 36 % n == 0]
    assert divisors(2**31 - 1) == [1, 2**31 - 1]
    assert largest_divisor(2**31, 10**9) == 2**29
