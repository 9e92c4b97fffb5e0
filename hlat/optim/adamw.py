"""AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2; decay scaled by the learning rate)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from hlat.optim.base import Decay, Elementwise
from hlat.registry import register


@register("optim", "adamw")
class AdamW(Elementwise):
    """Adam with decoupled weight decay, bias-corrected; equals `torch.optim.AdamW`.

    m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g²;  p = p - lr (wd p + m̂ / (√v̂ + eps)).

    Args:
        params: parameters of any shape, or groups.
        lr: learning rate; a float or a tensor ().
        betas: decay of the first and second moment. HLAT trains with (0.9, 0.95).
        eps: added to √v̂.
        weight_decay: decoupled decay, multiplied by `lr`.
    """

    slots: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[Decay, Decay] = (0.9, 0.95),
        eps: Annotated[float, Field(gt=0)] = 1e-8,
        weight_decay: float = 0.1,
    ) -> None:
        if not all(0.0 <= b < 1.0 for b in betas):
            raise ValueError(f"betas must lie in [0, 1), not {betas}")
        if eps <= 0.0:
            raise ValueError(f"eps must be positive, not {eps}")
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    def update(
        self, p: Tensor, g: Tensor, state: dict[str, Tensor], group: dict[str, Any], lr: Tensor, step: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        beta1, beta2 = group["betas"]
        m = state["exp_avg"].lerp(g, 1 - beta1)
        v = state["exp_avg_sq"] * beta2 + (1 - beta2) * g * g
        m_hat = m * group["unbias"][0]
        denominator = (v * group["unbias"][1]).sqrt() + group["eps"]
        return p * (1 - lr * group["weight_decay"]) - lr * m_hat / denominator, {
            "exp_avg": m,
            "exp_avg_sq": v,
        }
