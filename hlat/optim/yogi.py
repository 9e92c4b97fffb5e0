"""Yogi (Zaheer, Reddi, Sachan, Kale and Kumar, "Adaptive Methods for Nonconvex Optimization", NeurIPS 2018,
algorithm 2), bias-corrected, with decoupled decay.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from hlat.optim.base import Decay, Elementwise
from hlat.registry import register


@register("optim", "yogi")
class Yogi(Elementwise):
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
        defaults = {"lr": lr, "betas": tuple(betas), "eps": eps, "initial": initial}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})

    def update(
        self, p: Tensor, g: Tensor, state: dict[str, Tensor], group: dict[str, Any], lr: Tensor, step: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        beta1, beta2 = group["betas"]
        m = state["exp_avg"].lerp(g, 1 - beta1)
        old = torch.where(step == 1, group["initial"], state["exp_avg_sq"])
        square = g * g
        v = old + (1 - beta2) * square * torch.sign(square - old)
        denominator = (v * group["unbias"][1]).sqrt() + group["eps"]
        p = p * (1 - lr * group["weight_decay"]) - lr * (m * group["unbias"][0]) / denominator
        return p, {"exp_avg": m, "exp_avg_sq": v}
