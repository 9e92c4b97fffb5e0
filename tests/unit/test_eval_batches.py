"""Requests laid into rows and batches: nothing is lost, every request can be read back, shapes are few."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hlat.evaluate.batches import (
    LONGEST_SHARED_ROW,
    MOST_MASK,
    Batch,
    Request,
    common_length,
    cut_left,
    plan,
    row_bucket,
    shape_bucket,
    share_beginnings,
)

tokens = st.lists(st.integers(1, 5), min_size=1, max_size=30).map(tuple)
# Few different beginnings, so that requests share them.
beginnings = st.sampled_from([(1,) * 20, (1,) * 12 + (2,) * 9, (3,) * 10, (4,)])
requests = st.lists(
    st.builds(lambda a, b, c: Request(a + b, c), beginnings, tokens | st.just(()), tokens), max_size=30
)


def read_back(batch: Batch, number: int) -> Request:
    """A request as a batch holds it: what its predictions see, found by the rules of `branch_mask`."""
    length = len(batch.ids[0])
    places = [p for p, owner in zip(batch.places, batch.owners, strict=True) if owner == number]
    targets = [t for t, owner in zip(batch.targets, batch.owners, strict=True) if owner == number]
    row, last = divmod(places[-1], length)
    marks = batch.branches[row] if batch.branches else [0] * length
    seen = [t for t in range(last + 1) if marks[t] in (0, marks[last])]
    assert [batch.positions[row][t] for t in seen] == list(range(len(seen)))
    fed = [batch.ids[row][t] for t in seen]
    assert places == [row * length + t for t in seen[len(seen) - len(targets) :]]
    context = len(fed) - (len(targets) - 1)
    assert fed[context:] == targets[:-1]
    return Request(tuple(fed[:context]), tuple(targets))


@settings(max_examples=150, deadline=None)
@given(requests, st.integers(1, 8), st.booleans())
def test_every_request_can_be_read_back(wanted: list[Request], size: int, few: bool) -> None:
    rows = share_beginnings(list(enumerate(wanted)), 64)
    assert sum(row.length for row in rows) <= sum(len(request.tokens) for request in wanted)
    batches = list(plan(rows, size, few_shapes=few))
    seen = [owner for batch in batches for owner in batch.owners if owner >= 0]
    assert sorted(set(seen)) == list(range(len(wanted)))
    assert len(seen) == sum(len(request.continuation) for request in wanted)
    for batch in batches:
        assert len(batch.ids) <= size and len({len(row) for row in (*batch.ids, *batch.positions)}) == 1
        for number in {owner for owner in batch.owners if owner >= 0}:
            assert read_back(batch, number) == wanted[number]


def test_choices_of_a_question_share_its_context() -> None:
    context = tuple(range(100))
    four = [Request(context, (200 + i, 300 + i, 400)) for i in range(4)]
    (row,) = share_beginnings(list(enumerate(four)), 128)
    assert row.shared == 100 and row.length == 100 + 4 * 2
    one_token = [Request(context, (200 + i,)) for i in range(4)]
    (row,) = share_beginnings(list(enumerate(one_token)), 128)
    assert row.length == 100 and not row.branches
    inside = [Request((*context, i, 7, 8), (9,)) for i in range(2)]  # contexts differ near their end
    (row,) = share_beginnings(list(enumerate(inside)), 128)
    assert (row.shared, row.length) == (100, 106)


def test_short_or_too_long_beginnings_are_not_shared() -> None:
    short = [Request((1, 2), (i, 5)) for i in range(10, 14)]
    assert len(share_beginnings(list(enumerate(short)), 64)) == 4
    many = [Request(tuple(range(1000)), (i, *range(300))) for i in range(5)]
    rows = share_beginnings(list(enumerate(many)), 64)
    assert len(rows) > 1 and all(row.length <= LONGEST_SHARED_ROW for row in rows)


def test_masks_have_bounds() -> None:
    long = [Request((n, *range(6000)), (i, 5)) for n in range(6) for i in range(2)]
    batches = list(plan(share_beginnings(list(enumerate(long)), 6001), 16))
    assert all(len(batch.ids) * len(batch.ids[0]) ** 2 <= MOST_MASK for batch in batches)
    assert sum(len(set(batch.owners) - {-1}) for batch in batches) == 12


def test_cut_left() -> None:
    request = Request((1, 2, 3, 4), (5, 6))
    assert cut_left(request, 5) == (request, 0)
    assert cut_left(request, 3) == (Request((3, 4), (5, 6)), 2)
    assert cut_left(request, 2) == (Request((4,), (5, 6)), 3)
    assert cut_left(request, 1) == (Request((5,), (6,)), 4)  # the continuation itself is too long
    assert len(cut_left(request, 3)[0].tokens) == 3


@given(st.integers(1, 10_000), st.integers(1, 8))
def test_buckets(length: int, split: int) -> None:
    bucket = shape_bucket(length, 8 * split)
    assert bucket >= length and bucket % (8 * split) == 0
    assert bucket <= length * 1.25 + 16 * split
    assert len({shape_bucket(n) for n in range(1024, 2048)}) <= 9
    assert row_bucket(length, 16) in (1, 2, 4, 8, 16)
    assert row_bucket(length, 16) >= min(length, 16)


@pytest.mark.parametrize(
    ("a", "b", "n"), [((1, 2), (1, 3), 1), ((), (1,), 0), ((1, 2), (1, 2, 3), 2), ((1,), (2,), 0)]
)
def test_common_length(a: tuple[int, ...], b: tuple[int, ...], n: int) -> None:
    assert common_length(a, b) == common_length(b, a) == n
