"""Rounding fp32 results into a stored dtype, to nearest or stochastically.

Stochastic rounding adds 16 uniform bits to the fp32 pattern and truncates to bf16, which rounds up with a
probability equal to the distance from the lower neighbour, so the expected value is the exact one. The bits
are a hash of (seed, step, element index): no generator state to save, the same numbers after a resume.
"""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MASK32 = 0xFFFFFFFF


def hash_bits(count: int, *, seed: int, step: Tensor, offset: int, device: torch.device) -> Tensor:
    """`count` int32 values uniform in [0, 2^16), a pure function of (seed, step, offset + position).

    Two rounds of multiply and xor-shift on 32-bit values held in int64, whose products cannot overflow (the
    multipliers are below 2^31).
    """
    x = torch.arange(count, dtype=torch.int64, device=device) + offset
    salt = seed * 0x3C6EF372 & _MASK32  # in Python: a seed of 63 bits times this is no int64
    key = (step.to(torch.int64) * 0x2545F491 + salt) & _MASK32
    x = (x ^ key) & _MASK32
    for _ in range(2):
        x = x ^ (x >> 16)
        x = (x * 0x21F0AAAD) & _MASK32
        x = x ^ (x >> 15)
        x = (x * 0x735A2D97) & _MASK32
        x = (x ^ (x >> 15)) + key
        x = x & _MASK32
    return (x >> 16).to(torch.int32)


def stochastic_round(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 `x` to bf16 with int32 `bits` in [0, 2^16) of the same shape. Non-finite values pass unchanged."""
    pattern = (x.view(torch.int32) + bits) & -65536
    return torch.where(torch.isfinite(x), pattern.view(torch.float32), x).to(torch.bfloat16)


def round_to(x: Tensor, dtype: torch.dtype, rounding: str, *, seed: int, step: Tensor, offset: int) -> Tensor:
    """1-D fp32 `x` in `dtype`, rounded as asked; fp32 passes through."""
    if dtype != torch.bfloat16 or rounding == "nearest":
        return x.to(dtype)
    return stochastic_round(x, hash_bits(x.numel(), seed=seed, step=step, offset=offset, device=x.device))
