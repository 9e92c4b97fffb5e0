"""Memory that checkpoints are written from and read into."""

from __future__ import annotations

import torch
from torch import Tensor


class Direct:
    """The tensors themselves: on devices whose memory can be viewed in pieces."""

    def __call__(self, live: Tensor) -> Tensor:
        """The memory that stands for a live tensor."""
        return live.detach()

    def put_back(self) -> None:
        """Make what was read into the memory the live tensors' values."""


class HostCopies(Direct):
    """Copies on the CPU: every view of an XLA tensor would be a graph of its own to compile.

    Make it after a graph boundary, when all values exist.
    """

    def __init__(self) -> None:
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, live: Tensor) -> Tensor:
        """See `Direct`."""
        if id(live) not in self._copies:
            self._copies[id(live)] = live, live.detach().cpu().contiguous()
        return self._copies[id(live)][1]

    def put_back(self) -> None:
        """See `Direct`."""
        with torch.no_grad():
            for live, copy in self._copies.values():
                live.copy_(copy)
