"""The dense reducer: every element of the gradient is summed over the data-parallel ranks, exactly."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hlat.parallel.buckets import Bucket
from hlat.registry import register


@register("reduce", "dense")
class Dense:
    """Sum each bucket over the ranks in `dtype`.

    Gradients arrive already divided by the global number of target tokens, so that the sum is the gradient of
    the global mean.

    Args:
        dtype: dtype the sum travels in (recipe: precision.reduce).
        all_reduce: sums a tensor over the data-parallel ranks; the identity in one process.
    """

    def __init__(self, dtype: torch.dtype, all_reduce: Callable[[Tensor], Tensor]) -> None:
        self.dtype, self.all_reduce = dtype, all_reduce

    def reduce(self, buckets: Sequence[Bucket]) -> list[Tensor]:
        """This rank's shard of each reduced bucket, 1-D (in one process: all of it)."""
        return [self.all_reduce(bucket.grad.to(self.dtype)) for bucket in buckets]

    def state(self) -> dict[str, Tensor]:
        """Tensors that belong in a checkpoint, by name: none, the dense sum has no memory."""
        return {}
