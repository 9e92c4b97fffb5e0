"""Groups of ranks that communicate, and where this process stands in each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hlat.mesh import ONE_PROCESS, Layout, Place

# torch 2.13 renamed the collectives on flat tensors and warns of the old names.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_OPS = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX} if dist.is_available() else {}


class Pending(Protocol):
    """A collective under way."""

    def wait(self) -> object:
        """Return when the result may be used (on an accelerator: by what is queued after this call)."""
        ...


class _Done:
    def wait(self) -> None:
        """Nothing was started."""


class _Work:
    """torch's, waited for in a frame of this file: by that the watchdog knows that a rank waits."""

    def __init__(self, work: dist.Work) -> None:
        self._work = work

    def wait(self) -> object:
        return self._work.wait()


class _Sum:
    """Runs of one shard from every rank that arrive in `parts`, and are summed when they are waited for."""

    def __init__(self, arriving: Pending, parts: Tensor, shard: Tensor) -> None:
        self.arriving, self.parts, self.shard = arriving, parts, shard

    def wait(self) -> None:
        """Wait, and sum in order of rank."""
        self.arriving.wait()
        torch.sum(self.parts.view(-1, self.shard.numel()), 0, out=self.shard)


class Group:
    """Some ranks and this one's place among them. In a group of one every operation is the identity and
    nothing is sent.

    Args:
        ranks: global ranks, ascending; this process's rank is one of them.
        rank: this process's global rank.
        handle: the process group; None when there is only one rank.
    """

    def __init__(
        self, ranks: Iterable[int] = (0,), rank: int = 0, handle: dist.ProcessGroup | None = None
    ) -> None:
        self.ranks = tuple(ranks)
        self.size, self.rank, self.handle = len(self.ranks), self.ranks.index(rank), handle

    @property
    def name(self) -> str:
        """The process group's name, by which functional collectives find it; empty for one rank."""
        return "" if self.handle is None else str(self.handle.group_name)

    def all_reduce(self, tensor: Tensor, op: str = "sum") -> Tensor:
        """Combine a contiguous tensor over the ranks, in place; returns it."""
        self.start_all_reduce(tensor, op).wait()
        return tensor

    def start_all_reduce(self, tensor: Tensor, op: str = "sum") -> Pending:
        """Begin `all_reduce`; neither read nor write the tensor before the wait."""
        if self.handle is None:
            return _Done()
        return _pending(dist.all_reduce(tensor, op=_OPS[op], group=self.handle, async_op=True))

    def start_reduce_scatter(self, shard: Tensor, flat: Tensor) -> Pending:
        """Begin summing `flat` (n · size) over the ranks so that `shard` (n) receives run number `rank`."""
        if self.handle is None:
            shard.copy_(flat)
            return _Done()
        if flat.device.type == "cpu":  # gloo's own is an all-reduce and a copy: three times as long
            parts = torch.empty_like(flat)
            return _Sum(
                _pending(dist.all_to_all_single(parts, flat, group=self.handle, async_op=True)), parts, shard
            )
        return _pending(_reduce_scatter(shard, flat, group=self.handle, async_op=True))

    def start_all_gather(self, flat: Tensor, shard: Tensor) -> Pending:
        """Begin filling `flat` (n · size) with every rank's `shard` (n), in order of rank."""
        if self.handle is None:
            flat.copy_(shard)
            return _Done()
        return _pending(_all_gather(flat, shard, group=self.handle, async_op=True))

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Fill a tensor with that of the group's first rank, in place; returns it."""
        if self.handle is not None:
            dist.broadcast(tensor, self.ranks[0], group=self.handle)
        return tensor

    def gather(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor, stacked along a new first dimension in order of rank."""
        out = torch.empty((self.size, *tensor.shape), dtype=tensor.dtype, device=tensor.device)
        self.start_all_gather(out.view(-1), tensor.contiguous().view(-1)).wait()
        return out


def _pending(work: dist.Work | None) -> Pending:
    return _Done() if work is None else _Work(work)


@dataclass(frozen=True)
class Groups:
    """The groups of one rank.

    world: all ranks. dp: the replicas of what this rank holds. pp: the pipeline this rank is in. tp: the
    ranks that share its layers. kv: those of them with the same key and value heads. tie: the first and the
    last pipeline rank, which both hold a tied embedding.
    """

    world: Group
    dp: Group
    pp: Group
    tp: Group
    kv: Group
    tie: Group

    def named(self, name: str) -> Group:
        """A group by its field's name."""
        group: Group = getattr(self, name)
        return group


def make_groups(layout: Layout = ONE_PROCESS, rank: int = 0, *, kv_heads: int = 0) -> Groups:
    """The groups of `rank`; collective over all ranks of an initialised torch.distributed.

    Args:
        layout: the mesh; one process needs no torch.distributed.
        rank: this process's global rank.
        kv_heads: of the model; with more tensor-parallel ranks than heads some ranks share a head.
    """
    place = layout.place(rank)
    made: dict[tuple[int, ...], Group] = {}

    def group(places: Iterable[Place]) -> Group:
        ranks = tuple(sorted(layout.rank(p) for p in places))
        if rank not in ranks or len(ranks) == 1:
            return Group((rank,), rank)
        if ranks not in made:
            handle = dist.group.WORLD
            if len(ranks) < layout.world:
                # Only members take part: with thousands of ranks there are thousands of groups.
                handle = dist.new_group(list(ranks), use_local_synchronization=True)
            made[ranks] = Group(ranks, rank, handle)
        return made[ranks]

    dp, pp, tp = place.dp, place.pp, place.tp
    sharing = max(1, layout.tp // kv_heads) if kv_heads else 1
    first = tp // sharing * sharing
    return Groups(
        world=group(layout.place(r) for r in range(layout.world)),
        dp=group(Place(i, pp, tp) for i in range(layout.dp)),
        pp=group(Place(dp, i, tp) for i in range(layout.pp)),
        tp=group(Place(dp, pp, i) for i in range(layout.tp)),
        kv=group(Place(dp, pp, i) for i in range(first, first + sharing)),
        tie=group({Place(dp, 0, tp), Place(dp, layout.pp - 1, tp)}),
    )
