"""The dense reducer: every element of the gradient is summed over the replicas, exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hlat.backend.groups import Group, Pending
from hlat.parallel.buckets import Bucket
from hlat.reduce.base import Reducer
from hlat.registry import register


@register("reduce", "dense")
class Dense(Reducer):
    """Sum each bucket over the replicas in `dtype`: all-reduce, or reduce-scatter where each replica keeps a
    share (ZeRO-1).

    Gradients arrive already divided by the global number of target tokens, so that the sum is the gradient of
    the global mean.

    Args:
        dtype: dtype the sum travels in (recipe: precision.reduce).
        group: the replicas.
    """

    def __init__(self, dtype: torch.dtype, group: Group) -> None:
        self.dtype, self.group = dtype, group
        self._started: dict[int, tuple[Tensor, Pending]] = {}

    def start(self, bucket: Bucket) -> None:
        """Begin a bucket's sum as soon as its gradient is complete, while backward goes on."""
        grad = bucket.grad.to(self.dtype)
        if bucket.master.numel() == bucket.length:
            self._started[id(bucket)] = grad, self.group.start_all_reduce(grad)
        else:
            shard = grad.new_empty(bucket.master.numel())
            self._started[id(bucket)] = shard, self.group.start_reduce_scatter(shard, grad)

    def started(self, bucket: Bucket) -> bool:
        """Whether the sum of this bucket is under way."""
        return id(bucket) in self._started

    def reduce(self, buckets: Sequence[Bucket]) -> list[Tensor]:
        """This rank's share of each reduced bucket, 1-D (all of it without ZeRO-1)."""
        for bucket in buckets:
            if id(bucket) not in self._started:
                self.start(bucket)
        shards = []
        for bucket in buckets:
            shard, pending = self._started.pop(id(bucket))
            pending.wait()
            shards.append(shard)
        return shards
