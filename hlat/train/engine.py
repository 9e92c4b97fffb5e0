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
    """Runs a model whose layers are all in this process, each of them whole or this rank's shard of it.

    Args:
        model: its parameters are views of the buckets' weights.
        objective: the loss.
        buckets: receive the gradients.
    """

    def __init__(self, model: nn.Module, objective: Objective, buckets: Sequence[Bucket]) -> None:
        self.model, self.objective, self.buckets = model, objective, buckets

    def forward_backward(self, batches: Sequence[Batch], tokens: Tensor) -> Tensor:
        """Accumulate the gradient of sum(loss) / tokens over the micro-batches.

        Args:
            batches: this rank's micro-batches, on its device.
            tokens: () the denominator, on the device.

        Returns:
            That loss, fp32 (), detached; this rank's batches only. Tensor-parallel ranks all return the same.
        """
        for bucket in self.buckets:
            bucket.begin(len(batches))
        total = torch.zeros((), device=tokens.device)
        for batch in batches:
            loss = self.objective.loss(self.model, batch, tokens)
            loss.backward()
            total = total + loss.detach()
        for bucket in self.buckets:
            bucket.finish()
        return total

    @torch.no_grad()
    def forward(self, batches: Sequence[Batch], tokens: Tensor) -> Tensor:
        """The loss that `forward_backward` returns, without gradients and without touching the buckets."""
        total = torch.zeros((), device=tokens.device)
        for batch in batches:
            total = total + self.objective.loss(self.model, batch, tokens)
        return total


def compile_parts(model: nn.Module, objective: Any, optimizer: torch.optim.Optimizer) -> None:
    """Compile block by block (all blocks share one graph), the loss kernel and the optimizer's update."""
    for block in model.layers.values():  # type: ignore[operator,union-attr]
        block.compile(dynamic=False)
    if model.norm is not None:
        model.norm.compile(dynamic=False)  # type: ignore[operator,union-attr]
    for part in (objective, optimizer):
        if hasattr(part, "compile"):
            part.compile()
