"""The processes that save and load a checkpoint together; with one process every call returns at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass(frozen=True)
class Peers:
    """This process's place among its peers.

    Attributes:
        group: a group with a CPU backend, of its own so that a save in the background never meets training's
            collectives; None without torch.distributed.
        rank: 0 writes what exists once.
        world: number of processes.
    """

    group: dist.ProcessGroup | None = None
    rank: int = 0
    world: int = 1

    @staticmethod
    def meet() -> Peers:
        """All processes of the default group, over a gloo group made now (collective); or this one alone."""
        if not (dist.is_available() and dist.is_initialized()):
            return Peers()
        return Peers(dist.new_group(backend="gloo"), dist.get_rank(), dist.get_world_size())

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        if self.group is not None:
            dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank, on every rank."""
        values: list[Any] = [value] * self.world
        if self.group is not None:
            dist.all_gather_object(values, value, group=self.group)
        return values
