"""AVGrad (arXiv 2401.08893, section 3): AMSGrad with the maximum over time replaced by the mean."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor

from hlat.optim.adamw import AdamW
from hlat.optim.base import Decay
from hlat.optim.rounding import Average
from hlat.registry import register


@register("optim", "avgrad")
class AVGrad(AdamW):
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
        super().__init__(params, lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def averages(self) -> dict[str, Average]:
        """See `Elementwise`."""
        return {**super().averages(), "mean_sq": Average(None, power=2)}

    def second_moment(
        self, g: Tensor, state: dict[str, Tensor], group: dict[str, Any], step: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        v, moments = super().second_moment(g, state, group, step)
        mean = state["mean_sq"] + (v - state["mean_sq"]) * (1 / step)
        return mean, {**moments, "mean_sq": mean}
