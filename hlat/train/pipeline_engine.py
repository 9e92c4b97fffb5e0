"""The engine of a pipeline rank: forward and backward of its stages, in turn with those of its neighbours.

The schedules are those of `torch.distributed.pipelining`. They cut every tensor they are given into
micro-batches, which does not suit batches with document masks; so they are given only the numbers of the
micro-batches, and each stage looks its batch up. What travels between stages is the residual stream, one
plain tensor a micro-batch. The last stage takes the loss inside its own forward pass, where head and loss are
one operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from hlat.backend.groups import Group
from hlat.backend.pipelining import ScheduledStage
from hlat.parallel.buckets import Bucket
from hlat.parallel.pipeline import StagePart, stage_view
from hlat.train.engine import Objective

if TYPE_CHECKING:
    from hlat.data.batch import Batch
    from hlat.mesh import Layout
    from hlat.model.decoder import Decoder


@dataclass
class _Step:
    """What the stages look up while a step runs."""

    batches: Sequence[Batch] = ()
    tokens: Tensor = field(default_factory=lambda: torch.ones(()))


class _Stage(nn.Module):
    """A stage as the schedules call it: number of the micro-batch in, residual stream or loss out."""

    def __init__(self, view: Decoder, part: StagePart, objective: Objective, step: _Step) -> None:
        super().__init__()
        self.view, self.part, self.objective, self.step = view, part, objective, step

    def forward(self, x_BSD: Tensor | None = None, *, index: Tensor) -> Tensor:
        """Run one micro-batch.

        Args:
            x_BSD: states of the stage before, (B, S, D) in the compute dtype, (B, S / tp, D) under
                sequence parallelism; None on the first stage.
            index: which one, int64 (1,) on the CPU, so that reading it waits for nothing.

        Returns:
            The states for the stage after, or on the last stage the loss, fp32 (1,).
        """
        batch = self.step.batches[int(index)]
        if x_BSD is not None:
            batch = replace(batch, ids=x_BSD)
        if self.part.last:
            # Stacked, not reshaped: the schedules free a loss's graph after its backward unless it is a view.
            return torch.stack([self.objective.loss(self.view, batch, self.step.tokens)])
        return self.view.hidden(batch.ids, batch.positions, batch.documents)


class PipelineEngine:
    """Runs the stages that this rank of a pipeline holds.

    Args:
        model: the rank's layers; its parameters are views of the buckets' weights.
        parts: the rank's stages.
        objective: the loss. `loss(model, batch, denominator)` is called on the last stage with a model
            without embedding and a batch whose `ids` are the states of the stage before.
        buckets: receive the gradients.
        schedule: 1f1b, interleaved or gpipe.
        micro_batches: of one step.
        group: the ranks of this pipeline, in order.
        layout: the mesh, for the number of stages and how the sequence is split between them.
        rows, seq_len: shape of a micro-batch.
        dtype: of the residual stream.
        device: this rank's.
    """

    def __init__(
        self,
        model: Decoder,
        parts: Sequence[StagePart],
        objective: Objective,
        buckets: Sequence[Bucket],
        *,
        schedule: str,
        micro_batches: int,
        group: Group,
        layout: Layout,
        rows: int,
        seq_len: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.model, self.objective, self.buckets = model, objective, buckets
        self.group, self.device, self.dtype = group, device, dtype
        self._split = layout.tp if layout.sequence else 1  # parts of the sequence between layers
        self._step = _Step()
        self._numbers = torch.arange(micro_batches)
        self._stages = [_Stage(stage_view(model, part), part, objective, self._step) for part in parts]
        wrapped: list[Any] = [self._wrap(stage, rows, seq_len) for stage in self._stages]
        options: dict[str, Any] = {"loss_fn": _as_it_is, "scale_grads": False}
        if schedule == "interleaved":
            self._schedule: Any = ScheduleInterleaved1F1B(wrapped, micro_batches, **options)
        else:
            single = Schedule1F1B if schedule == "1f1b" else ScheduleGPipe
            self._schedule = single(wrapped[0], micro_batches, **options)
        self._wrapped = wrapped

    def _wrap(self, stage: _Stage, rows: int, seq_len: int) -> ScheduledStage:
        """With example inputs and outputs given, the first step does not run the model once more to learn
        their shapes; gradients flow only through examples that ask for one.
        """
        with torch.device("meta"):
            shape = (rows, seq_len // self._split, self.model.config.hidden)
            states = torch.empty(shape, dtype=self.dtype, requires_grad=True)
            loss = torch.empty(1, dtype=torch.float32, requires_grad=True)
        part = stage.part
        return ScheduledStage(
            stage,
            part.index,
            part.count,
            self.device,
            input_args=() if part.first else (states,),
            output_args=(loss if part.last else states,),
            group=self.group.handle,
        )

    def forward_backward(self, batches: Sequence[Batch], tokens: Tensor) -> Tensor:
        """Accumulate the gradient of sum(loss) / tokens over the micro-batches; collective in the pipeline.

        Args:
            batches: the micro-batches, on the device; every rank of the pipeline gets the same ones.
            tokens: () the denominator, on the device.

        Returns:
            That loss, fp32 (), detached, on the rank with the last stage; 0 on the others.
        """
        numbers = self._numbers
        if len(batches) != len(numbers):
            raise ValueError(f"the pipeline was built for {len(numbers)} micro-batches, not {len(batches)}")
        for bucket in self.buckets:
            bucket.begin(len(batches))
        self._step.batches, self._step.tokens = batches, tokens
        losses: list[Tensor] = []
        last = any(stage.part.last for stage in self._stages)
        self._schedule.step(index=numbers, target=numbers if last else None, losses=losses)
        self._step.batches = ()
        for stage in self._wrapped:
            stage.clear_runtime_states()  # gradients of received states, which would stay until the next step
        for bucket in self.buckets:
            bucket.finish()
        total = torch.zeros((), device=tokens.device)
        for loss in losses:
            total = total + loss.detach()[0]
        return total

    @torch.no_grad()
    def forward(self, batches: Sequence[Batch], tokens: Tensor) -> Tensor:
        """The loss that `forward_backward` returns, without gradients and without touching the buckets.

        Any number of micro-batches of any shape, the same on every rank of the pipeline. They follow each
        other without a schedule: with one stage a rank the ranks still overlap, with more they take turns.
        """
        total = torch.zeros((), device=tokens.device)
        self._step.batches, self._step.tokens = batches, tokens
        for i, batch in enumerate(batches):
            for stage in self._stages:
                x = None if stage.part.first else self._receive(batch)
                y = stage(x, index=torch.tensor(i))
                if stage.part.last:
                    total = total + y[0]
                else:
                    after = self.group.ranks[(self.group.rank + 1) % self.group.size]
                    dist.send(y.contiguous(), after, group=self.group.handle)
        self._step.batches = ()
        return total

    def _receive(self, batch: Batch) -> Tensor:
        """The states of a batch from the stage before."""
        rows, seq_len = batch.targets.shape
        shape = (rows, seq_len // self._split, self.model.config.hidden)
        x_BSD = torch.empty(shape, dtype=self.dtype, device=self.device)
        before = self.group.ranks[self.group.rank - 1]
        dist.recv(x_BSD, before, group=self.group.handle)
        return x_BSD


def _as_it_is(loss: Tensor, target: Tensor) -> Tensor:
    """The loss function that the schedules ask for: the last stage has taken the loss already."""
    return loss
