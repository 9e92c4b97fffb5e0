"""AMSGrad (Reddi, Kale and Kumar, "On the Convergence of Adam and Beyond", ICLR 2018, algorithm 2), with
decoupled decay.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hlat.optim.adamw import AdamW
from hlat.optim.base import Decay
from hlat.registry import register


@register("optim", "amsgrad")
class AMSGrad(AdamW):
    """Adam whose second moment never falls: the largest so far scales the step. Equals `torch.optim.AdamW`
    with `amsgrad=True`.

    m = b1 m + (1-b1) g;  v = b2 v + (1-b2) g²;  a = max(a, v);
    p = p - lr (wd p + m̂ / (√(a / (1-b2^t)) + eps)).

    Args:
        params: parameters of any shape, or groups.
        lr: learning rate; a float or a tensor ().
        betas: decay of the first and second moment. The authors use beta2 0.99 or 0.999.
        eps: added to the root.
        weight_decay: decoupled decay, multiplied by `lr`.
    """

    slots: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[Decay, Decay] = (0.9, 0.999),
        eps: Annotated[float, Field(gt=0)] = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def second_moment(
        self, g: Tensor, state: dict[str, Tensor], group: dict[str, Any], step: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        v, moments = super().second_moment(g, state, group, step)
        largest = torch.maximum(state["max_exp_avg_sq"], v)
        return largest, {**moments, "max_exp_avg_sq": largest}
