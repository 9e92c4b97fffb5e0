"""Compressors: which part of gradient plus error is sent, so that what arrives can be summed on the way.

Each has `exchange`, a generator: it yields what the replicas are to combine, is sent the result, and returns
the reduced bucket and this rank's own part of what was sent. Between a yield and its result the collective is
under way. What is chosen (which units, which basis) is the same on every replica; only values differ.

`contractive`: what is sent is nearer to the input than zero is, so that the error cannot grow. An unbiased
compressor is not: it multiplies what it sends, and feedback on it diverges.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from hlat.reduce.grid import ROW, Grid, Picked, Sent, Whole, shuffled


@dataclass
class Ask:
    """What the replicas are to combine: summed ("sum") or the largest taken ("max").

    scatter: the first dimension has one entry for each replica, and with ZeRO-1 a replica needs its own only.
    sent: this rank's own part of what is sent, where that is known before the result.
    """

    tensor: Tensor
    op: str = "sum"
    scatter: bool = False
    sent: Sent | None = None


@dataclass
class Feed:
    """One bucket's input to a compressor.

    Attributes:
        grid: the bucket's cut. grad: (shards, units, unit). read: the store's feedback for an index of units.
        count: int64 (), compressed reductions so far, alike on all replicas.
        dtype: what travels. matrices: (offset, rows, columns) of each parameter in the flat bucket.
        replicas: how many sum. own: this replica's number where ZeRO-1 shards the bucket, else None.
    """

    grid: Grid
    grad: Tensor
    read: Callable[[Tensor | None], Tensor]
    count: Tensor
    dtype: torch.dtype
    matrices: Sequence[tuple[int, int, int]]
    replicas: int
    own: int | None

    def units(self, index: Tensor) -> Tensor:
        """Gradient plus feedback of some units of each shard, (shards, n, unit)."""
        return self.grad.index_select(1, index).float() + self.read(index)

    def all(self) -> Tensor:
        """Gradient plus feedback, (shards, units, unit)."""
        return self.grad.float() + self.read(None)

    def mine(self, parts: Tensor) -> Tensor:
        """This replica's shard of (shards, ...) under ZeRO-1, all of it otherwise."""
        return parts if self.own is None or parts.shape[0] == 1 else parts[self.own : self.own + 1]


Exchange = Generator[Ask, Tensor, tuple[Tensor, Sent]]


class Compressor:
    """One bucket's compressor. A subclass overrides `exchange`; state, if any, moves in `commit`."""

    contractive: ClassVar[bool] = True

    def exchange(self, feed: Feed) -> Exchange:
        """Reduce one bucket: see the module text. Returns (shards or 1, units, unit) and what was sent."""
        raise NotImplementedError

    def commit(self, keep: Tensor) -> None:
        """Let the state move, where `keep` () is True."""

    def state(self) -> dict[str, Tensor]:
        """Tensors for a checkpoint, alike on all replicas."""
        return {}


