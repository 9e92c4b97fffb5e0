"""Next-token prediction: cross-entropy summed over the targets of a batch.

The sum, not the mean: the training step divides by the global number of targets, so that packing,
accumulation and layout change nothing.

Head and loss are one operation over chunks of tokens: of the logits only one chunk exists at a time, in fp32,
and because the gradient of a cross-entropy is known with its value (softmax minus one-hot), it is taken in
the same pass and no logits are kept for backward. When the rows of the head are spread over tensor-parallel
ranks, each works on its part of the logits; only a maximum and two sums a token are exchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from hlat.backend.collectives import VocabShard, all_reduce
from hlat.model.products import matmul
from hlat.registry import register

if TYPE_CHECKING:
    from hlat.backend.groups import Group
    from hlat.data.batch import Batch

IGNORE = -100
Kernel = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
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
        self._whole: Kernel = softmax_gradient
        self._part: Callable[..., tuple[Tensor, Tensor]] = part_softmax_gradient

    def compile(self) -> None:
        """Fuse the softmax, its gradient and the loss of a chunk into one kernel."""
        self._whole = torch.compile(softmax_gradient, dynamic=False)
        self._part = torch.compile(part_softmax_gradient, dynamic=False)

    def loss(self, model: Decoder, batch: Batch, denominator: Tensor) -> Tensor:
        """fp32 () sum over the targets of -log p, divided by `denominator` (); differentiable with respect to
        the model. On tensor-parallel ranks every one gets the whole loss.
        """
        x_BSD = model.hidden(batch.ids, batch.positions, batch.documents)
        shard: VocabShard | None = getattr(model.head, "shard", None)
        kernel, rows = self._whole, model.head.weight.shape[0]
        if shard is not None:
            x_BSD, rows = shard.region.enter(x_BSD), shard.rows
            kernel = partial(self._part, start=shard.start, group=shard.region.group)
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        scale = 1.0 / denominator.to(torch.float32)
        size = chunk_size(x_TD.shape[0], rows)
        differentiate = torch.is_grad_enabled()
        return LinearCrossEntropy.apply(  # type: ignore[no-any-return]
            x_TD, model.head.weight, batch.targets.reshape(-1), scale, kernel, size, differentiate
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


def part_softmax_gradient(
    logits_Tv: Tensor, targets_T: Tensor, scale: Tensor, *, start: int, group: str | Group
) -> tuple[Tensor, Tensor]:
    """`softmax_gradient` of logits whose columns are spread over ranks: (T, v) are columns `start` and on.
    The loss is that of the whole softmax, the gradient that of this rank's columns.
    """
    z = logits_Tv.float()
    top = all_reduce(z.amax(-1), group, "max")[:, None]
    exp = (z - top).exp()
    counted = targets_T != IGNORE
    index = targets_T[:, None] - start
    held = (index >= 0) & (index < z.shape[-1])
    target = z.gather(-1, index.clamp(0, z.shape[-1] - 1)) * held
    total, target = all_reduce(torch.stack([exp.sum(-1, keepdim=True), target]), group).unbind(0)
    loss = -((target - top - total.log())[:, 0] * counted).sum() * scale
    columns = torch.arange(z.shape[-1], device=z.device)
    one_hot = columns[None, :] == index
    gradient = (exp / total - one_hot.to(torch.float32)) * (counted * scale)[:, None]
    return loss, gradient.to(logits_Tv.dtype)


def chunk_size(tokens: int, vocab: int) -> int:
    """Tokens whose logits exist at a time: equal chunks, so that one compiled kernel serves them all."""
    chunks = max(1, -(-tokens * vocab // CHUNK_ELEMENTS))
    while tokens % chunks:
        chunks += 1
    return tokens // chunks


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
        kernel: Kernel,
        size: int,
        differentiate: bool,
    ) -> Tensor:
        """x (T, D) and weight (V, D) of one dtype, targets int64 (T), scale fp32 (), `size` tokens a chunk.
        Returns fp32 ().
        """
        tokens = x_TD.shape[0]
        chunks = tokens // size
        loss = torch.zeros((), dtype=torch.float32, device=x_TD.device)
        dx = torch.empty_like(x_TD) if differentiate else None
        dw: Tensor | None = None
        for start in range(0, tokens, size):
            x = x_TD[start : start + size]
            part, dlogits = kernel(matmul(x, weight_VD.T), targets_T[start : start + size], scale)
            loss = loss + part
            if dx is not None:
                matmul(dlogits, weight_VD, out=dx[start : start + size])
                dw = _add(dw, matmul(dlogits.T, x), chunks)
        if dx is not None:
            ctx.save_for_backward(dx, dw)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None, None, None]:  # type: ignore[override]
        """The gradients that forward made, times the gradient of the result (1 in training)."""
        dx, dw = ctx.saved_tensors
        return dx * grad.to(dx.dtype), (dw * grad).to(dx.dtype), None, None, None, None, None


def _add(total: Tensor | None, part: Tensor, parts: int) -> Tensor:
    """Running sum in fp32; a lone part is kept as it is."""
    if total is None:
        return part if parts == 1 else part.float()
    return total.add_(part)
