"""Yogi (Zaheer, Reddi, Sachan, Kale and Kumar, "Adaptive Methods for Nonconvex Optimization", NeurIPS 2018,
algorithm 2), bias-corrected, with decoupled decay.
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


@register("optim", "yogi")
class Yogi(AdamW):
    """Adam whose second moment moves by a step that does not grow with its distance from g².

    m = b1 m + (1-b1) g;  v = v + (1-b2) g² sign(g² - v);  p = p - lr (wd p + m̂ / (√v̂ + eps)).

    Args:
        params: parameters of any shape, or groups.
        lr: learning rate; a float or a tensor (). The authors recommend 1e-2.
        betas: decay of the first and second moment.
        eps: added to √v̂; the authors use 1e-3.
        initial: second moment before the first step; the authors use 1e-6.
        weight_decay: decoupled decay, multiplied by `lr`.
    """

    slots: ClassVar[tuple[str, ...]] = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        *,
        betas: tuple[Decay, Decay] = (0.9, 0.999),
        eps: Annotated[float, Field(gt=0)] = 1e-3,
        initial: Annotated[float, Field(ge=0)] = 1e-6,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, lr, betas=betas, eps=eps, weight_decay=weight_decay)
        self.initial = initial

    def second_moment(
        self, g: Tensor, state: dict[str, Tensor], group: dict[str, Any], step: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        old = torch.where(step == 1, self.initial, state["exp_avg_sq"])
        square = g * g
        v = old + (1 - group["betas"][1]) * square * torch.sign(square - old)
        return v, {"exp_avg_sq": v}
