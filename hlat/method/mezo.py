"""MeZO: stochastic descent along one random direction a step (Malladi et al. 2023, arXiv 2305.17333)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hlat.method.noise import Kind
from hlat.method.zeroth_order import Closure, Restore, ZerothOrder


class MeZO(ZerothOrder):
    """theta <- theta - lr p z, with p from two losses and z drawn anew each step. Memory of inference.

    With a closure over all examples this is full-batch zeroth-order descent.

    Args:
        params, mu, seed, noise, restore: see `ZerothOrder`.
        lr: learning rate.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        mu: float = 1e-3,
        seed: int = 0,
        *,
        noise: Kind = "normal",
        restore: Restore = "auto",
    ) -> None:
        super().__init__(params, {"lr": lr}, mu=mu, seed=seed, noise=noise, restore=restore)

    @torch.no_grad()
    def step(self, closure: Closure, anchor_closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """One update.

        Args:
            closure: returns a scalar loss; called twice, and must use the same examples both times. Nothing
                in it may be random, dropout included.
            anchor_closure: not called: MeZO has no anchor.

        Returns:
            The mean of the two losses, (): the loss at the parameters but for terms of mu squared.
        """
        z = self.direction()
        self.begin()
        losses = self.agreed(self.two_points(closure, z))
        loss, p = losses.mean(), self.slope(losses[0], losses[1])
        keep = self.keep(loss, [p])
        self.commit({z: torch.where(keep, -self.rate("lr") * p, 0.0)})
        self.end()
        return loss
