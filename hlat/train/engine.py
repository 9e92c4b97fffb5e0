"""The engine: forward and backward over a step's micro-batches, gradients into the buckets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from hlat.parallel.buckets import Bucket

if TYPE_CHECKING:
    from hlat.data.batch import Batch


class Objective(Protocol):
    """What is minimised."""

    def loss(self, model: Any, batch: Batch, denominator: Tensor) -> Tensor:
        """Summed loss of a micro-batch over `denominator`, fp32 ()."""
        ...


class Engine:
    """Runs a model that lives whole in this process.

    Args:
        model: its parameters are views of the buckets' weights.
        objective: the loss.
        buckets: receive the gradients.
    """

    def __init__(self, model: nn.Module, objective: Objective, buckets: Sequence[Bucket]) -> None:
        self.model, self.objective, self.buckets = model, objective, buckets

    def forward_backward(self, batches: Sequence[Batch], tokens: Tensor) -> Tensor:
        """Accumulate the gradient of sum(loss) / tokens over the micro-batches. Returns that loss, fp32 (),
        detached.
        """
        for bucket in self.buckets:
            bucket.begin()
        total = torch.zeros((), device=tokens.device)
        for batch in batches:
            loss = self.objective.loss(self.model, batch, tokens)
            loss.backward()
            total = total + loss.detach()
        for bucket in self.buckets:
            bucket.finish()
        return total
