"""What the training loop asks of a backend. No method, optimizer or reducer knows which one it runs on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hlat.backend.groups import Groups
from hlat.backend.host import Direct
from hlat.mesh import Layout, Place


class Backend(Protocol):
    """One process's view of the machines a run uses."""

    name: str
    device: torch.device
    rank: int
    world: int
    layout: Layout
    place: Place
    head_place: Place  # its tp says which run of attention heads this rank works on
    groups: Groups

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks, in place where possible; returns the sum."""
        ...

    def mark_step(self, phase: str = "step") -> None:
        """End of a graph on lazy devices; nothing elsewhere.

        Args:
            phase: what the graph was for: "step", "eval", "checkpoint". Each has graphs of its own.
        """
        ...

    def expect_graphs(self, reason: str, phase: str = "step") -> None:
        """What comes next in a phase differs from what came before on purpose: on lazy devices it
        compiles.
        """
        ...

    def synchronize(self) -> None:
        """Wait until the device has finished everything it was given."""
        ...

    def prepare_model(self, model: nn.Module) -> None:
        """Choose among equivalent ways of computing that the model offers. Names and values stay."""
        ...

    def shard_model(self, model: nn.Module, dtype: torch.dtype) -> bool:
        """Put the backend's own tensor-parallel layers into a decoder that holds this rank's parts; False
        where it has none and HLAT's are to be used.

        Args:
            dtype: of the model's parameters.
        """
        ...

    @property
    def checkpoint(self) -> Callable[..., Any]:
        """`checkpoint(function, *args)` calls a function and calls it again in backward, instead of keeping
        what it computed.
        """
        ...

    def rounding(self, wanted: str) -> str:
        """How software is to round where the recipe wants "nearest" or "stochastic": "nearest" where the
        hardware rounds every result stochastically by itself.
        """
        ...

    def memory(self) -> Direct:
        """Where checkpoints are written from and read into."""
        ...

    def compile_by_default(self, steps: int) -> tuple[bool, str]:
        """What `compile: auto` means here for a run of `steps`, and the reason to print."""
        ...
