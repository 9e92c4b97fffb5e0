"""Next-token prediction: cross-entropy summed over the targets of a batch.

The sum, not the mean: the training step divides by the global number of targets, so that packing,
accumulation and layout change nothing.

Head and loss are one operation over chunks of tokens: of the logits only one chunk exists at a time, in fp32,
and because the gradient of a cross-entropy is known with its value (softmax minus one-hot), it is taken in
the same pass and no logits are kept for backward.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from hlat.registry import register

if TYPE_CHECKING:
    from hlat.data.batch import Batch

IGNORE = -100
CHUNK_ELEMENTS = 1 << 24  # logits held at a time: 64 MiB of fp32, 32 MiB of bf16


class Decoder(Protocol):
    """What the objective needs of a model."""

    head: nn.Linear

    def hidden(self, ids_BS: Tensor, positions_BS: Tensor | None, documents_BS: Tensor | None) -> Tensor:
        """States (B, S, D) after the final norm."""
        ...


@register("objective", "causal_lm")
class CausalLM:
    """Summed next-token cross-entropy of a decoder."""

    def __init__(self) -> None:
        self._kernel: Callable[..., tuple[Tensor, Tensor]] = softmax_gradient

    def compile(self) -> None:
        """Fuse the softmax, its gradient and the loss of a chunk into one kernel."""
        self._kernel = torch.compile(softmax_gradient, dynamic=False)

    def loss(self, model: Decoder, batch: Batch, denominator: Tensor) -> Tensor:
        """fp32 () sum over the targets of -log p, divided by `denominator` (); differentiable with respect to
        the model.
        """
        x_BSD = model.hidden(batch.ids, batch.positions, batch.documents)
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        scale = 1.0 / denominator.to(torch.float32)
        differentiate = torch.is_grad_enabled()
        return LinearCrossEntropy.apply(  # type: ignore[no-any-return]
            x_TD, model.head.weight, batch.targets.reshape(-1), scale, self._kernel, differentiate
        )


def softmax_gradient(logits_TV: Tensor, targets_T: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of a chunk, summed and scaled, fp32 (), and its gradient with respect to the logits, (T,
    V) in their dtype.

    The scale enters here, in fp32, because a small factor applied to a bf16 gradient later would be rounded
    twice.
    """
    z = logits_TV.float()
    top = z.amax(-1, keepdim=True)
    exp = (z - top).exp()
    total = exp.sum(-1, keepdim=True)
    counted = targets_T != IGNORE
    index = targets_T.clamp(min=0)[:, None]
    log_p = z.gather(-1, index) - top - total.log()
    loss = -(log_p[:, 0] * counted).sum() * scale
    columns = torch.arange(z.shape[-1], device=z.device)
    one_hot = columns[None, :] == index
    gradient = (exp / total - one_hot.to(torch.float32)) * (counted * scale)[:, None]
    return loss, gradient.to(logits_TV.dtype)


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of cross_entropy(x W^T, targets) without the logits of all tokens; gradients are formed in the
    forward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        scale: Tensor,
        kernel: Callable[..., tuple[Tensor, Tensor]],
        differentiate: bool,
    ) -> Tensor:
        """x (T, D) and weight (V, D) of one dtype, targets int64 (T), scale fp32 (). Returns fp32 ()."""
        tokens, vocab = x_TD.shape[0], weight_VD.shape[0]
        chunks = max(1, -(-tokens * vocab // CHUNK_ELEMENTS))
        while tokens % chunks:  # equal chunks, so that one compiled kernel serves them all
            chunks += 1
        size = tokens // chunks
        loss = torch.zeros((), dtype=torch.float32, device=x_TD.device)
        dx = torch.empty_like(x_TD) if differentiate else None
        dw: Tensor | None = None
        for start in range(0, tokens, size):
            x = x_TD[start : start + size]
            part, dlogits = kernel(x @ weight_VD.T, targets_T[start : start + size], scale)
            loss = loss + part
            if dx is not None:
                torch.mm(dlogits, weight_VD, out=dx[start : start + size])
                dw = _add(dw, dlogits.T @ x, chunks)
        if dx is not None:
            ctx.save_for_backward(dx, dw)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:  # type: ignore[override]
        """The gradients that forward made, times the gradient of the result (1 in training)."""
        dx, dw = ctx.saved_tensors
        return dx * grad.to(dx.dtype), (dw * grad).to(dx.dtype), None, None, None, None


def _add(total: Tensor | None, part: Tensor, parts: int) -> Tensor:
    """Running sum in fp32; a lone part is kept as it is."""
    if total is None:
        return part if parts == 1 else part.float()
    return total.add_(part)
