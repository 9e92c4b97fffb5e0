"""Pieces of tensors in checkpoints: any rectangle, cut anywhere, saved in one cut and loaded in another."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hlat.checkpoint import folder as folders
from hlat.checkpoint.layout import Index, Snapshot, Writer
from hlat.checkpoint.piece import Piece, piece, rectangles
from hlat.checkpoint.store import CheckpointStore, open_checkpoint

Held = tuple[tuple[int, ...], tuple[int, ...], int, int]  # offset, size, first, last: one rank's share


@st.composite
def cuts(draw: st.DrawFn, whole: tuple[int, ...]) -> list[Held]:
    """A tensor in rectangles along one dimension, each in runs of elements; both may be empty."""
    dim = draw(st.integers(0, len(whole) - 1))
    edges = _edges(draw, whole[dim])
    held = []
    for start, end in zip(edges, edges[1:], strict=False):
        offset = tuple(start if d == dim else 0 for d in range(len(whole)))
        size = tuple(end - start if d == dim else n for d, n in enumerate(whole))
        runs = _edges(draw, math.prod(size))
        held += [(offset, size, first, last) for first, last in zip(runs, runs[1:], strict=False)]
    return held


def _edges(draw: st.DrawFn, length: int) -> list[int]:
    return [0, *sorted(draw(st.lists(st.integers(0, length), max_size=3))), length]


SHAPES = st.one_of(st.tuples(st.integers(1, 9)), st.tuples(st.integers(1, 7), st.integers(1, 7)))
LAYOUTS = SHAPES.flatmap(lambda whole: st.tuples(st.just(whole), cuts(whole), cuts(whole)))


def numbered(whole: Sequence[int]) -> Tensor:
    return torch.arange(1.0, 1 + math.prod(whole)).view(*whole)


def taken(logical: Tensor, held: Held) -> Tensor:
    offset, size, first, last = held
    box = tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))
    return logical[box].reshape(-1)[first:last].clone()


def save(root: Path, step: int, ranks: Sequence[Mapping[str, Tensor]]) -> Path:
    """What the store does on several ranks, done here by one process in turn."""
    final = folders.step_folder(root, step)
    partial = folders.begin(final)

    def finish(index: Index) -> None:
        marker = {"step": step, "tokens": 0, "sequence": step, "permanent": False}
        meta = folders.meta_text({}, step, 0, [])
        folders.seal_folder(partial, sorted(index.headers), index.to_json(), meta, [], marker)
        folders.commit(partial, final)

    writer, snapshots = Writer(partial, finish), [Snapshot(tensors, None) for tensors in ranks]
    plans, metadata = snapshots[0].create_global_plan([s.create_local_plan() for s in snapshots])
    plans = writer.prepare_global_plan(plans)
    results = [writer.write_data(p, s).wait() for p, s in zip(plans, snapshots, strict=True)]
    writer.finish(metadata, results)
    return final


@settings(max_examples=200, deadline=None)
@given(LAYOUTS)
def test_pieces_cover_a_tensor_exactly(layout) -> None:
    whole, held, _ = layout
    logical, seen = numbered(whole), torch.zeros(whole, dtype=torch.int64)
    for share in held:
        flat = taken(logical, share)
        made = piece(flat, whole, *share)
        assert made.shape == torch.Size(whole) and made.dtype == flat.dtype
        if not isinstance(made, Piece):
            assert torch.equal(made, logical) and made.data_ptr() == flat.data_ptr()
            seen += 1
            continue
        assert len(made.blocks) <= 3
        for chunk, view in made.blocks:
            box = tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes, strict=True))
            assert torch.equal(view, logical[box])
            assert view.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
            seen[box] += 1
    assert (seen == 1).all()


@settings(max_examples=60, deadline=None)
@given(LAYOUTS)
@example(
    (
        (2, 2),
        [((0, 0), (2, 1), 0, 2), ((0, 1), (2, 1), 0, 1), ((0, 1), (2, 1), 1, 2)],
        [((0, 0), (2, 2), 0, 4)],
    )
)
def test_saved_in_one_cut_loaded_in_another(layout) -> None:
    whole, before, after = layout
    logical = numbered(whole)
    with tempfile.TemporaryDirectory() as place:
        ranks = [{"model/w": piece(taken(logical, share), whole, *share)} for share in before]
        checkpoint = open_checkpoint(save(Path(place), 1, ranks))
        assert torch.equal(checkpoint.read("model/w"), logical)
        for share in after:  # also shares of no element: they name the tensor and read nothing
            flat = torch.full((share[3] - share[2],), -1.0)
            checkpoint.load_into({"model/w": piece(flat, whole, *share, write=False)})
            assert torch.equal(flat, taken(logical, share))
        checkpoint.verify()


def test_what_several_ranks_hold_is_stored_once(tmp_path: Path) -> None:
    whole, names = (60, 50), [f"model/{n}" for n in range(8)]
    halves: list[Held] = [((0, 0), whole, 0, 1513), ((0, 0), whole, 1513, 3000)]
    ranks = [
        {name: piece(taken(numbered(whole), half), whole, *half) for name in names}
        for half in halves
        for _ in range(2)  # two ranks hold each half
    ]
    checkpoint = open_checkpoint(save(tmp_path, 1, ranks))
    assert all(torch.equal(checkpoint.read(name), numbered(whole)) for name in names)
    stored = sum(file.stat().st_size for file in checkpoint.path.glob("data-*"))
    assert stored < 1.1 * len(names) * numbered(whole).nbytes
    marked = [{name: piece(taken(numbered(whole), half), whole, *half) for name in names} for half in halves]
    copies = [
        {name: piece(taken(numbered(whole), half), whole, *half, write=False) for name in names}
        for half in halves
    ]
    assert all(Snapshot(tensors, None).bytes() == 0 for tensors in copies)
    checkpoint = open_checkpoint(save(tmp_path, 2, [*marked, *copies]))
    assert all(torch.equal(checkpoint.read(name), numbered(whole)) for name in names)
    assert len(list(checkpoint.path.glob("data-*"))) == 2


def test_a_part_that_nobody_writes_is_an_error(tmp_path: Path) -> None:
    first = piece(torch.zeros(4), (3, 3), (0, 0), (3, 3), 0, 4)
    second = piece(torch.zeros(5), (3, 3), (0, 0), (3, 3), 4, 9, write=False)
    with pytest.raises(ValueError, match="global plan"):
        save(tmp_path, 1, [{"model/w": first}, {"model/w": second}])


def test_a_whole_tensor_is_a_plain_view() -> None:
    flat = torch.arange(6.0)
    for whole in ((6,), (2, 3), (1, 2, 3)):
        made = piece(flat, whole, (0,) * len(whole), whole, 0, 6)
        assert type(made) is Tensor and made.shape == torch.Size(whole)
        assert made.data_ptr() == flat.data_ptr()
    assert piece(torch.ones(1), (), (), (), 0, 1).shape == ()
    assert isinstance(piece(flat, (2, 3), (0, 0), (2, 3), 0, 6, write=False), Piece)


def test_a_store_saves_and_loads_pieces_in_place(tmp_path: Path) -> None:
    store, flat = CheckpointStore(tmp_path, keep=2, async_=True), torch.arange(8.0).bfloat16()
    whole = {"model/w": piece(flat[:6], (2, 3), (0, 0), (2, 3), 0, 6), "optim/step": torch.tensor(3)}
    store.save(1, whole, {}, tokens=0)
    flat.fill_(-1)
    found = store.newest()
    assert found is not None and torch.equal(found.read("model/w"), torch.arange(6.0).bfloat16().view(2, 3))
    middle = piece(flat[1:4], (2, 3), (0, 0), (2, 3), 2, 5, write=False)
    found.load_into({"model/w": middle, "optim/step": torch.tensor(0)})
    assert flat.tolist() == [-1, 2, 3, 4, -1, -1, -1, -1]


@pytest.mark.parametrize(
    ("flat", "arguments"),
    [
        (torch.zeros(3), ((4,), (2,), (3,), 0, 3)),  # sticks out of the tensor
        (torch.zeros(3), ((4,), (0,), (4,), 2, 5)),  # sticks out of the rectangle
        (torch.zeros(3), ((4,), (0,), (4,), 3, 0)),
        (torch.zeros(2), ((4,), (0,), (4,), 0, 3)),  # too little memory
        (torch.zeros(6)[::2], ((4,), (0,), (4,), 0, 3)),
        (torch.zeros(1, 3), ((4,), (0,), (4,), 0, 3)),
        (torch.zeros(3), ((4, 1), (0,), (4,), 0, 3)),
        (torch.zeros(3), ((2, 2, 1), (0, 0, 0), (2, 2, 1), 0, 3)),
    ],
)
def test_numbers_that_do_not_fit_are_refused(flat: Tensor, arguments) -> None:
    with pytest.raises(ValueError, match=r"not in a tensor|in a row|cannot be cut"):
        piece(flat, *arguments)


def test_nothing_else_works_on_a_piece() -> None:
    part = piece(torch.zeros(3), (2, 2), (0, 0), (2, 2), 1, 4)
    assert repr(part) == "Piece of (2, 2): (1, 1) at (0, 1), (1, 2) at (1, 0)"
    with pytest.raises(NotImplementedError, match="only checkpoints"):
        part + 1
    assert list(rectangles((4, 3), 1, 11)) == [((0, 1), (1, 2)), ((1, 0), (2, 3)), ((3, 0), (1, 2))]
    assert list(rectangles((4, 3), 4, 5)) == [((1, 1), (1, 1))]
    assert list(rectangles((0, 3), 0, 0)) == list(rectangles((5,), 2, 2)) == []
