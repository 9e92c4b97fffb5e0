"""NxD's pipeline runtime around one stage of a model.

`NxDPPModel` in its manual mode: it schedules (1F1B), sends and receives, and cuts the graph where a message
would otherwise be in it twice; the stage is ours. It is given a stage without parameters, because it would
move them, average their gradients over the replicas and rename them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from hlat.mesh import Layout


class _Stage(nn.Module):
    def __init__(self, forward: Callable[[Tensor | None], Tensor], first: bool) -> None:
        super().__init__()
        self.run, self.first = forward, first

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        return self.run(None if self.first or isinstance(x, list) else x)


class Pipeline:
    """The schedule of this rank.

    Args:
        forward: this rank's stage, called once a micro-batch, in their order: states of the stage before
            (None on the first) -> states, on the last stage the micro-batch's part of the loss, ().
        micro_batches: of one pass.
        layout: the mesh.
        rank: this rank's place in the pipeline.
    """

    def __init__(
        self, forward: Callable[[Tensor | None], Tensor], micro_batches: int, layout: Layout, rank: int
    ) -> None:
        from neuronx_distributed.pipeline import NxDPPModel

        last = rank == layout.pp - 1
        stage = _Stage((lambda x: forward(x) * micro_batches) if last else forward, rank == 0)
        stages = [stage if i == rank else nn.Identity() for i in range(layout.pp)]
        self.micro_batches = micro_batches
        self._nxd = NxDPPModel(
            stages,
            num_microbatches=micro_batches,
            output_loss_value_spec=True,
            return_mb_loss=True,
            return_loss_on_cpu=False,
            use_zero1_optimizer=True,  # leaves gradients alone
            use_optimizer_wrapper=True,
            manual_pp_partition=True,
            manual_pp_stage_partition_fn=lambda layers, _: {layer: i for i, layer in enumerate(layers)},
        )
        # What NxD feeds to the first stage. The stages look their batches up themselves.
        self._inputs = {"inputs": torch.zeros(micro_batches, 1), "labels": [torch.zeros(micro_batches, 1)]}

    def train(self) -> Tensor | None:
        """Forward and backward of all micro-batches. The loss, (), on the last stage, None on the others."""
        return self._sum(self._nxd.run_train(**self._inputs))

    def evaluate(self) -> Tensor | None:
        """Forward passes alone."""
        loss = self._sum(self._nxd.run_eval(**self._inputs))
        self._nxd.shape_traced = True  # the shapes have been exchanged; NxD notes it only after training
        return loss

    def _sum(self, losses: list[Tensor] | None) -> Tensor | None:
        """NxD divides each loss by the number of micro-batches before backward; so it is multiplied first."""
        return None if losses is None else torch.stack(losses).sum() / self.micro_batches
