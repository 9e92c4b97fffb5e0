"""A flat bucket as units: the common geometry of compressors and error stores.

A bucket is seen as (shards, units, unit): one shard for each replica, whether or not ZeRO-1 gives each its
own, and in a shard units of as many consecutive elements. Compressors choose units and stores address units,
so that selecting and putting back are copies of rows: no scatter, static shapes, and indices are tensors on
the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

ROW = 1024  # a shard is a multiple of this; error stores with scales have one for each such row
_LARGEST_UNIT = 256
_UNITS_A_BLOCK = 128  # so many at least, so that a rounded number of them is within 0.4 % of the ratio
_MASK = 0xFFFF


@dataclass(frozen=True)
class Grid:
    """How a bucket of `length` elements is cut.

    Attributes:
        length: elements of the bucket. shards: replicas. units: in a shard. unit: elements of one.
    """

    length: int
    shards: int
    units: int
    unit: int

    @classmethod
    def fit(cls, length: int, shards: int, ratio: float = 0.1) -> Grid:
        """The grid for a bucket and a share of it that is sent at a time.

        Shards are padded to rows, which is how ZeRO-1 pads buckets: with it or without, shards are the same.
        """
        shard = -(-length // (ROW * shards)) * ROW
        unit = 1
        while unit < _LARGEST_UNIT and shard * ratio >= 2 * unit * _UNITS_A_BLOCK:
            unit *= 2
        return cls(length, shards, shard // unit, unit)

    @property
    def shard(self) -> int:
        """Elements of a shard, padding included."""
        return self.units * self.unit

    def view(self, flat: Tensor) -> Tensor:
        """(length) -> (shards, units, unit): a view, or a padded copy where the bucket is not as long as its
        shards.
        """
        padding = self.shards * self.shard - flat.numel()
        if padding:
            flat = torch.nn.functional.pad(flat, (0, padding))
        return flat.view(self.shards, self.units, self.unit)

    def flat(self, parts: Tensor) -> Tensor:
        """What a reduction returns of (shards, units, unit) or of one shard: 1-D, without padding."""
        whole = parts.shape[0] == self.shards
        return parts.reshape(-1)[: self.length] if whole else parts.reshape(-1)


def shuffled(count: Tensor, blocks: int, salt: int) -> Tensor:
    """Which block is sent as number `count`: int64 () on the device of `count`.

    In each round of `blocks` sendings every block has its turn once, in an order that is a hash of the round
    and the salt: random without replacement. Arithmetic stays below 2^31, which integer units of
    accelerators hold exactly; rank by comparison needs no sort.
    """
    lap, turn = count // blocks, count % blocks
    own = torch.arange(blocks, device=count.device)
    key = _mix((lap & _MASK) ^ _mix((own + salt) & _MASK) ^ ((lap >> 16) & _MASK))
    key = _mix(key ^ ((salt >> 16) & _MASK) ^ own)
    before = (key[None] < key[:, None]) | ((key[None] == key[:, None]) & (own[None] < own[:, None]))
    return (own * (before.sum(1) == turn)).sum()


def _mix(value: Tensor) -> Tensor:
    """A permutation of 16-bit integers that looks random."""
    for factor, shift in ((25173, 7), (28629, 9), (19701, 8)):
        value = (value * factor + 13849) & _MASK
        value = value ^ (value >> shift)
    return value


def signs(rows: int, columns: int, seed: int) -> Tensor:
    """Random signs, fp32 (rows, columns) of -1 and 1: a hash of the position, the same everywhere."""
    with np.errstate(over="ignore"):
        bits = np.arange(1, rows * columns + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        bits += np.uint64(seed) * np.uint64(0xD1342543DE82EF95)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    values = 1.0 - 2.0 * (bits >> np.uint64(63)).astype(np.float32)
    return torch.from_numpy(values.reshape(rows, columns))


class Sent(Protocol):
    """A rank's own part of what was sent."""

    def dense(self, first: int = 0, last: int | None = None) -> Tensor:
        """Units [first, last) of all shards, (shards, last - first, unit); zero where nothing was sent."""
        ...


class Picked:
    """Some units of each shard; the others are zero.

    Args:
        values: (shards, k, unit).
        where: int64 (1 or shards, units), for each unit its place among the k, or k where it is not one of
            them.
    """

    def __init__(self, values: Tensor, where: Tensor) -> None:
        self.shards, self.k, self.unit = values.shape
        self.where = where
        zero = values.new_zeros(self.shards, 1, self.unit)
        self._rows = torch.cat([values, zero], 1).view(-1, self.unit)

    def dense(self, first: int = 0, last: int | None = None) -> Tensor:
        """Units [first, last) of all shards, (shards, last - first, unit): a gather of rows."""
        index = self.where[:, first:last].expand(self.shards, -1)
        offset = torch.arange(self.shards, device=index.device)[:, None] * (self.k + 1)
        rows = self._rows.index_select(0, (index + offset).reshape(-1))
        return rows.view(self.shards, -1, self.unit)


class Whole:
    """A value for every element: (shards, units, unit)."""

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def dense(self, first: int = 0, last: int | None = None) -> Tensor:
        """Units [first, last) of all shards."""
        return self.values[:, first:last]
