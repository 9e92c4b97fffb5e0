"""Parameters moved along noise, a chunk at a time: no operation makes a tensor the size of a parameter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hlat.method.noise import Grid, Kind, displacement, draw_noise, keys_of, name_words, seed_words

CHUNK = {"cpu": 1 << 16, "xla": 0}  # elements; 0: all at once, since XLA's compiler cuts fused loops itself
CHUNK_ELSEWHERE = 1 << 22


@dataclass(frozen=True)
class Piece:
    """What this process holds of one parameter.

    name: the parameter's, on every rank the same.
    grid: which rectangle of the whole it is.
    owner: the tensor that holds its values in the precision in which they are updated, perhaps among others.
    view: from the owner, or a tensor like it, to the piece's own elements; any strides.
    live: what the model computes with, of the piece's shape; None: the same elements.
    """

    name: str
    grid: Grid
    owner: Tensor
    view: Callable[[Tensor], Tensor] = lambda tensor: tensor
    live: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Direction:
    """One draw of noise for all pieces of a field.

    keys: int32 (P, 4).
    drawn: by piece the noise itself, where the field is small.
    """

    keys: Tensor
    drawn: dict[int, Tensor] = field(default_factory=dict)


Change = Mapping[Direction, Tensor | float]  # how far along each direction; numbers or tensors ()


class Field:
    """The parameters as one point, which can be moved along directions.

    Args:
        pieces: in any order; every name once.
        seed: of the noise.
        kind: of the noise.
        device: where numbers live when there is no piece.

    Raises:
        ValueError: two pieces with one name would get the same noise.
    """

    def __init__(
        self,
        pieces: Sequence[Piece],
        seed: int,
        kind: Kind = "normal",
        device: torch.device | str = "cpu",
    ) -> None:
        names = [piece.name for piece in pieces]
        twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set()
        if twice:
            raise ValueError(f"parameter name {min(twice)!r} is there twice: both would move alike")
        self.pieces, self.kind = list(pieces), kind
        self.bases = [piece.view(piece.owner.detach()) for piece in pieces]
        self.live = [b if p.live is None else p.live for p, b in zip(pieces, self.bases, strict=True)]
        self.device = pieces[0].owner.device if pieces else torch.device(device)
        self._seed, self._names = seed_words(seed, self.device), name_words(names, self.device)
        wide = any(piece.owner.dtype == torch.float64 for piece in pieces)
        self.dtype = torch.float64 if wide else torch.float32
        self._displacement: Callable[..., Tensor] = displacement
        # All of it fits a chunk: drawn once a step instead of at each of its points.
        self._small = sum(base.numel() for base in self.bases) <= CHUNK["cpu"] and self.device.type != "xla"

    def compile(self) -> None:
        """Fuse a chunk's noise into one kernel (every shape shares a few graphs)."""
        self._displacement = torch.compile(displacement, dynamic=True)

    def direction(self, step: Tensor, draw: int = 0) -> Direction:
        """The direction of draw `draw` in `step`, int32 () on the device."""
        return Direction(keys_of(self._seed, self._names, step, draw))

    def add(self, change: Change) -> None:
        """Move the bases along the directions, in place."""
        if change:
            self._write(change, self.bases, self.bases)

    def write(self, change: Change, source: Sequence[Tensor] | None = None) -> None:
        """Set the live tensors to a point: a source (default: the bases) moved along the directions."""
        source = self.bases if source is None else source
        if change:
            self._write(change, source, self.live)
        else:
            self.copy(source, self.live)

    def copy(self, source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
        """Copy tensor by tensor, rounding where the target is narrower."""
        for a, b in zip(source, target, strict=True):
            b.copy_(a)

    def swap(self, others: Sequence[Tensor]) -> None:
        """Exchange the values of the bases with those of tensors like them."""
        for piece, x, y in zip(self.pieces, self.bases, others, strict=True):
            for rows, columns in self._chunks(piece, x, y):
                one, other = _Block(x, rows, columns), _Block(y, rows, columns)
                kept = one.values().clone()
                one.set(other.values())
                other.set(kept)

    def _chunks(self, piece: Piece, *tensors: Tensor) -> Iterator[tuple[slice, slice]]:
        limit = CHUNK.get(tensors[0].device.type, CHUNK_ELSEWHERE)
        whole_rows = not all(_flattens(tensor) for tensor in tensors)
        return piece.grid.chunks(max(limit, piece.grid.width) if whole_rows and limit else limit)

    def _write(self, change: Change, source: Sequence[Tensor], target: Sequence[Tensor]) -> None:
        keys = torch.stack([direction.keys for direction in change], 1)  # (P, S, 4)
        amounts = torch.stack([self._amount(amount) for amount in change.values()])
        places: dict[torch.device, tuple[Tensor, Tensor]] = {}
        for i, (piece, x, y) in enumerate(zip(self.pieces, source, target, strict=True)):
            if x.device not in places:
                places[x.device] = keys.to(x.device), amounts.to(x.device)
            own_keys, own_amounts = places[x.device]
            dtype = torch.promote_types(x.dtype, torch.float32)
            for rows, columns in self._chunks(piece, x, y):
                weights = own_amounts.to(dtype)
                if self._small:
                    move = self._remembered(list(change), i, weights)
                else:
                    index = piece.grid.indices(rows, columns, x.device)
                    move = self._displacement(own_keys[i], weights, *index, self.kind)
                _Block(y, rows, columns).set(move.add_(_Block(x, rows, columns).values()))

    def _remembered(self, directions: list[Direction], i: int, weights: Tensor) -> Tensor:
        """`displacement` of piece i of a small field, whose noise is kept with the direction."""
        total: Tensor | None = None
        for direction, weight in zip(directions, weights.unbind(0), strict=True):
            if i not in direction.drawn:
                grid = self.pieces[i].grid
                index = grid.indices(slice(0, grid.rows), slice(0, grid.width), weights.device)
                direction.drawn[i] = draw_noise(direction.keys[i].to(weights.device), *index, self.kind)
            part = direction.drawn[i].to(weight.dtype) * weight
            total = part if total is None else total + part
        assert total is not None
        return total

    def _amount(self, amount: Tensor | float) -> Tensor:
        return torch.as_tensor(amount, dtype=self.dtype, device=self.device).reshape(())


class _Block:
    """A chunk of a tensor as a matrix: its first dimension, and the others flattened."""

    def __init__(self, tensor: Tensor, rows: slice, columns: slice) -> None:
        matrix = tensor.reshape(1, -1) if tensor.dim() < 2 else tensor
        self._part, self._columns = matrix[rows], columns

    def values(self) -> Tensor:
        """(rows, columns); a view where the strides allow it."""
        return self._part.flatten(1)[:, self._columns]

    def set(self, new: Tensor) -> None:
        """Overwrite it with a matrix of its shape."""
        if _flattens(self._part):
            self._part.flatten(1)[:, self._columns].copy_(new)
        else:  # whole rows, as `Field._chunks` cuts such a tensor
            self._part.copy_(new.view(self._part.shape))


def _flattens(tensor: Tensor) -> bool:
    """Whether all but the first dimension can be seen as one."""
    if tensor.dim() <= 2:
        return True
    sizes, strides = tensor.shape[1:], tensor.stride()[1:]
    pairs = zip(sizes[1:], strides[:-1], strides[1:], strict=True)
    return all(outer == size * inner for size, outer, inner in pairs)
