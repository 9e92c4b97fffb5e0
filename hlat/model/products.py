"""Matrix products of a decoder, also where the CPU has no instructions for 16-bit ones.

On such a CPU PyTorch multiplies bf16 and fp16 matrices several times slower than fp32 ones
(docs/benchmarks.md). Here their operands become fp32, which is exact, are multiplied, and the result is
rounded once: what an instruction that accumulates in fp32 computes, but for the order of the sum. On every
other device, and in fp32 and wider, these are PyTorch's own products.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hlat.host.cpu import product_dtype


def matmul(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b in their common dtype, batched as `torch.matmul` does.

    Args:
        out: written and returned, if given, for two matrices; of the product's shape and dtype.
    """
    wide = product_dtype(a.device, a.dtype)
    if wide == a.dtype:
        return torch.matmul(a, b) if out is None else torch.mm(a, b, out=out)
    product = torch.matmul(a.to(wide), b.to(wide))
    return product.to(a.dtype) if out is None else out.copy_(product)


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x (..., I) times weight (O, I), transposed: (..., O), without a bias."""
    if product_dtype(x.device, x.dtype) == x.dtype:
        return F.linear(x, weight_OI)
    return _WideLinear.apply(x, weight_OI)  # type: ignore[no-any-return]


def attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` of q (B, H, S, K), k and v (B, G, T, K)."""
    wide = product_dtype(q.device, q.dtype)
    if wide == q.dtype:
        return F.scaled_dot_product_attention(q, k, v, **options)
    return F.scaled_dot_product_attention(q.to(wide), k.to(wide), v.to(wide), **options).to(q.dtype)


class Linear(nn.Linear):
    """A layer without bias whose product is `linear`."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) -> (..., out_features), same dtype."""
        return linear(x, self.weight)


class _WideLinear(torch.autograd.Function):
    """The product and its gradients by way of fp32; what is kept for backward stays as narrow as it came."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight_OI)
        return F.linear(x.float(), weight_OI.float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x, weight_OI = ctx.saved_tensors
        wide = grad.float()
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = torch.matmul(wide, weight_OI.float()).to(x.dtype)
        if ctx.needs_input_grad[1]:
            rows = wide.reshape(-1, wide.shape[-1])
            dw = torch.matmul(rows.T, x.float().reshape(-1, x.shape[-1])).to(weight_OI.dtype)
        return dx, dw
