"""AVGrad (arXiv 2401.08893, section 3): AMSGrad with the maximum over time replaced by the mean."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from hlat.optim.base import Decay, Elementwise
from hlat.registry import register


@register("optim", "avgrad")
class AVGrad(Elementwise):
    """Adam whose step is scaled by the mean over time of its second moment, so that it only gets surer.

    m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g²;  a = mean of all v so far;
    p = p - lr (wd p + m̂ / (√(a / (1-b2^t)) + eps)).

    Args:
        params: parameters of any shape, or groups.
        lr: learning rate; a float or a tensor ().
        betas: decay of the first and second moment. Defaults and eps: the authors' GPT-2 runs.
        eps: added to the root.
        weight_decay: decoupled decay, multiplied by `lr`.
    """

    slots: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq", "mean_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[Decay, Decay] = (0.9, 0.95),
        eps: Annotated[float, Field(gt=0)] = 1e-6,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})

    def update(
        self, p: Tensor, g: Tensor, state: dict[str, Tensor], group: dict[str, Any], lr: Tensor, step: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        beta1, beta2 = group["betas"]
        m = state["exp_avg"].lerp(g, 1 - beta1)
        v = state["exp_avg_sq"] * beta2 + (1 - beta2) * g * g
        mean = state["mean_sq"] + (v - state["mean_sq"]) * (1 / step)
        denominator = (mean * group["unbias"][1]).sqrt() + group["eps"]
        p = p * (1 - lr * group["weight_decay"]) - lr * (m * group["unbias"][0]) / denominator
        return p, {"exp_avg": m, "exp_avg_sq": v, "mean_sq": mean}
