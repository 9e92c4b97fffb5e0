"""Batches: shifted targets, document mask, and the same rows for every number of ranks."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hlat.data.batch import make_batch

EOS, BOS = 0, 9


def slow_batch(rows):
    """ids, targets, positions, documents by a loop over single tokens."""
    ids, targets, positions, documents = [], [], [], []
    for row in rows:
        i, t, p, d = [], [], [], []
        document, position = 0, 0
        for here, following in zip(row, row[1:], strict=False):
            i.append(here)
            p.append(position)
            d.append(document)
            t.append(-100 if here == EOS else following)
            position += 1
            if here == EOS:
                document, position = document + 1, 0
        for whole, part in ((ids, i), (targets, t), (positions, p), (documents, d)):
            whole.append(part)
    return ids, targets, positions, documents


rows_lists = st.integers(2, 20).flatmap(
    lambda n: st.lists(st.lists(st.integers(0, 3), min_size=n, max_size=n), min_size=1, max_size=4)
)


@given(rows_lists)
@settings(max_examples=200, deadline=None)
def test_document_mask_equals_the_slow_reference(rows):
    batch = make_batch(np.array(rows, dtype=np.int64), EOS, document_mask=True)
    ids, targets, positions, documents = slow_batch(rows)
    assert batch.ids.tolist() == ids
    assert batch.targets.tolist() == targets
    assert batch.positions.tolist() == positions
    assert batch.documents.tolist() == documents
    assert int(batch.targets_count()) == sum(t != -100 for row in targets for t in row)


@given(rows_lists)
@settings(max_examples=50, deadline=None)
def test_without_the_mask_targets_are_the_next_tokens(rows):
    batch = make_batch(np.array(rows, dtype=np.int64), EOS, document_mask=False)
    assert batch.ids.tolist() == [row[:-1] for row in rows]
    assert batch.targets.tolist() == [row[1:] for row in rows]
    assert batch.positions is None and batch.documents is None
    assert int(batch.targets_count()) == batch.ids.numel()


def test_types_and_contiguity():
    batch = make_batch(np.array([[1, 0, 2, 3]], dtype=np.int64), EOS, True).to("cpu")
    types = [part.dtype for part in (batch.ids, batch.targets, batch.positions, batch.documents)]
    assert types == [torch.int64, torch.int64, torch.int64, torch.int32]
    assert all(part.is_contiguous() for part in (batch.ids, batch.targets, batch.positions, batch.documents))


@given(
    st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=5), min_size=3, max_size=9), st.integers(0, 9)
)
@settings(max_examples=100, deadline=None)
def test_a_token_that_is_bos_and_eos_is_each_in_its_place(documents, begin) -> None:
    """Against the same stream with a BOS of its own."""
    apart = [token for document in documents for token in (BOS, *document, EOS)][begin:]
    one = np.where(np.array([apart]) == BOS, EOS, apart)
    for mask in (False, True):
        batch = make_batch(one, EOS, mask, EOS)
        wanted = make_batch(np.array([apart]), EOS, mask, BOS)
        assert torch.equal(batch.targets, wanted.targets)
        if mask:
            assert torch.equal(batch.positions, wanted.positions)
            assert torch.equal(batch.documents, wanted.documents)
