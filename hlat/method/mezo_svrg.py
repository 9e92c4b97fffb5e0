"""MeZO-SVRG: MeZO with the variance of the mini-batch taken out (Gautam et al. 2024, arXiv 2404.08080).

Every `anchor_every` steps, at the anchor, the estimate is taken over many examples and the parameters are
remembered; in the steps between, an estimate on a mini-batch is corrected by the same mini-batch's estimate
at the anchor. With p, p_bar the slopes of a mini-batch's loss along z at the parameters and at the anchor,
and p_0, z_0 slope and direction of the anchor:

    anchor step    theta <- theta - lr_anchor p_0 z_0
    inner step     theta <- theta - lr_inner [(p - p_bar) z + p_0 z_0]
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from hlat.method.anneal import Annealing
from hlat.method.field import Direction
from hlat.method.noise import Kind
from hlat.method.zeroth_order import Closure, Restore, ZerothOrder

Snapshot = Literal["copy", "seed_log"]
Compat = Literal["none", "authors"]


class MeZOSVRG(ZerothOrder):
    """See the module's text.

    Args:
        params, mu, seed, noise, restore: see `ZerothOrder`.
        lr_anchor, lr_inner: learning rates of anchor and inner steps.
        anchor_every: an anchor step and so many less one inner steps follow each other; at least 2.
        shared_z: take both slopes of an inner step along one direction, so that their noise cancels. False:
            along two, as the paper's page may be read; the noise then adds up instead.
        snapshot: how the anchor is remembered. copy: a copy of the parameters. seed_log: by the steps and
            factors of what was added since, from which it is rebuilt, but for rounding; no memory, one more
            draw of noise for each step since.
        compat: authors does what the released code does (amazon-science/mezo_svrg): its copy of the anchor
            is the live parameters, so that p_bar is taken along a second direction at parameters already
            moved by p.
        anneal: divide the rates by this when the loss has risen; see `Annealing`. 1: never.
        anneal_every: steps between its looks, and in each of its means.

    Raises:
        ValueError: see `ZerothOrder`; anchor_every below 2, or an unknown word.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr_anchor: float,
        lr_inner: float,
        mu: float = 1e-3,
        anchor_every: int = 2,
        shared_z: bool = True,
        snapshot: Snapshot = "copy",
        seed: int = 0,
        *,
        compat: Compat = "none",
        noise: Kind = "normal",
        restore: Restore = "auto",
        anneal: float = 1.0,
        anneal_every: int = 8,
    ) -> None:
        if anchor_every < 2:
            raise ValueError(f"anchor_every must be at least 2, got {anchor_every}")
        if snapshot not in ("copy", "seed_log") or compat not in ("none", "authors"):
            raise ValueError(
                f"snapshot is copy or seed_log, compat none or authors: {snapshot!r}, {compat!r}"
            )
        rates = {"lr_anchor": lr_anchor, "lr_inner": lr_inner}
        super().__init__(params, rates, mu=mu, seed=seed, noise=noise, restore=restore)
        self.anchor_every, self.shared_z, self.authors = anchor_every, shared_z, compat == "authors"
        self.copies = snapshot == "copy" and not self.authors
        device, dtype = self.field.device, self.field.dtype
        self.own["anchor_step"] = torch.zeros((), dtype=torch.int32, device=device)
        self.own["anchor_slope"] = torch.zeros((), dtype=dtype, device=device)
        # Since the anchor: what to add along z_0 to be there again, and for each inner step along its own.
        self.own["back"] = torch.zeros(anchor_every, 2, dtype=dtype, device=device)
        self.annealing = Annealing(anneal, anneal_every, device)
        self.own.update(self.annealing.state)

    def init_state(self) -> None:
        """Make room for the copy of the anchor."""
        if self.copies:
            for piece in self.field.pieces:
                if "anchor" not in self.state[piece.owner]:
                    self.state[piece.owner]["anchor"] = piece.owner.detach().clone()

    @torch.no_grad()
    def step(self, closure: Closure, anchor_closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """One update.

        Args:
            closure: returns the scalar loss of a mini-batch; called four times on inner steps, never on
                anchor steps. Nothing in it may be random.
            anchor_closure: returns that of the anchor's examples; called twice on anchor steps (the first
                one and every `anchor_every`-th after it), never on others. Needed on anchor steps.

        Returns:
            The mean of the two losses around the parameters, (), over the mini-batch or the anchor's
            examples.
        """
        self.init_state()
        self.begin()
        if not self.at_anchor:
            loss = self._authors_step(closure) if self.authors else self._inner_step(closure)
        elif anchor_closure is None:
            raise ValueError(f"step {self.count} is an anchor step: give anchor_closure")
        else:
            loss = self._anchor_step(anchor_closure)
        self.annealing.note(loss)
        self.end()
        return loss

    @property
    def at_anchor(self) -> bool:
        """Whether the next step is an anchor step."""
        return self.count % self.anchor_every == 0

    def rate(self, name: str) -> Tensor:
        """A rate, scheduled and annealed."""
        rate = super().rate(name)
        return self.annealing(name, rate) if hasattr(self, "annealing") else rate

    def _anchor_step(self, closure: Closure) -> Tensor:
        own, z = self.own, self.direction()
        if self.copies:
            self.field.copy(self.field.bases, self._anchor())
        losses = self.agreed(self.two_points(closure, z))
        loss, p = losses.mean(), self.slope(losses[0], losses[1])
        keep = self.keep(loss, [p])
        rate = self.rate("lr_anchor")
        # A rejected slope counts as 0: until the next anchor there is only the correction, which is small.
        p = torch.where(keep, p, 0.0).to(own["anchor_slope"].dtype)
        own["anchor_step"].copy_(own["t"])
        own["anchor_slope"].copy_(p)
        own["back"].zero_()
        own["back"][0, 0].copy_(rate * p)
        self.commit({z: -rate * p})
        self.report["rate"] = rate
        return loss

    def _inner_step(self, closure: Closure) -> Tensor:
        z = self.direction()
        other = z if self.shared_z else self.direction(1)
        own, back = self.own, self._way_back() if not self.copies else {}
        z_0 = next(iter(back), None) or self.direction(0, own["anchor_step"])
        losses = self.two_points(closure, z)
        if not self.copies:
            losses += self.two_points(closure, other, at=back)
        elif self.in_place:
            losses += self._swapped(closure, other)
        else:
            losses += self.two_points(closure, other, source=self._anchor())
        plus, minus, bar_plus, bar_minus = self.agreed(losses).unbind(0)
        loss, p, p_bar = (plus + minus) / 2, self.slope(plus, minus), self.slope(bar_plus, bar_minus)
        p_0, rate = own["anchor_slope"], self.rate("lr_inner")
        keep = self.keep(loss, [p - p_bar, p_0] if self.shared_z else [p, p_bar, p_0])
        along = [p - p_bar] if self.shared_z else [p, -p_bar]
        steps = [torch.where(keep, -rate * x, 0.0) for x in along]
        step_0 = torch.where(keep, -rate * p_0, 0.0)
        self.commit({**dict(zip([z, other], steps, strict=False)), z_0: step_0})
        if not self.copies:
            self._remember(steps, step_0)
        self.report["rate"] = rate
        return loss

    def _authors_step(self, closure: Closure) -> Tensor:
        z, other, z_0 = self.direction(), self.direction(1), self.direction(0, self.own["anchor_step"])
        p_0, rate = self.own["anchor_slope"], self.rate("lr_inner")
        plus, minus = self.agreed(self.two_points(closure, z)).unbind(0)
        loss, p = (plus + minus) / 2, self.slope(plus, minus)
        first = -rate * p
        bar_plus, bar_minus = self.agreed(self.two_points(closure, other, at={z: first})).unbind(0)
        p_bar = self.slope(bar_plus, bar_minus)
        keep = self.keep(loss, [p, p_bar, p_0])
        steps = {z: first, other: rate * p_bar, z_0: -rate * p_0}
        self.commit({direction: torch.where(keep, step, 0.0) for direction, step in steps.items()})
        self.report["rate"] = rate
        return loss

    def _swapped(self, closure: Closure, z: Direction) -> list[Tensor]:
        """Losses around the anchor's copy, which changes places with the parameters meanwhile."""
        anchor = self._anchor()
        self.field.swap(anchor)
        moved, self._moved = self._moved, {}
        losses = self.two_points(closure, z)
        self.place({})
        self.field.swap(anchor)
        self._moved = moved
        return losses

    def _remember(self, steps: list[Tensor], step_0: Tensor) -> None:
        """Note what an inner step added, in the row of its number since the anchor. That is a tensor: an
        index that changes from step to step would give each of them a graph of its own.
        """
        own = self.own
        added = torch.zeros_like(own["back"][0])
        added[: len(steps)].copy_(torch.stack(steps))
        number = torch.arange(self.anchor_every, device=added.device) == own["t"] - own["anchor_step"]
        own["back"].copy_(torch.where(number[:, None], -added, own["back"]))
        own["back"][0, 0].sub_(step_0)

    def _way_back(self) -> dict[Direction, Tensor | float]:
        """From the parameters to the anchor, by what was added since."""
        own, done = self.own, self.count % self.anchor_every  # the anchor and done - 1 inner steps
        way: dict[Direction, Tensor | float] = {
            self.direction(0, own["anchor_step"]): own["back"][0, 0].clone()
        }
        for i in range(1, done):
            for column in range(1 if self.shared_z else 2):
                way[self.direction(column, own["anchor_step"] + i)] = own["back"][i, column].clone()
        return way

    def _anchor(self) -> list[Tensor]:
        """The anchor's copy, as the pieces lie."""
        return [piece.view(self.state[piece.owner]["anchor"]) for piece in self.field.pieces]
