"""Error stores: what a rank keeps of the gradient that was not sent, exactly or compressed.

Each holds the error of one bucket. `read` gives the error that is fed back into the next gradient. `stage`
takes this step's gradient and what was sent of it; `commit` then moves the store, or leaves it bitwise as it
was when the step is skipped: a select on the device.

The sum of gradient and error is only made where it is sent. For a store that is linear, as exact and sketch
are, that is the same as compressing the sum (arXiv 2312.08538):

    D = Q(g + (1 - beta) U(S)),    S <- S + Sk(g - D)
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from hlat.reduce.grid import ROW, Grid, Sent, signs

_CHUNK = 1 << 17  # elements a CPU works on at a time: temporaries stay in the cache
SIGN_SEED = 42


def chunks(grid: Grid, multiple: int, device: torch.device, last: int | None = None) -> Iterator[slice]:
    """Runs of units, each a multiple of `multiple` of them: small ones on a CPU, all at once elsewhere."""
    last = grid.units if last is None else last
    size = last
    if device.type == "cpu":
        size = max(1, _CHUNK // (grid.shards * grid.unit * multiple)) * multiple
    for first in range(0, last, max(size, 1)):
        yield slice(first, min(first + size, last))


class Nothing:
    """No memory: what is not sent is lost. For comparison, and the only store for unbiased compressors."""

    def __init__(self, grid: Grid, device: torch.device) -> None:
        self.zero = torch.zeros((), device=device)

    def read(self, index: Tensor | None = None) -> Tensor:
        """Zero."""
        return self.zero

    def stage(self, grad: Tensor, sent: Sent) -> Tensor:
        """Zero, or NaN where the gradient has a value that is not finite."""
        return 0.0 * grad.sum(dtype=torch.float32)

    def commit(self, keep: Tensor) -> None:
        """Nothing to keep."""

    def state(self) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def squared_norm(self) -> Tensor:
        """Zero."""
        return self.zero


class _Delayed(Nothing):
    """A store as long as the bucket, which moves in `commit`, chunk by chunk, from the bucket's gradient."""

    def __init__(self, grid: Grid, device: torch.device) -> None:
        super().__init__(grid, device)
        self.grid = grid
        self._staged: tuple[Tensor, Sent] | None = None

    def stage(self, grad: Tensor, sent: Sent) -> Tensor:
        """See `Nothing.stage`. The gradient must stay as it is until `commit`."""
        self._staged = grad, sent
        return super().stage(grad, sent)

    def _left(self, where: slice) -> Tensor:
        """Error of these units after the step, fp32 (shards, n, unit)."""
        assert self._staged is not None
        grad, sent = self._staged
        fed_back = grad[:, where].float() + self._units(where)
        return fed_back - sent.dense(where.start, where.stop)

    def _units(self, where: slice) -> Tensor:
        raise NotImplementedError


class Exact(_Delayed):
    """Every element of the error in fp32, as classic error feedback keeps it."""

    def __init__(self, grid: Grid, device: torch.device) -> None:
        super().__init__(grid, device)
        self.error = torch.zeros(grid.shards, grid.units, grid.unit, device=device)

    def read(self, index: Tensor | None = None) -> Tensor:
        """fp32 (shards, n, unit): the error of the units in `index`, of all without it."""
        return self.error if index is None else self.error.index_select(1, index)

    def commit(self, keep: Tensor) -> None:
        """Take the staged step's rest as the new error where `keep` () is True."""
        for where in chunks(self.grid, 1, self.error.device):
            old = self.error[:, where]
            old.copy_(torch.where(keep, self._left(where), old))
        self._staged = None

    def state(self) -> dict[str, Tensor]:
        """The error."""
        return {"exact": self.error}

    def squared_norm(self) -> Tensor:
        """Sum of squares of the error, fp32 ()."""
        return torch.linalg.vector_norm(self.error).square()

    def _units(self, where: slice) -> Tensor:
        return self.error[:, where]


