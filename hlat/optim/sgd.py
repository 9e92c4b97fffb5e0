"""Stochastic gradient descent with momentum, as `torch.optim.SGD` defines it (no dampening, no Nesterov),
decay decoupled.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from torch import Tensor

from hlat.optim.base import Decay, Elementwise
from hlat.optim.rounding import Average
from hlat.registry import register


@register("optim", "sgd")
class SGD(Elementwise):
    """b = momentum b + g;  p = p - lr (wd p + b).

    Args:
        params: parameters of any shape, or groups.
        lr: learning rate; a float or a tensor ().
        momentum: decay of the running sum of gradients, 0 <= momentum < 1; with 0 no sum is kept.
        weight_decay: decoupled decay, multiplied by `lr`.
    """

    slots: ClassVar[tuple[str, ...]] = ("momentum_buffer",)

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-2,
        *,
        momentum: Decay = 0.9,
        weight_decay: float = 0.0,
    ) -> None:
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum must lie in [0, 1), not {momentum}")
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        self.slots = ()  # type: ignore[misc]
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """The first group with a momentum makes room for the sums; those there are none of yet are 0."""
        super().add_param_group(param_group)
        if self.param_groups[-1]["momentum"] and not self.slots:
            self.slots = type(self).slots  # type: ignore[misc]

    def _kinds_of_state(self) -> list[set[str]]:
        return [{"step"}, {"step", *self.slots}]

    def _state_of(self, p: Tensor) -> dict[str, Tensor]:
        state = super()._state_of(p)
        for slot in self.slots:
            if slot not in state:
                state[slot] = self._zeros(p)
        return state

    def averages(self) -> dict[str, Average]:
        """See `Elementwise`."""
        decay = self.param_groups[0]["momentum"]
        return {"momentum_buffer": Average(decay)} if self.slots else {}

    def update(
        self, p: Tensor, g: Tensor, state: dict[str, Tensor], group: dict[str, Any], lr: Tensor, step: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.slots:
            return p * (1 - lr * group["weight_decay"]) - lr * g, {}
        buffer = state["momentum_buffer"] * group["momentum"] + g
        return p * (1 - lr * group["weight_decay"]) - lr * buffer, {"momentum_buffer": buffer}
