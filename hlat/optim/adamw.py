"""AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2; decay scaled by the learning rate)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from hlat.optim.base import Decay, Elementwise
from hlat.optim.rounding import Average
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
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    def update(
        self, p: Tensor, g: Tensor, state: dict[str, Tensor], group: dict[str, Any], lr: Tensor, step: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        beta1, _ = group["betas"]
        m = state["exp_avg"].lerp(g, 1 - beta1)
        scale, moments = self.second_moment(g, state, group, step)
        denominator = (scale * group["unbias"][1]).sqrt() + group["eps"]
        p = p * (1 - lr * group["weight_decay"]) - lr * (m * group["unbias"][0]) / denominator
        return p, {"exp_avg": m, **moments}

    def averages(self) -> dict[str, Average]:
        """See `Elementwise`."""
        beta1, beta2 = self.param_groups[0]["betas"]
        return {"exp_avg": Average(beta1), "exp_avg_sq": Average(beta2, power=2)}

    def second_moment(
        self, g: Tensor, state: dict[str, Tensor], group: dict[str, Any], step: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """What the step is scaled by, before bias correction and root, and the new slots it comes from."""
        beta2 = group["betas"][1]
        v = state["exp_avg_sq"] * beta2 + (1 - beta2) * g * g
        return v, {"exp_avg_sq": v}
