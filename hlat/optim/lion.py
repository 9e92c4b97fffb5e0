"""Lion (Chen et al., "Symbolic Discovery of Optimization Algorithms", arXiv 2302.06675, algorithm 2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor

from hlat.optim.base import Decay, Elementwise
from hlat.optim.rounding import Average
from hlat.registry import register


@register("optim", "lion")
class Lion(Elementwise):
    """Steps of equal size in the direction of the sign of a momentum; one slot. Takes 3 to 10 times lower
    rates than AdamW, and as many times more decay.

    u = b1 m + (1-b1) g;  p = p - lr (wd p + sign(u));  m = b2 m + (1-b2) g.

    Args:
        params: parameters of any shape, or groups.
        lr: learning rate; a float or a tensor ().
        betas: weight of the momentum in the direction, and its decay.
        weight_decay: decoupled decay, multiplied by `lr`.
    """

    slots: ClassVar[tuple[str, ...]] = ("exp_avg",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        *,
        betas: tuple[Decay, Decay] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay})

    def averages(self) -> dict[str, Average]:
        """See `Elementwise`."""
        return {"exp_avg": Average(self.param_groups[0]["betas"][1])}

    def update(
        self, p: Tensor, g: Tensor, state: dict[str, Tensor], group: dict[str, Any], lr: Tensor, step: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        beta1, beta2 = group["betas"]
        u = state["exp_avg"].lerp(g, 1 - beta1)
        p = p * (1 - lr * group["weight_decay"]) - lr * torch.sign(u)
        return p, {"exp_avg": state["exp_avg"].lerp(g, 1 - beta2)}
