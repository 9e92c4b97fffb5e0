"""Runs of elements of a logical tensor, as ranks hold them: what a shard of a flat bucket is to a checkpoint.

A rank holds a rectangle of a parameter (tensor parallelism), and with ZeRO-1 only some consecutive elements
of it, wherever the cut of the flat bucket falls. `torch.distributed.checkpoint` (DCP) knows rectangles alone,
so a run of elements is cut into at most three: the tail of a row, whole rows, the head of a row. Each is a
view of the flat memory: nothing is copied or gathered, and a load writes straight into the shard.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Shape = tuple[int, ...]


def piece(
    flat: Tensor,
    whole: Sequence[int],
    offset: Sequence[int],
    size: Sequence[int],
    first: int,
    last: int,
    write: bool = True,
) -> Tensor:
    """Some consecutive elements of a rectangle of a tensor, to save from or load into.

    Args:
        flat: the memory of these elements, contiguous 1-D of `last - first`, any dtype and device.
        whole: shape of the logical tensor, 1-D or 2-D (any shape where the piece is all of it).
        offset, size: the rectangle of it that this process holds some of.
        first, last: the elements held are [first, last) of the rectangle, flattened row by row.
        write: False for a copy of what another process writes: it is loaded but never saved.

    Returns:
        A tensor of shape `whole` for `CheckpointStore.save` and `Checkpoint.load_into`, and for nothing else;
        a plain view of `flat` where the piece is the whole tensor. With first == last it writes nothing and
        reads nothing.

    Raises:
        ValueError: the numbers do not fit each other.
    """
    whole, offset, size = tuple(whole), tuple(offset), tuple(size)
    fits = len(whole) == len(offset) == len(size) and all(
        min(o, n) >= 0 and o + n <= w for w, o, n in zip(whole, offset, size, strict=True)
    )
    if not fits or not 0 <= first <= last <= math.prod(size):
        raise ValueError(f"elements {first} to {last} of {size} at {offset} are not in a tensor of {whole}")
    if flat.dim() != 1 or flat.numel() != last - first or not flat.is_contiguous():
        raise ValueError(f"a piece of {last - first} elements needs as many in a row, not {list(flat.shape)}")
    flat = flat.as_strided((last - first,), (1,))  # a single element may come with any stride
    if write and size == whole and last - first == math.prod(whole):
        return flat.view(whole)
    if not 1 <= len(whole) <= 2:
        raise ValueError(f"a tensor of shape {whole} cannot be cut into pieces")
    return Piece(flat, whole, offset, size, first, last, write)


class Piece(torch.Tensor):
    """See `piece`. Has the shape and dtype of the logical tensor but not its elements: no operation works on
    it.
    """

    blocks: list[tuple[ChunkStorageMetadata, Tensor]]
    write: bool

    @staticmethod
    def __new__(
        cls, flat: Tensor, whole: Shape, offset: Shape, size: Shape, first: int, last: int, write: bool
    ) -> Piece:
        made: Piece = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, whole, dtype=flat.dtype, device=flat.device
        )
        return made

    def __init__(
        self, flat: Tensor, whole: Shape, offset: Shape, size: Shape, first: int, last: int, write: bool
    ) -> None:
        self.write, self.blocks, at = write, [], 0
        for start, box in rectangles(size, first, last):
            count = math.prod(box)
            place = torch.Size(o + s for o, s in zip(offset, start, strict=True))
            view = flat.detach()[at : at + count].view(box)
            self.blocks.append((ChunkStorageMetadata(place, torch.Size(box)), view))
            at += count

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise NotImplementedError(f"{func} on a piece of a tensor, which only checkpoints can use")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        boxes = ", ".join(f"{tuple(chunk.sizes)} at {tuple(chunk.offsets)}" for chunk, _ in self.blocks)
        return f"Piece of {tuple(self.shape)}: {boxes or 'nothing'}{'' if self.write else ', not written'}"

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [chunk for chunk, _ in self.blocks]

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        if not self.write:
            return []
        return [
            WriteItem(
                MetadataIndex(fqn, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, TensorProperties.create_from_tensor(view), self.shape),
            )
            for chunk, view in self.blocks
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return next(view for chunk, view in self.blocks if chunk.offsets == index.offset)


def rectangles(size: Shape, first: int, last: int) -> Iterator[tuple[Shape, Shape]]:
    """(offset, size) of the rectangles, at most three, that elements [first, last) of a row-major 1-D or 2-D
    array of `size` fill, in the order of the elements.
    """
    if len(size) == 1:
        if first < last:
            yield (first,), (last - first,)
        return
    width = size[1]
    while first < last:
        row, column = divmod(first, width)
        rows = (last - first) // width if column == 0 else 0
        box = (rows, width) if rows else (1, min(width - column, last - first))
        yield (row, column), box
        first += math.prod(box)