class Rounded(_Delayed):
    """The error as int8 or fp16, each row of 1024 elements scaled by its largest.

    int8 takes 25.1 % of the exact error, fp16 50.1 %. Rounding is to nearest; its error is lost.
    """

    def __init__(self, grid: Grid, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(grid, device)
        self.top = 127.0 if dtype == torch.int8 else 32768.0
        self.values = torch.zeros(grid.shards, grid.units, grid.unit, dtype=dtype, device=device)
        self.scales = torch.zeros(grid.shards, grid.shard // ROW, device=device)
        self.units_a_row = ROW // grid.unit

    def read(self, index: Tensor | None = None) -> Tensor:
        """See `Exact.read`."""
        if index is None:
            return self._units(slice(0, self.grid.units))
        scale = self.scales.index_select(1, index // self.units_a_row)
        return self.values.index_select(1, index).float() * scale[..., None]

    def commit(self, keep: Tensor) -> None:
        """See `Exact.commit`."""
        per = self.units_a_row
        for where in chunks(self.grid, per, self.values.device):
            rows = self._left(where).reshape(self.grid.shards, -1, ROW)
            scale = rows.abs().amax(2) / self.top
            new = rows / scale.clamp(min=torch.finfo(torch.float32).tiny)[..., None]
            new = new.round() if self.values.dtype == torch.int8 else new
            old, old_scale = self.values[:, where], self.scales[:, where.start // per : where.stop // per]
            # A rejected gradient may hold NaN, which has no integer: select before the conversion.
            new = torch.where(keep, new.view(old.shape), old.float())
            old.copy_(new.to(old.dtype))
            old_scale.copy_(torch.where(keep, scale, old_scale))
        self._staged = None

    def state(self) -> dict[str, Tensor]:
        """Values and scales."""
        return {"values": self.values, "scales": self.scales}

    def squared_norm(self) -> Tensor:
        """See `Exact.squared_norm`."""
        parts = chunks(self.grid, self.units_a_row, self.values.device)
        return torch.stack([self._units(where).square().sum() for where in parts]).sum()

    def _units(self, where: slice) -> Tensor:
        per, shards = self.units_a_row, self.grid.shards
        scale = self.scales[:, where.start // per : -(-where.stop // per), None]
        rows = self.values[:, where].reshape(shards, -1, ROW).float() * scale
        return rows.view(shards, -1, self.grid.unit)


def sharing(size: float) -> int:
    """Elements that share a cell of a sketch of this size."""
    return math.ceil(1 / size - 1e-9)


class Sketch(Nothing):
    """A count sketch of the error in the form that needs no scatter: of `c` consecutive units, elements at
    the same place share a cell, each with a sign of its own.

    Sk(x)[r, w] = sum over j of sign[j, w] x[r, j, w], with c = 1 / size units a row; U(S)[r, j, w] =
    sign[j, w] S[r, w]. (1 / c) U(Sk(x)) is a projection, so that a feedback of 1 - beta = size is
    non-expansive and more of it would let the error grow. Units left over at the end join the last row, whose
    cells then hold fewer than 2 c elements.

    Args:
        grid, device: as everywhere.
        size: cells for each element of the error; 1 / size is rounded up.
        beta: damping of what is fed back; 1 - 1 / c by default, which is 1 - size, and must not be less.
        dtype: of the cells.
    """

    def __init__(
        self,
        grid: Grid,
        device: torch.device,
        size: float = 0.2,
        beta: float | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(grid, device)
        self.grid, self.c = grid, sharing(size)
        self.feedback = 1 / self.c if beta is None else 1 - beta
        self.rows = max(1, grid.units // self.c)
        self.cells = torch.zeros(grid.shards, self.rows, grid.unit, dtype=dtype, device=device)
        slots = grid.units - (self.rows - 1) * self.c
        self.signs = signs(max(slots, self.c), grid.unit, SIGN_SEED).to(device, dtype)
        self._staged: Tensor | None = None

    def read(self, index: Tensor | None = None) -> Tensor:
        """(1 - beta) U(S) of the units in `index`, of all without it: (shards, n, unit)."""
        if index is None:
            index = torch.arange(self.grid.units, device=self.cells.device)
        row = (index // self.c).clamp(max=self.rows - 1)
        sign = self.signs.index_select(0, index - row * self.c)
        return self.cells.index_select(1, row) * (self.feedback * sign)

    def stage(self, grad: Tensor, sent: Sent) -> Tensor:
        """Sketch what was not sent. Returns 0, or NaN where it holds a value that is not finite."""
        out, units = torch.zeros_like(self.cells), self.grid.units
        body = units - units % self.c
        for where in chunks(self.grid, self.c, out.device, body):
            rest = grad[:, where].to(out.dtype) - sent.dense(where.start, where.stop)
            rows = rest.unflatten(1, (-1, self.c)) * self.signs[: self.c]
            out[:, where.start // self.c : where.stop // self.c] = rows.sum(2)
        if body < units:
            first = body - (self.rows - 1) * self.c
            rest = grad[:, body:].to(out.dtype) - sent.dense(body, units)
            out[:, -1] += (rest * self.signs[first : first + units - body]).sum(1)
        self._staged = out
        return 0.0 * out.sum(dtype=torch.float32)

    def commit(self, keep: Tensor) -> None:
        """Add the staged sketch where `keep` () is True."""
        assert self._staged is not None
        self.cells.copy_(torch.where(keep, self.cells + self._staged, self.cells))
        self._staged = None

    def state(self) -> dict[str, Tensor]:
        """The cells."""
        return {"sketch": self.cells}

    def squared_norm(self) -> Tensor:
        """Sum of squares of the cells, fp32 (): over random signs its expectation is that of the error."""
        return torch.linalg.vector_norm(self.cells, dtype=torch.float32).square()
