"""Collectives inside the model, with the gradient each one has.

A tensor-parallel layer is a region between `enter` and `leave` (Shoeybi et al. 2019, arXiv 1909.08053): every
rank gets the whole input and works on its heads, inner features or vocabulary rows; the outputs are partial
sums. Without sequence parallelism entering is free and leaving is an all-reduce; in backward it is the other
way round. With it (Korthikanti et al. 2022, arXiv 2205.05198) the stream between regions is split along the
sequence: entering gathers it, leaving reduce-scatters.

All are functional collectives, so that a compiled block holds them in its graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hlat.backend.groups import Group

_ops = torch.ops._c10d_functional


def all_reduce(x: Tensor, group: str | Group, op: str = "sum") -> Tensor:
    """The sum (or "max") of x over a group, by name or, where there is no named process group, the group
    itself; a new tensor, no gradient.
    """
    if not isinstance(group, str):
        return group.all_reduce(x.detach().clone(), op)
    return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), op, group))  # type: ignore[no-any-return]


def gather_rows(x_BsD: Tensor, group: str, size: int) -> Tensor:
    """Every rank's part of the sequence, (B, s, D) -> (B, s · size, D); no gradient."""
    B, s, D = x_BsD.shape
    parts = _ops.wait_tensor(_ops.all_gather_into_tensor(x_BsD.contiguous(), size, group))
    return parts.view(size, B, s, D).transpose(0, 1).reshape(B, size * s, D)  # type: ignore[no-any-return]


def scatter_rows(x_BSD: Tensor, group: str, size: int) -> Tensor:
    """The sum over the ranks, of which each keeps its part of the sequence, (B, S, D) -> (B, S / size, D); no
    gradient.
    """
    B, S, D = x_BSD.shape
    parts = x_BSD.view(B, size, S // size, D).transpose(0, 1).contiguous()
    mine = _ops.reduce_scatter_tensor(parts.view(size * B, S // size, D), "sum", size, group)
    return _ops.wait_tensor(mine)  # type: ignore[no-any-return]


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return all_reduce(grad, ctx.group), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:
        return all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return gather_rows(x, group, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return scatter_rows(grad.contiguous(), ctx.group, ctx.size), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str, size: int) -> Tensor:
        ctx.group, ctx.size = group, size
        return scatter_rows(x.contiguous(), group, size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return gather_rows(grad, ctx.group, ctx.size), None, None


@dataclass(frozen=True)
class Region:
    """The borders of tensor-parallel regions of one group.

    group, size, rank: name of the group (or the group itself, see `all_reduce`), its size and this rank's
        place in it.
    sequence: whether the stream outside is split along the sequence.
    """

    group: str | Group
    size: int
    rank: int
    sequence: bool

    def enter(self, x: Tensor) -> Tensor:
        """(B, S or S / size, D) -> the whole (B, S, D); in backward partial gradients are summed."""
        if self.sequence:
            return _Gather.apply(x, self.group, self.size)  # type: ignore[no-any-return]
        return _Copy.apply(x, self.group)  # type: ignore[no-any-return]

    def leave(self, x: Tensor) -> Tensor:
        """Partial sums (B, S, D) -> their sum, (B, S or S / size, D)."""
        if self.sequence:
            return _Scatter.apply(x, self.group, self.size)  # type: ignore[no-any-return]
        return _Reduce.apply(x, self.group)  # type: ignore[no-any-return]

    def inside(self, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A module's forward whose first argument enters and whose result leaves."""

        def regional(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return self.leave(forward(self.enter(x), *args, **kwargs))

        return regional


@dataclass(frozen=True)
class VocabShard:
    """Which rows of the vocabulary a rank's embedding or head holds.

    region: borders of the region the layer works in.
    start: first row. rows: rows of every rank but perhaps the last, for decisions all ranks take alike.
    """

    region: Region
    start: int
    rows: int
