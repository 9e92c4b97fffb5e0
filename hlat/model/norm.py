"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hlat.model.dtype import at_least_fp32


class RMSNorm(nn.Module):
    """y = weight * x / sqrt(mean(x²) + eps), the statistic in fp32 whatever the dtype of x.

    The normalised value is rounded to x's dtype before it meets the weight, which is the order Hugging Face's
    Llama uses, so that both agree in bf16 too.

    Args:
        size: length D of the last axis.
        eps: added to the mean square.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x_BSD: Tensor) -> Tensor:
        """(…, D) of any floating dtype -> the same shape and dtype."""
        x32 = at_least_fp32(x_BSD)
        x32 = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x_BSD.dtype)
