"""PyTorch's pipeline stage as the supported releases need it."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage


class ScheduledStage(PipelineStage):
    """A stage with a repair of torch 2.9; later releases do not call this function."""

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        # The neighbours' first contact: torch 2.9 sends 8 bytes to a receiver of 4, and gloo aborts.
        ops = super()._get_init_p2p_neighbors_ops()
        for op in ops:
            op.tensor = torch.zeros(1, device=self.device)
        return ops
