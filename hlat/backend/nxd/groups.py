"""Collectives of a group of ranks through torch-xla."""

from __future__ import annotations

import torch
from torch import Tensor

from hlat.backend.groups import Group, Groups, Pending
from hlat.backend.nxd.start import Mesh, Ranks


class _Queued:
    def wait(self) -> None:
        """The device runs its queue in order: what comes after sees the result."""


class XlaGroup(Group):
    """See `Group`. On XLA a collective is an operation of the graph: it starts and ends where the compiler
    puts it, and there is nothing to wait for.

    Args:
        mesh: the ranks of every group of this kind. All ranks compile the same graph, so all groups are named
            in it.
        rank: this process.
    """

    def __init__(self, mesh: Mesh, rank: int) -> None:
        super().__init__(next(group for group in mesh if rank in group), rank)
        self.mesh = mesh

    def start_all_reduce(self, tensor: Tensor, op: str = "sum") -> Pending:
        """See `Group`. int64 travels as int32, which Neuron devices have."""
        import torch_xla.core.xla_model as xm

        if self.size > 1:
            wide = tensor.dtype == torch.int64
            value = tensor.to(torch.int32) if wide else tensor
            xm.all_reduce(op, [value], groups=self.mesh, pin_layout=False)
            if wide:
                tensor.copy_(value)
        return _Queued()

    def start_reduce_scatter(self, shard: Tensor, flat: Tensor) -> Pending:
        """See `Group`."""
        import torch_xla.core.xla_model as xm

        if self.size == 1:
            return super().start_reduce_scatter(shard, flat)
        shard.copy_(
            xm.reduce_scatter(
                xm.REDUCE_SUM,
                flat,
                scale=1.0,
                scatter_dim=0,
                shard_count=self.size,
                groups=self.mesh,
                pin_layout=False,
            )
        )
        return _Queued()

    def start_all_gather(self, flat: Tensor, shard: Tensor) -> Pending:
        """See `Group`."""
        import torch_xla.core.xla_model as xm

        if self.size == 1:
            return super().start_all_gather(flat, shard)
        flat.copy_(xm.all_gather(shard, dim=0, groups=self.mesh, pin_layout=False))
        return _Queued()


def make_groups(ranks: Ranks) -> Groups:
    """The groups of this rank. `kv` is this rank alone: NxD's attention layer sums the gradients of shared
    key/value heads itself.
    """
    rank, world = ranks.rank, sum(len(group) for group in ranks.tp)
    return Groups(
        world=XlaGroup([list(range(world))], rank),
        dp=XlaGroup(ranks.dp, rank),
        pp=XlaGroup(ranks.pp, rank),
        tp=XlaGroup(ranks.tp, rank),
        kv=XlaGroup([[r] for r in range(world)], rank),
        tie=XlaGroup(ranks.tie, rank),
    )
