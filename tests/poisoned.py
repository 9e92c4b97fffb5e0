"""A plug-in for tests: next-token prediction that goes wrong on some rows. As a program: `hlat` with it."""

from __future__ import annotations

import sys
from typing import Any

import torch

from hlat.cli import main
from hlat.objective.causal_lm import CausalLM
from hlat.registry import register


@register("objective", "poisoned")
class Poisoned(CausalLM):
    """The loss of a batch with one of `rows` (their targets) is multiplied by `factor`; default: by NaN."""

    def __init__(self, *, rows: tuple[tuple[int, ...], ...] = (), factor: float | None = None) -> None:
        super().__init__()
        self.rows = torch.tensor(rows or [[-1]])
        self.factor = float("nan") if factor is None else factor

    def loss(self, model: Any, batch: Any, denominator: torch.Tensor) -> torch.Tensor:
        """See `CausalLM`."""
        bad = (batch.targets[:, None] == self.rows.to(batch.targets.device)).all(-1).any()
        return super().loss(model, batch, denominator) * torch.where(bad, self.factor, 1.0)


if __name__ == "__main__":
    sys.exit(main())
