"""The released code's annealing: rates fall when the loss has risen (amazon-science/mezo_svrg)."""

from __future__ import annotations

import torch
from torch import Tensor

FLOORS = {"lr_anchor": 1e-5, "lr_inner": 1e-6}  # no rate is brought below these; one that is lower stays
_RISE = 1.05


class Annealing:
    """Every `every` steps, once more than four times as many losses are known, the mean of the last `every`
    is compared to that of as many two lengths earlier; if it is 5 % above it, all rates are divided.

    Decided on the device: nothing waits for it, and ranks that see the same losses agree.

    Args:
        factor: what rates are divided by; 1: never.
        every: steps, the released code's minibatches an epoch.
        device: where losses live.

    Raises:
        ValueError: factor or every below 1.
    """

    def __init__(self, factor: float, every: int, device: torch.device) -> None:
        if factor < 1 or every < 1:
            raise ValueError(f"anneal and anneal_every must be at least 1, got {factor} and {every}")
        self.factor, self.every = factor, every
        self.state: dict[str, Tensor] = {}
        if factor > 1:
            self.state = {
                "losses": torch.zeros(3 * every, device=device),
                "losses_seen": torch.zeros((), dtype=torch.int32, device=device),
                "divisions": torch.zeros((), device=device),
            }

    def __call__(self, name: str, rate: Tensor) -> Tensor:
        """The annealed rate, ()."""
        if not self.state:
            return rate
        lowest = rate.clamp(max=FLOORS[name])
        return torch.maximum(rate / self.factor ** self.state["divisions"].to(rate.dtype), lowest)

    def note(self, loss: Tensor) -> None:
        """A step's loss, ()."""
        if not self.state:
            return
        losses, seen, every = self.state["losses"], self.state["losses_seen"], self.every
        losses.copy_(torch.cat([losses[1:], loss.reshape(1).to(losses.dtype)]))
        seen.add_(1)
        risen = losses[2 * every :].mean() > _RISE * losses[:every].mean()
        due = (seen % every == 0) & (seen > 4 * every)
        self.state["divisions"].add_((risen & due).to(torch.float32))
