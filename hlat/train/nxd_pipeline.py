"""The engine of a pipeline rank on NxD."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hlat.parallel.buckets import Bucket
from hlat.parallel.pipeline import StagePart, stage_view
from hlat.train.engine import Objective

if TYPE_CHECKING:
    from hlat.backend.base import Backend
    from hlat.backend.nxd.pipeline import Pipeline
    from hlat.data.batch import Batch
    from hlat.model.decoder import Decoder
    from hlat.recipe import Recipe


class NxdPipelineEngine:
    """Runs the stage this rank holds, in NxD's 1F1B schedule. Methods as in `hlat.train.engine.Engine`.

    Args:
        recipe: schedule and number of micro-batches.
        backend: place in the pipeline.
        model: the rank's layers.
        parts: its one stage.
        objective: the loss, taken inside the last stage.
        buckets: receive the gradients.
    """

    def __init__(
        self,
        recipe: Recipe,
        backend: Backend,
        model: Decoder,
        parts: Sequence[StagePart],
        objective: Objective,
        buckets: Sequence[Bucket],
    ) -> None:
        layout, micro_batches = backend.layout, recipe.accumulate(backend.world)
        self.view, self.part, self.objective, self.buckets = (
            stage_view(model, parts[0]),
            parts[0],
            objective,
            buckets,
        )
        self.layout, self.rank, self.micro_batches = layout, backend.place.pp, micro_batches
        self._pipelines: dict[int, Pipeline] = {}
        self._batches: Sequence[Batch] = ()
        self._tokens, self._next = torch.ones(()), 0

    def forward_backward(self, batches: Sequence[Batch], tokens: Tensor) -> Tensor:
        """Accumulate the gradient of sum(loss) / tokens over the micro-batches; collective in the pipeline.
        Returns that loss, fp32 (), on the rank with the last stage, 0 on the others.
        """
        if len(batches) != self.micro_batches:
            raise ValueError(f"the pipeline is for {self.micro_batches} micro-batches, not {len(batches)}")
        for bucket in self.buckets:
            bucket.begin(len(batches))
        loss = self._start(batches, tokens).train()
        self._batches = ()
        for bucket in self.buckets:
            bucket.finish()
        return torch.zeros((), device=tokens.device) if loss is None else loss

    def forward(self, batches: Sequence[Batch], tokens: Tensor) -> Tensor:
        """The same loss without gradients and without touching the buckets; any number of micro-batches."""
        loss = self._start(batches, tokens).evaluate()
        self._batches = ()
        return torch.zeros((), device=tokens.device) if loss is None else loss

    def _start(self, batches: Sequence[Batch], tokens: Tensor) -> Pipeline:
        from hlat.backend.nxd.pipeline import Pipeline

        self._batches, self._tokens, self._next = batches, tokens, 0
        count = len(batches)
        if count not in self._pipelines:
            self._pipelines[count] = Pipeline(self._stage, count, self.layout, self.rank)
        return self._pipelines[count]

    def _stage(self, x_BSD: Tensor | None) -> Tensor:
        """One micro-batch through this rank's stage; they come in order."""
        batch = self._batches[self._next]
        self._next += 1
        if x_BSD is not None:
            batch = replace(batch, ids=x_BSD)
        if self.part.last:
            return self.objective.loss(self.view, batch, self._tokens)
        y_BSD = self.view.hidden(batch.ids, batch.positions, batch.documents).contiguous()
        if torch.is_grad_enabled() and not y_BSD.requires_grad:
            y_BSD.requires_grad_()  # nothing trained so far: the stage after sends a gradient all the same
        return y_BSD