class Block(Compressor):
    """A block of consecutive units of each shard, its number a hash of the step: random, without replacement.

    Args:
        grid: the bucket's cut.
        ratio: share of the elements that is sent.
        salt: of the hash, different for each bucket.
        scale: 1, or 1 / ratio for the unbiased variant.
    """

    def __init__(self, grid: Grid, ratio: float, salt: int, scale: float = 1.0) -> None:
        self.size = min(grid.units, max(1, round(ratio * grid.units)))
        self.blocks = -(-grid.units // self.size)
        self.salt, self.scale = salt, scale

    def exchange(self, feed: Feed) -> Exchange:
        """One round: the block's values."""
        units, size, device = feed.grid.units, self.size, feed.count.device
        number = shuffled(feed.count, self.blocks, self.salt)
        start = (number * size).clamp(max=units - size)  # the last block overlaps the one before
        index = start + torch.arange(size, device=device)
        values = (feed.units(index) * self.scale).to(feed.dtype)
        place = torch.arange(units, device=device) - start
        where = torch.where((place >= 0) & (place < size), place, size)[None]
        sent = Picked(values, where)
        total = yield Ask(values.clone(), scatter=True, sent=sent)
        return Picked(total, where).dense(), sent


class UnbiasedBlock(Block):
    """A random block, multiplied so that its expectation is the input. For comparison."""

    contractive: ClassVar[bool] = False

    def __init__(self, grid: Grid, ratio: float, salt: int) -> None:
        super().__init__(grid, ratio, salt)
        self.scale = grid.units / self.size


class TopUnits(Compressor):
    """The units that hold the largest energy, summed over the replicas: a support all of them share.

    Two rounds: energies of all units, values of the chosen ones.
    """

    def __init__(self, grid: Grid, ratio: float) -> None:
        self.size = min(grid.units, max(1, round(ratio * grid.units)))

    def exchange(self, feed: Feed) -> Exchange:
        """Energies, then values."""
        full, size = feed.all(), self.size
        shards, units, unit = full.shape
        energy = yield Ask(full.square().sum(2))
        index = energy.topk(size, dim=1).indices.sort(1).values
        offset = torch.arange(shards, device=index.device)[:, None] * units
        rows = (index + offset).view(-1)
        values = full.reshape(-1, unit).index_select(0, rows).view(shards, size, unit).to(feed.dtype)
        every = torch.arange(units, device=index.device).expand(shards, units).contiguous()
        place = torch.searchsorted(index, every).clamp(max=size - 1)
        where = torch.where(index.gather(1, place) == every, place, size)
        sent = Picked(values, where)
        total = yield Ask(values.clone(), scatter=True)
        return Picked(total, feed.mine(where)).dense(), sent


class Sign(Compressor):
    """Signs, summed as int8, times the mean magnitude over the replicas of each row of 1024 elements.

    A byte an element: a sum of signs does not fit in less. Two rounds: magnitudes, signs.
    """

    def exchange(self, feed: Feed) -> Exchange:
        """Magnitudes, then signs."""
        rows = feed.all().view(feed.grid.shards, -1, ROW)
        scale = yield Ask(rows.abs().mean(2))
        scale = scale / feed.replicas
        code = rows.sign().to(torch.int8)  # a value that is not finite makes the scale so
        total = yield Ask(code.clone(), scatter=True)
        return _scaled(total, feed.mine(scale), feed), Whole(_scaled(code, scale, feed))


class Quantised(Compressor):
    """int8 with a scale that the replicas share for each row of 1024 elements; the sum still fits in int8.

    Each replica has 127 // replicas levels on either side of zero. Two rounds: largest magnitudes, codes.
    """

    def exchange(self, feed: Feed) -> Exchange:
        """Largest magnitudes, then codes."""
        rows = feed.all().view(feed.grid.shards, -1, ROW)
        levels = 127 // feed.replicas
        largest = rows.abs().amax(2)
        largest = torch.where(largest.isfinite(), largest, torch.inf)  # no two libraries agree on max(NaN)
        scale = (yield Ask(largest, "max")) / levels
        code = rows / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
        code = torch.where(scale.isfinite()[..., None], code, 0.0).round().to(torch.int8)
        total = yield Ask(code.clone(), scatter=True)
        return _scaled(total, feed.mine(scale), feed), Whole(_scaled(code, scale, feed))


def _scaled(code: Tensor, scale: Tensor, feed: Feed) -> Tensor:
    """Codes (shards, rows, 1024) times their scale, as units. An infinite scale makes all of the row NaN."""
    return (code.float() * scale[..., None]).view(code.shape[0], feed.grid.units, feed.grid.unit)


class LowRank(Compressor):
    """PowerSGD (arXiv 1905.13727): each matrix as a product of two thin ones, one power iteration a step,
    warm-started from the step before.

    What a replica counts as sent is its own projection on the common basis, P P' M: summed over the replicas
    that is what arrived, and unlike its share of the sum it leaves no error that only its neighbours have.

    Args:
        matrices: (offset, rows, columns) in the flat bucket.
        rank: columns of the thin matrices, fewer for a matrix that has fewer rows or columns.
        seed: of the first basis. device: where it lives.
    """

    def __init__(
        self, matrices: Sequence[tuple[int, int, int]], rank: int, seed: int, device: torch.device
    ) -> None:
        made = torch.Generator().manual_seed(seed)
        self.basis = [
            torch.randn(columns, min(rank, rows, columns), generator=made).to(device)
            for _, rows, columns in matrices
        ]
        self._next: list[Tensor] = []

    def exchange(self, feed: Feed) -> Exchange:
        """P = M Q, orthogonalised; then Q = M' P."""
        flat = feed.all().reshape(-1)
        inputs = [flat[at : at + n * m].view(n, m) for at, n, m in feed.matrices]
        left = [m @ q for m, q in zip(inputs, self.basis, strict=True)]
        total = yield Ask(_join(left, feed.dtype))
        left = [orthogonalised(p) for p in _split(total, left)]
        right = [m.T @ p for m, p in zip(inputs, left, strict=True)]
        joined = _join(right, feed.dtype)
        own = _split(joined.clone(), right)
        total = yield Ask(joined)
        self._next = _split(total, right)
        out, sent = torch.zeros_like(flat), torch.zeros_like(flat)
        for (at, n, m), p, q, mine in zip(feed.matrices, left, self._next, own, strict=True):
            out[at : at + n * m] = (p @ q.T).view(-1)
            sent[at : at + n * m] = (p @ mine.T).view(-1)
        return feed.mine(out.view(feed.grad.shape)), Whole(sent.view(feed.grad.shape))

    def commit(self, keep: Tensor) -> None:
        """Start the next step from this one's basis. A column of zeros (a gradient that is zero, or of lower
        rank) would stay zero for ever: there the one before stays.
        """
        for old, new in zip(self.basis, self._next, strict=True):
            old.copy_(torch.where(keep & (new != 0).any(0), new, old))
        self._next = []

    def state(self) -> dict[str, Tensor]:
        """The basis of each matrix."""
        return {f"basis-{i}": basis for i, basis in enumerate(self.basis)}


def orthogonalised(matrix: Tensor) -> Tensor:
    """Gram-Schmidt on the columns, one after the other, each twice: then a column of which only rounding is
    left is orthogonal to the others as well. A zero column stays zero.
    """
    columns: list[Tensor] = []
    for column in matrix.unbind(1):
        for done in columns * 2:
            column = column - (done @ column) * done
        columns.append(column / (torch.linalg.vector_norm(column) + torch.finfo(matrix.dtype).tiny))
    return torch.stack(columns, 1)


def _join(matrices: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.cat([matrix.reshape(-1) for matrix in matrices]).to(dtype)


def _split(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = flat.float().split([matrix.numel() for matrix in like])
    return [part.view(matrix.shape) for part, matrix in zip(parts, like, strict=True)]
