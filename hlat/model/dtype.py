"""What is computed more exactly than the weights are stored."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_fp32(x: Tensor) -> Tensor:
    """The tensor in fp32; one in fp64 stays as it is, so that a model in fp64 is so throughout."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
