"""Noise with an address: z is a pure function of (seed, parameter name, global index of the element).

Zeroth-order methods draw the same direction several times a step, on every rank, and never keep it. A
generator's state would tie its values to the order of calls and to the shape of what a rank holds; here each
element is computed from its own address, so any part of a parameter has its part of one and the same noise.

The index is written as a row and a column: the first dimension, and the others flattened (a vector is one
row). Both fit 32 bits where the flat index of a large matrix does not. Keys form a tree:

    seed, parameter name, draw -> step -> row -> column: 32 random bits

Each level is a small block cipher on two 16-bit halves, after Philox (Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3", SC 2011): products of 16 with 15 bits, shifts and xor. No intermediate value
leaves int32, so every device computes the same bits, whether its integers wrap around or saturate.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["normal", "rademacher"]

_FACTOR = 0x7A35  # odd, below 2^15
_CHANGES = (0, 0, 0, 0, 0x9E37, 0x79B9, 0x7F4A, 0x7C15)  # of a key word when it is used again
# With 8 rounds every bit of counter and key changes every bit of the result half of the time. Of a column's
# counter 6 suffice, since its key is a cipher's output already.
_KEY_ROUNDS, _COLUMN_ROUNDS = 8, 7
_TWEAK = 0x6A09  # sets the second half of a new key apart from the first
_RADIUS_BITS, _ANGLE_BITS = 20, 12

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def seed_words(seed: int, device: torch.device | str = "cpu") -> Tensor:
    """A seed, any integer below 2^64, as four 16-bit words: int32 (4)."""
    return torch.tensor([seed >> shift & 0xFFFF for shift in (48, 32, 16, 0)], dtype=torch.int32).to(device)


def name_words(names: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
    """64 bits of each name's SHA-256 as four 16-bit words: int32 (P, 4)."""
    digests = [hashlib.sha256(name.encode()).digest()[:8] for name in names]
    table = [[int.from_bytes(d[i : i + 2], "big") for i in (0, 2, 4, 6)] for d in digests]
    return torch.tensor(table, dtype=torch.int32).view(-1, 4).to(device)


def keys_of(seed: Tensor, names: Tensor, step: Tensor, draw: int = 0) -> Tensor:
    """Keys of the parameters in one draw of noise.

    Args:
        seed: `seed_words`.
        names: `name_words`, (P, 4).
        step: int32 (), on the device: a number that changes from step to step.
        draw: which of a step's draws, below 2^16.

    Returns:
        int32 (P, 4), 16-bit words.
    """
    a, b, c, d = (names ^ seed).unbind(-1)  # names are hashes: no seed makes one of them another
    return torch.stack(_new_key(step, (a, b ^ draw, c, d)), -1)


