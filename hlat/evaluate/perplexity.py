"""Held-out loss: nats per token, and bits per byte of text, which compares models whose tokenizers differ.

There is one way to compute it: the loss of training, summed over batches without gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hlat.objective.causal_lm import CausalLM

if TYPE_CHECKING:
    from hlat.data.batch import Batch
    from hlat.model.decoder import Decoder


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
        """exp(loss); inf where that is too large for a number."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


@torch.no_grad()
def sum_losses(
    batches: Iterable[Batch],
    loss: Callable[[Batch, Tensor], Tensor],
    device: torch.device,
    after: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Nats, () in fp64 where the device has it, and targets, int64 (), of all batches, on the device; nothing
    is read back to the host.

    Args:
        batches: each moved to the device here.
        loss: `loss(batch, denominator)`, fp32 (): the summed loss of a batch over the denominator.
        after: called after each batch.
    """
    wide = torch.float64 if device.type in ("cpu", "cuda") else torch.float32
    one = torch.ones((), device=device)
    nats = torch.zeros((), dtype=wide, device=device)
    tokens = torch.zeros((), dtype=torch.int64, device=device)
    for batch in batches:
        batch = batch.to(device)
        nats += loss(batch, one).to(wide)
        tokens += batch.targets_count()
        after()
    return nats, tokens


def bits_per_byte(model: Decoder, batches: Iterable[Batch], text_bytes: float = 0.0) -> Score:
    """The model's score on held-out batches.

    Args:
        model: a whole model (its head on this process).
        text_bytes: UTF-8 bytes of the text all batches' targets stand for; with 0 only `loss` is defined.

    The model's training mode is kept as it is: the decoder has no dropout.
    """
    if model.head is None:
        raise ValueError("bits_per_byte needs the stage that holds the head")
    objective = CausalLM()
    nats, tokens = sum_losses(
        batches,
        lambda batch, one: objective.loss(model, batch, one),  # type: ignore[arg-type]
        model.head.weight.device,
    )
    return Score(float(nats), int(tokens), text_bytes)
