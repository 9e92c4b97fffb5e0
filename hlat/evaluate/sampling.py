"""How the next token is chosen from logits."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Sampling:
    """Temperature 0 takes the most likely token. top_k keeps the k most likely ids, top_p then the fewest of
    them whose probability reaches p. generator: of the draws, on the logits' device.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = field(default=None, repr=False)

    @property
    def greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0


def draw(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """One id for each row of logits (B, V), int64 (B,)."""
    logits = logits_BV.float()
    if sampling.greedy:
        return logits.argmax(-1)
    probabilities = (logits / sampling.temperature).softmax(-1)
    order = probabilities.argsort(dim=-1, descending=True, stable=True)
    ranked = probabilities.gather(-1, order)
    if sampling.top_k is not None:
        ranked[:, sampling.top_k :] = 0
    if sampling.top_p is not None:
        ranked = ranked / ranked.sum(-1, keepdim=True)
        ranked[ranked.cumsum(-1) - ranked >= sampling.top_p] = 0
    return order.gather(-1, torch.multinomial(ranked, 1, generator=sampling.generator))[:, 0]
