"""The order of training rows: permutation, weighted interleaving, windows."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hlat.data.mixture import Quota, SourceRows, TrainStream, number_documents, permute, whole_shares
from hlat.errors import UserError


class FakeShard:
    def __init__(self, tokens):
        self.tokens = np.asarray(tokens, dtype=np.uint32)
        self.count = len(self.tokens)

    def ids(self, start, stop):
        return self.tokens[start:stop].astype(np.int64)


def rows_of(sizes, seq_len, seed=0, source=0):
    """A source whose i-th token is i, cut into shards of these sizes."""
    edges = np.cumsum([0, *sizes])
    shards = [FakeShard(np.arange(a, b)) for a, b in zip(edges, edges[1:], strict=False)]
    return SourceRows(shards, seq_len, seed, source, "here")


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 50))
@settings(max_examples=60, deadline=None)
def test_permutation_is_a_bijection(size, seed, epoch):
    assert sorted(permute(i, size, seed, 3, epoch) for i in range(size)) == list(range(size))


def test_permutation_depends_on_seed_source_and_epoch():
    def order(seed, source, epoch):
        return [permute(i, 100, seed, source, epoch) for i in range(100)]

    orders = [order(0, 0, 0), order(1, 0, 0), order(0, 1, 0), order(0, 0, 1), list(range(100))]
    assert len({tuple(o) for o in orders}) == len(orders)


def test_permutation_spreads_evenly():
    # Over many epochs each place is equally likely: chi-square of 16 places, 4000 draws (limit: p = 1e-6).
    counts = np.bincount([permute(5, 16, 7, 0, epoch) for epoch in range(4000)], minlength=16)
    assert ((counts - 250) ** 2 / 250).sum() < 56.5


def test_permutation_refuses_an_index_outside():
    with pytest.raises(ValueError, match="range"):
        permute(10, 10, 0, 0, 0)


weights_lists = st.lists(st.decimals("0.01", "9", places=2).map(float), min_size=1, max_size=6)


@given(weights_lists)
@settings(max_examples=60, deadline=None)
def test_every_prefix_is_within_one_row_of_the_weights(weights):
    quota = Quota(weights)
    exact = [round(w * 100) for w in weights]  # the weights have two decimals
    total = sum(exact)
    taken = [0] * len(weights)
    for index in range(min(2 * quota.period + 3, 3000)):
        source, earlier = quota.locate(index)
        assert earlier == taken[source]
        taken[source] += 1
        assert all(abs(taken[i] * total - (index + 1) * weight) < total for i, weight in enumerate(exact))
        if index % 101 == 0:
            assert quota.counts(index + 1) == taken


def test_weights_become_the_smallest_whole_shares():
    assert whole_shares([0.67, 0.33]) == [67, 33]
    assert whole_shares([2.0, 4.0]) == [1, 2]
    assert whole_shares([5.0]) == [1]


def test_weights_with_many_digits_are_rounded_to_the_period():
    weights = [0.123456789, 0.3, 1e-9, 0.55]
    shares = whole_shares(weights)
    assert sum(shares) == 2**16 and min(shares) == 1
    for share, weight in zip(shares, weights, strict=True):
        assert abs(share - weight / sum(weights) * 2**16) < 4


@pytest.mark.parametrize("weights", [[], [1.0, 0.0], [1.0, -1.0], [float("inf")], [float("nan")]])
def test_impossible_weights_are_refused(weights):
    with pytest.raises(UserError, match="weights"):
        whole_shares(weights)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(1, 12), st.integers(0, 1000))
@settings(max_examples=150, deadline=None)
def test_each_token_is_a_target_once_per_epoch(sizes, seq_len, seed):
    total = sum(sizes)
    if total < seq_len:
        with pytest.raises(UserError, match="training tokens"):
            rows_of(sizes, seq_len, seed)
        return
    source = rows_of(sizes, seq_len, seed)
    for epoch in range(3):
        rows = [source.read(epoch * source.windows + i) for i in range(source.windows)]
        for row in rows:  # consecutive tokens of the ring, whatever the shards
            assert (np.diff(row) % total == 1 % total).all()
        targets = np.concatenate([row[1:] for row in rows])
        assert len(np.unique(targets)) == len(targets) == total - source.dropped_per_epoch
        assert source.dropped_per_epoch < seq_len


def test_another_epoch_drops_other_tokens():
    source = rows_of([1009], 100, seed=4)
    seen = [
        frozenset(np.concatenate([source.read(e * 10 + i)[1:] for i in range(10)]).tolist()) for e in range(4)
    ]
    assert source.dropped_per_epoch == 9 and len(set(seen)) > 1
    assert frozenset.union(*seen) == frozenset(range(1009))


def test_rows_are_a_pure_function_of_the_index():
    def stream():
        sources = [rows_of([300, 20], 16, 9, 0), rows_of([900], 16, 9, 1)]
        return TrainStream(sources, [0.25, 0.75], eos_id=7, document_mask=True)

    forward, backward = stream(), stream()
    wanted = {i: forward.row(i) for i in range(200)}
    for index in reversed(range(200)):
        ids, documents = backward.row(index)
        np.testing.assert_array_equal(ids, wanted[index][0])
        np.testing.assert_array_equal(documents, wanted[index][1])


def test_far_rows_cost_nothing():
    source = rows_of([5000], 16)
    TrainStream([source, source], [0.3, 0.7], 7, False).row(10**15)


def test_documents_are_numbered_by_their_end_tokens():
    ids = np.array([[5, 0, 6, 7, 0, 0, 8]])
    np.testing.assert_array_equal(number_documents(ids, 0), [[0, 0, 1, 1, 1, 2, 3]])
