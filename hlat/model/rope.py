"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) in the half-rotation layout of Llama and
Hugging Face.

Dimension i of the first half of a head turns together with dimension i of the second half. (The original
paper and llama.cpp's files pair neighbours instead; `hlat.checkpoint.gguf` undoes that.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hlat.model.dtype import at_least_fp32


class Rope(nn.Module):
    """Tables of cos and sin in fp32, one pair for all layers.

    The tables are buffers outside the state dict. `to_empty`, `to(dtype)` and the like pass through `_apply`,
    after which they are computed again: they are right on every real device and stay fp32 in a bf16 model.

    Args:
        head_dim: size K of a head, even.
        max_seq_len: number of positions in the tables.
        theta: base of the frequencies theta^(-2i/K).
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, max_seq_len: int, theta: float) -> None:
        super().__init__()
        self.head_dim, self.max_seq_len, self.theta = head_dim, max_seq_len, theta
        self._fill(torch.get_default_device())

    def _fill(self, device: torch.device) -> None:
        # Computed on the CPU so that every device uses the same numbers, then moved.
        where = torch.device("meta" if device.type == "meta" else "cpu")
        exponents = torch.arange(0, self.head_dim, 2, device=where).float() / self.head_dim
        angles = torch.outer(
            torch.arange(self.max_seq_len, device=where).float(), 1.0 / self.theta**exponents
        )
        for name, table in (("cos", angles.cos()), ("sin", angles.sin())):
            self.register_buffer(name, table.to(device), persistent=False)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Rope:
        super()._apply(fn, recurse)
        self._fill(self.cos.device)
        return self

    def forward(self, positions_BS: Tensor | None) -> tuple[Tensor, Tensor]:
        """cos and sin for these positions, each fp32 (B, S, 1, K/2).

        None means positions 0, 1, 2, … and gives the whole tables, (1, max_seq_len, 1, K/2).
        """
        if positions_BS is None:
            return self.cos[None, :, None, :], self.sin[None, :, None, :]
        return self.cos[positions_BS][:, :, None, :], self.sin[positions_BS][:, :, None, :]


def rotate(x_BSHK: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns every head by its position's angles, in fp32. Returns x's shape and dtype.

    The number of positions is taken from x, not from the tables, because whole tables come in when positions
    are implicit.
    """
    S = x_BSHK.shape[1]
    cos, sin = cos[:, :S], sin[:, :S]
    first, second = at_least_fp32(x_BSHK).chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x_BSHK.dtype)