def noise_bits(keys: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """32 random bits of each element in two halves.

    Args:
        keys: int32 (4), of the parameter.
        rows, columns: int32 (R, 1) and (C): global indices.

    Returns:
        int32 (R, C) twice, each in [0, 2^16).
    """
    a, b, c, d = keys.unbind(-1)
    return _encrypt(columns, _new_key(rows, (a, b, c, d)), _COLUMN_ROUNDS)


def draw_noise(keys: Tensor, rows: Tensor, columns: Tensor, kind: Kind = "normal") -> Tensor:
    """Noise of mean 0 and variance 1, fp32 (R, C); arguments as in `noise_bits`.

    normal: Box-Muller, with the radius from 20 bits and the angle from 12; the angle stays within a half
    circle around 0, which needs no reduction of its range. Largest value 5.4. Devices agree to 1e-6.
    rademacher: -1 or 1, the same bits everywhere.
    """
    high, low = noise_bits(keys, rows, columns)
    if kind == "rademacher":
        return 1.0 - 2.0 * (high & 1).to(torch.float32)
    radius = (high << (_RADIUS_BITS - 16)) | (low >> _ANGLE_BITS)
    uniform = (radius.to(torch.float32) + 0.5) * (1 / (1 << _RADIUS_BITS))
    centre = ((1 << _ANGLE_BITS) - 1) / 2
    angle = ((low & ((1 << _ANGLE_BITS) - 1)).to(torch.float32) - centre) * (math.pi / (1 << _ANGLE_BITS))
    return (uniform.log() * -2.0).sqrt() * angle.sin()


def displacement(
    keys: Tensor, weights: Tensor, rows: Tensor, columns: Tensor, kind: Kind = "normal"
) -> Tensor:
    """A weighted sum of S noises, (R, C) in the dtype of `weights` (S); keys int32 (S, 4)."""
    total: Tensor | None = None
    for key, weight in zip(keys.unbind(0), weights.unbind(0), strict=True):
        part = draw_noise(key, rows, columns, kind).to(weight.dtype) * weight
        total = part if total is None else total + part
    assert total is not None
    return total


def noise(
    seed: int,
    name: str,
    shape: Sequence[int],
    *,
    offset: Sequence[int] | None = None,
    size: Sequence[int] | None = None,
    step: int = 0,
    draw: int = 0,
    kind: Kind = "normal",
    device: torch.device | str = "cpu",
) -> Tensor:
    """The noise of a parameter, or of a rectangle of it, as one fp32 tensor.

    Args:
        seed, name: of the run and the parameter.
        shape: of the whole parameter.
        offset, size: the rectangle; default: all of it.
        step, draw: which of the run's draws.
        kind: normal or rademacher.
        device: where it is computed.
    """
    grid = Grid(shape, offset, size)
    table = keys_of(
        seed_words(seed, device),
        name_words([name], device),
        torch.tensor(step, dtype=torch.int32, device=device),
        draw,
    )
    out = torch.empty(grid.rows, grid.width, device=device)
    for rows, columns in grid.chunks(1 << 16):
        out[rows, columns] = draw_noise(table[0], *grid.indices(rows, columns, device), kind)
    return out.view(grid.size)


class Grid:
    """A rectangle of a parameter as rows and columns.

    Args:
        shape: of the whole parameter.
        offset, size: of the rectangle; default: all of it.

    Raises:
        ValueError: the rectangle does not lie in the parameter.
    """

    def __init__(
        self, shape: Sequence[int], offset: Sequence[int] | None = None, size: Sequence[int] | None = None
    ) -> None:
        shape = tuple(shape)
        self.size = shape if size is None else tuple(size)
        offset = (0,) * len(shape) if offset is None else tuple(offset)
        fits = len(shape) == len(offset) == len(self.size)
        if not fits or any(o < 0 or o + n > w for o, n, w in zip(offset, self.size, shape, strict=True)):
            raise ValueError(f"rectangle {self.size} at {offset} does not lie in a parameter of {shape}")
        if len(shape) < 2:
            shape, offset, size = (1, *shape), (0, *offset), (1, *self.size)
        else:
            size = self.size
        self.rows, self.width = size[0], math.prod(size[1:])
        self._first, self._cut = offset[0], (shape[1:], offset[1:], size[1:])

    def chunks(self, elements: int) -> Iterator[tuple[slice, slice]]:
        """Row and column ranges that cover the rectangle, at most `elements` each (0: all at once)."""
        if not self.rows or not self.width:
            return
        wide = min(self.width, elements or self.width)
        high = max(1, (elements or self.rows * wide) // wide)
        for row in range(0, self.rows, high):
            for column in range(0, self.width, wide):
                yield (
                    slice(row, min(row + high, self.rows)),
                    slice(column, min(column + wide, self.width)),
                )

    def indices(
        self, rows: slice, columns: slice, device: torch.device | str = "cpu"
    ) -> tuple[Tensor, Tensor]:
        """Global row and column numbers of a chunk: int32 (R, 1) and (C)."""
        first = self._first
        row = torch.arange(rows.start + first, rows.stop + first, dtype=torch.int32, device=device)
        return row[:, None], self._columns(columns, device)

    def _columns(self, columns: slice, device: torch.device | str) -> Tensor:
        shape, offset, size = self._cut
        if size[1:] == shape[1:]:  # consecutive in the whole parameter
            first = math.prod(shape[1:]) * (offset[0] if offset else 0)
            start, stop = columns.start + first, columns.stop + first
            return torch.arange(start, stop, dtype=torch.int32, device=device)
        own = torch.arange(columns.start, columns.stop, dtype=torch.int32, device=device)
        index, stride, inner = torch.zeros_like(own), 1, 1
        for whole, skip, part in zip(reversed(shape), reversed(offset), reversed(size), strict=True):
            index = index + (own // inner % part + skip) * stride
            stride, inner = stride * whole, inner * part
        return index


def _encrypt(counter: Tensor, key: Words, rounds: int) -> tuple[Tensor, Tensor]:
    """A 32-bit counter as two random 16-bit halves, under four 16-bit words. Counter and words broadcast."""
    left, right = (counter & 0xFFFF) ^ key[2], (counter >> 16 & 0xFFFF) ^ key[3]
    for i in range(rounds):
        word = key[i % 4] ^ _CHANGES[i] if _CHANGES[i] else key[i % 4]
        product = left * _FACTOR
        left, right = (product >> 16) ^ right ^ word, product & 0xFFFF
    return left, right


def _new_key(counter: Tensor, key: Words) -> Words:
    """A key for each counter, from the key of the level above: two ciphers of it, side by side."""
    first = torch.stack([key[0], key[0] ^ _TWEAK])
    first = first.view(2, *(1,) * max(0, counter.dim() - key[0].dim()), *key[0].shape)
    left, right = _encrypt(counter, (first, *key[1:]), _KEY_ROUNDS)
    return left[0], right[0], left[1], right[1]
