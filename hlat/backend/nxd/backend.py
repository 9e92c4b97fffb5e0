"""The NxD backend as the training loop sees it."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hlat.backend.host import Direct, HostCopies
from hlat.backend.nxd.graphs import GraphGuard
from hlat.backend.nxd.groups import make_groups
from hlat.backend.nxd.layers import shard_model
from hlat.backend.nxd.start import arrange, cpu_mode
from hlat.mesh import Layout

_LOG = logging.getLogger(__name__)


class NxdBackend:
    """One NeuronCore through NxD and torch-xla. See `hlat.backend.base.Backend`. Making one is collective.

    Args:
        layout: the mesh; torch.distributed is initialised with `start.process_group`.
        kv_heads: of the model to be trained.
        say: receives a line about each compilation.
    """

    name = "nxd"

    def __init__(
        self, layout: Layout, *, kv_heads: int = 0, say: Callable[[str], None] = _LOG.warning
    ) -> None:
        from neuronx_distributed.utils import get_device

        ranks = arrange(layout, kv_heads)
        self.rank, self.world, self.layout = ranks.rank, layout.world, layout
        self.place, self.head_place = ranks.place, replace(ranks.place, tp=ranks.heads)
        self.groups = make_groups(ranks)
        self.device: torch.device = get_device()
        self.graphs = GraphGuard(say=say) if self.device.type == "xla" else None

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        return self.groups.world.all_reduce(tensor)

    def mark_step(self, phase: str = "step") -> None:
        """Hand the operations so far to the compiler and the device as one graph; does not wait.

        Raises TrainingStopped after too many graphs that nobody expected.
        """
        from neuronx_distributed.utils import mark_step

        mark_step()
        if self.graphs is not None:
            self.graphs.look(phase)

    def expect_graphs(self, reason: str, phase: str = "step") -> None:
        """Let the guard take the next compilations for what they are."""
        if self.graphs is not None:
            self.graphs.expect(phase, reason)

    def synchronize(self) -> None:
        """Wait until the device is idle."""
        if self.device.type == "xla":
            import torch_xla.core.xla_model as xm

            xm.mark_step()
            xm.wait_device_ops()

    def prepare_model(self, model: nn.Module) -> None:
        """Nothing: `shard_model` makes the choices there are."""

    def shard_model(self, model: nn.Module, dtype: torch.dtype) -> bool:
        """Put NxD's parallel layers into a decoder that holds this rank's parts of the weights, in the
        compute dtype.
        """
        shard_model(model, self.layout, self.groups.tp, dtype)
        return True

    @property
    def checkpoint(self) -> Callable[..., Any]:
        """torch-xla's activation checkpoint: a barrier keeps the compiler from merging the second forward
        pass with the first, which would undo it.
        """
        from torch_xla.utils.checkpoint import checkpoint

        return checkpoint  # type: ignore[no-any-return]

    def rounding(self, wanted: str) -> str:
        """Neuron cores round stochastically themselves, when told to before they are first used."""
        on_chip = os.environ.get("NEURON_RT_STOCHASTIC_ROUNDING_EN", "0") == "1"
        return "nearest" if on_chip and os.environ.get("PJRT_DEVICE") != "CPU" and not cpu_mode() else wanted

    def memory(self) -> Direct:
        """Copies on the CPU; on the CPU itself the tensors."""
        if self.device.type != "xla":
            return Direct()
        self.synchronize()
        self.mark_step("checkpoint")
        return HostCopies()

    def compile_by_default(self, steps: int) -> tuple[bool, str]:
        """Off: torch-xla compiles every graph anyway."""
        return False, "torch-xla compiles"
