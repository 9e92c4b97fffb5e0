"""SwiGLU feed-forward (Shazeer 2020, arXiv 2002.05202)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from hlat.model.joint import project
from hlat.model.products import Linear


class GatedProduct(nn.Module):
    """silu(gate) * up. A module of its own, without weights, so that selective recompute can wrap it."""

    def forward(self, gate_BSF: Tensor, up_BSF: Tensor) -> Tensor:
        """Two tensors (B, S, F) -> one, same dtype."""
        return F.silu(gate_BSF) * up_BSF


class MLP(nn.Module):
    """down(silu(gate(x)) * up(x)) with hidden size D and inner size F, no biases."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate = Linear(hidden, ffn)
        self.up = Linear(hidden, ffn)
        self.down = Linear(ffn, hidden)
        self.product = GatedProduct()
        self.joint = False  # one product for gate and up: see `hlat.model.joint`

    def forward(self, x_BSD: Tensor) -> Tensor:
        """(B, S, D) -> (B, S, D)."""
        return self.down(self.product(*project(x_BSD, (self.gate, self.up), self.joint)))
