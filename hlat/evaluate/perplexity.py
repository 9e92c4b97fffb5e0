"""Held-out loss: nats per token, and bits per byte of text, which compares models whose tokenizers differ."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from hlat.data.batch import Batch
    from hlat.model.decoder import Decoder

CHUNK = 4096
"""Tokens whose fp32 logits are held at a time (4096 · 32000 · 4 bytes = 0.5 GB)."""


@dataclass(frozen=True)
class Score:
    """Sum of the loss over a text.

    nats: total negative log-likelihood of the targets. tokens: how many targets. bytes: UTF-8 bytes of the
    text those targets spell.
    """

    nats: float
    tokens: int
    bytes: float

    @property
    def loss(self) -> float:
        """Nats per target token."""
        return self.nats / self.tokens if self.tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """nats / ln 2 / bytes; nan without bytes."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


def total_nats(hidden_BSD: Tensor, head_VD: Tensor, targets_BS: Tensor, chunk: int = CHUNK) -> Tensor:
    """Sum of cross-entropy over all targets that are not -100: a scalar, fp64 where the device has it.

    Logits are made in the weights' dtype, and their log-softmax in fp32, `chunk` tokens at a time.
    """
    hidden = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
    targets = targets_BS.reshape(-1)
    wide = torch.float64 if hidden.device.type in ("cpu", "cuda") else torch.float32
    total = torch.zeros((), dtype=wide, device=hidden.device)
    for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True):
        losses = F.cross_entropy(F.linear(h, head_VD).float(), t, ignore_index=-100, reduction="none")
        total += losses.to(wide).sum()
    return total


@torch.no_grad()
def bits_per_byte(model: Decoder, batches: Iterable[Batch], text_bytes: float = 0.0) -> Score:
    """The model's score on held-out batches.

    Args:
        model: a whole model (its head on this process).
        batches: each moved to the model's device here. Nothing is read back to the host before the last one.
        text_bytes: UTF-8 bytes of the text all batches' targets stand for; with 0 only `loss` is defined.

    The model's training mode is kept as it is: the decoder has no dropout.
    """
    if model.head is None:
        raise ValueError("bits_per_byte needs the stage that holds the head")
    weight = model.head.weight
    nats: Tensor | None = None
    tokens: Tensor | None = None
    for batch in batches:
        batch = batch.to(weight.device)
        hidden = model.hidden(batch.ids, batch.positions, batch.documents)
        part, count = total_nats(hidden, weight, batch.targets), (batch.targets != -100).sum()
        nats = part if nats is None else nats + part
        tokens = count if tokens is None else tokens + count
    if nats is None or tokens is None:
        return Score(0.0, 0, text_bytes)
    return Score(float(nats), int(tokens), text_bytes)
