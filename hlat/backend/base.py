"""What the training loop asks of a backend. No method, optimizer or reducer knows which one it runs on."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from hlat.backend.groups import Groups
from hlat.mesh import Layout, Place


class Backend(Protocol):
    """One process's view of the machines a run uses."""

    name: str
    device: torch.device
    rank: int
    world: int
    layout: Layout
    place: Place
    groups: Groups

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place where possible; returns the sum."""
        ...

    def mark_step(self) -> None:
        """End of a step's graph on lazy devices; nothing elsewhere."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has finished everything it was given."""
        ...

    def prepare_model(self, model: nn.Module) -> None:
        """Choose among equivalent ways of computing that the model offers. Names and values stay."""
        ...

    def compile_by_default(self, steps: int) -> tuple[bool, str]:
        """What `compile: auto` means here for a run of `steps`, and the reason to print."""
        ...
