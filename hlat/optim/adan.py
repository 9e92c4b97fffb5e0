"""Adan (Xie et al., "Adan: Adaptive Nesterov Momentum Algorithm", arXiv 2208.06677, algorithm 1), as the
authors' code has it: betas are decays, all moments are bias-corrected, decay is proximal.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hlat.optim.base import Decay, Elementwise
from hlat.optim.rounding import Average
from hlat.registry import register


@register("optim", "adan")
class Adan(Elementwise):
    """Adam with Nesterov's look-ahead estimated from the difference of successive gradients.

    d = g - g_before (0 at first);  m, n, v: moments of g, d and (g + b2 d)²;
    p = (p - lr (m̂ + b2 n̂) / (√v̂ + eps)) / (1 + lr wd).

    Args:
        params: parameters of any shape, or groups.
        lr: learning rate; a float or a tensor ().
        betas: decay of the moments of the gradient, of the difference, and of the square.
        eps: added to √v̂.
        weight_decay: proximal decay, multiplied by `lr`; the authors use 0.02.
    """

    slots: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_diff", "exp_avg_sq", "grad_prev")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[Decay, Decay, Decay] = (0.98, 0.92, 0.99),
        eps: Annotated[float, Field(gt=0)] = 1e-8,
        weight_decay: float = 0.02,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    def averages(self) -> dict[str, Average]:
        """See `Elementwise`."""
        beta1, beta2, beta3 = self.param_groups[0]["betas"]
        moments = {"exp_avg": Average(beta1), "exp_avg_diff": Average(beta2)}
        return {**moments, "exp_avg_sq": Average(beta3, power=2)}

    def update(
        self, p: Tensor, g: Tensor, state: dict[str, Tensor], group: dict[str, Any], lr: Tensor, step: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        beta1, beta2, beta3 = group["betas"]
        d = torch.where(step == 1, 0.0, g - state["grad_prev"])
        m = state["exp_avg"].lerp(g, 1 - beta1)
        n = state["exp_avg_diff"].lerp(d, 1 - beta2)
        v = state["exp_avg_sq"] * beta3 + (1 - beta3) * (g + beta2 * d).square()
        denominator = (v * group["unbias"][2]).sqrt() + group["eps"]
        move = (m * group["unbias"][0] + beta2 * n * group["unbias"][1]) / denominator
        p = (p - lr * move) / (1 + lr * group["weight_decay"])
        return p, {"exp_avg": m, "exp_avg_diff": n, "exp_avg_sq": v, "grad_prev": g}
