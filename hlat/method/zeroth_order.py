"""What zeroth-order methods have in common: a point in parameter space that losses are taken around.

Only the loss is asked for, at points moved along random directions (SPSA, Spall 1992; in place as in MeZO,
Malladi et al. 2023, arXiv 2305.17333, algorithm 1):

    p = (L(theta + mu z) - L(theta - mu z)) / (2 mu),    p z estimates the gradient

What brings the parameters to theta + mu z and theta - mu z is undone together with the update, so that each
point costs one pass over them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hlat.method.field import Change, Direction, Field, Piece
from hlat.method.noise import Grid, Kind

Closure = Callable[[], Any]
Restore = Literal["auto", "in_place", "copy"]


class ZerothOrder(torch.optim.Optimizer):
    """A method that moves parameters by losses alone. It never reads `.grad`, nor keeps a generator.

    Args:
        params: tensors, (name, tensor) pairs or groups of either. Without names a parameter's is its number;
            the noise depends on it. Tensors that require no gradient stay as they are, unless none does.
        defaults: group options, the rates among them: the same for all groups.
        mu: how far from the parameters losses are taken, in units of the parameters.
        seed: of the noise, below 2^64.
        noise: normal or rademacher.
        restore: in_place moves the parameters back by arithmetic, which leaves the rounding of three
            additions a step and needs no memory. copy keeps a copy and puts it back, bitwise. auto: copy for
            bf16 and fp16, where rounding would soon be larger than the updates, else in_place.

    `agree` turns this process's losses into those of the whole batch, and `guard` says, from loss and size of
    the estimate, whether the update is applied (bool ()); a run sets both.

    Raises:
        ValueError: an option out of range, groups with rates of their own, two parameters with one name.
    """

    needs_backward: ClassVar[bool] = False

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        mu: float,
        seed: int,
        noise: Kind,
        restore: Restore,
    ) -> None:
        if not mu > 0:
            raise ValueError(f"mu must be above 0, got {mu}")
        if noise not in ("normal", "rademacher"):
            raise ValueError(f"noise is normal or rademacher, not {noise!r}")
        if restore not in ("auto", "in_place", "copy"):
            raise ValueError(f"restore is auto, in_place or copy, not {restore!r}")
        super().__init__(params, {**defaults, "pieces": None})
        self.mu, self._rate_names = float(mu), tuple(defaults)
        pieces = self._make_pieces()
        self.field = Field(pieces, seed, noise, self.param_groups[0]["params"][0].device)
        self._apart = any(piece.live is not None for piece in pieces)
        narrow = any(base.dtype in (torch.bfloat16, torch.float16) for base in self.field.bases)
        self.kept: list[Tensor] | None = None
        if not self._apart and (restore == "copy" or (restore == "auto" and narrow)):
            self.kept = [torch.empty_like(base) for base in self.field.bases]
        self.agree: Callable[[Tensor], Tensor] = lambda losses: losses
        self.guard: Callable[[Tensor, Tensor], Tensor] | None = None
        self.count = 0
        self._moved: dict[Direction, Tensor | float] = {}  # where the parameters are meanwhile, in place
        self.own: dict[str, Tensor] = {"t": torch.zeros((), dtype=torch.int32, device=self.field.device)}
        self.scale = torch.ones((), dtype=self.field.dtype, device=self.field.device)
        self.report: dict[str, Tensor] = {}
        for name in self._rate_names:
            self.rate(name)

    def init_state(self) -> None:
        """Make the state that a checkpoint is loaded into."""

    def compile(self) -> None:
        """Fuse the arithmetic of the noise."""
        self.field.compile()

    def rate(self, name: str) -> Tensor:
        """A rate times `scale` (what a schedule makes of it), ()."""
        values = {float(group[name]) for group in self.param_groups}
        if len(values) > 1 or min(values) < 0:
            raise ValueError(f"{name} must be one number of at least 0 for all groups, not {sorted(values)}")
        return self.scale * values.pop()

    def state_dict(self) -> dict[str, Any]:
        """As in torch, and under "method" the step count and what else the method remembers."""
        own = {name: value.clone() for name, value in self.own.items()}
        groups = super().state_dict()
        for group in groups["param_groups"]:
            group.pop("pieces")
        return {**groups, "method": {"count": self.count, **own}}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`; every tensor keeps its place."""
        pieces = [group["pieces"] for group in self.param_groups]
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        for group, own in zip(self.param_groups, pieces, strict=True):
            group["pieces"] = own
        saved = dict(state_dict["method"])
        self.count = int(saved.pop("count"))
        for name, value in saved.items():
            self.own[name].copy_(value)

    def step(self, closure: Closure, anchor_closure: Closure | None = None) -> Tensor:  # type: ignore[override]
        """One update; returns the mean of the losses around the parameters, ()."""
        raise NotImplementedError

    def direction(self, draw: int = 0, step: Tensor | None = None) -> Direction:
        """A direction of this step, or of another one, int32 ()."""
        return self.field.direction(self.own["t"] if step is None else step, draw)

    def begin(self) -> None:
        """Start of a step."""
        if self.kept is not None:
            self.field.copy(self.field.bases, self.kept)

    def two_points(
        self,
        closure: Closure,
        z: Direction,
        *,
        at: Change | None = None,
        source: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Losses at a point + mu z and - mu z; the parameters are left at the second.

        Args:
            closure: the loss.
            z: a direction.
            at: the point, seen from the parameters; default: the parameters themselves.
            source: tensors that hold it instead; not where moves are made in place.
        """
        losses = []
        for sign in (1, -1):
            self.place({**(at or {}), z: sign * self.mu}, source)
            losses.append(self._loss(closure))
        return losses

    def place(self, wanted: Change, source: Sequence[Tensor] | None = None) -> None:
        """Bring what the model computes with to a point, seen from the parameters (or the source)."""
        if self.in_place:
            self.field.add(_difference(wanted, self._moved))
            self._moved = dict(wanted)
        else:
            self.field.write(wanted, source if source is not None else self.kept)

    def commit(self, update: Change) -> None:
        """Move the parameters, from where they were when the step began."""
        if self.in_place:
            self.field.add(_difference(update, self._moved))
            self._moved = {}
        elif self.kept is not None:
            self.field.write(update, self.kept)
        else:
            self.field.add(update)  # whoever keeps the masters also rounds them into the live tensors

    @property
    def in_place(self) -> bool:
        """Whether the parameters themselves are moved to where losses are taken."""
        return self.kept is None and not self._apart

    def agreed(self, losses: Sequence[Tensor]) -> Tensor:
        """Losses of the whole batch, (number), in at least fp32."""
        return self.agree(torch.stack(list(losses)))

    def slope(self, plus: Tensor, minus: Tensor) -> Tensor:
        """p, ()."""
        return (plus - minus) / (2 * self.mu)

    def keep(self, loss: Tensor, parts: Sequence[Tensor]) -> Tensor:
        """Whether the update is applied, bool (); also fills `report`.

        Args:
            loss: fp32 ().
            parts: the factors of the update's directions. Its norm is about the root of their squares' sum
                times that of the number of parameters; without the latter it is comparable to a gradient's
                norm, which is the root mean square of p.
        """
        norm = torch.stack(list(parts)).square().sum().sqrt()
        keep = torch.ones((), dtype=torch.bool, device=loss.device)
        if self.guard is not None:
            keep = self.guard(loss.float(), norm.float())
        self.report = {"loss": loss, "norm": norm, "keep": keep}
        return keep

    def end(self) -> None:
        """End of a step."""
        self.count += 1
        self.own["t"].add_(1)

    def _loss(self, closure: Closure) -> Tensor:
        loss = torch.as_tensor(closure(), device=self.field.device)
        if loss.numel() != 1:
            raise ValueError(f"the closure must return a scalar loss, not one of shape {list(loss.shape)}")
        return loss.detach().reshape(()).to(torch.promote_types(loss.dtype, torch.float32))

    def _make_pieces(self) -> list[Piece]:
        pieces: list[Piece] = []
        tensors = [p for group in self.param_groups for p in group["params"]]
        frozen = {id(p) for p in tensors if not p.requires_grad}
        number = 0
        for group in self.param_groups:
            names = group.get("param_names") or [str(number + i) for i in range(len(group["params"]))]
            number += len(names)
            if group["pieces"] is not None:
                pieces += group["pieces"]
                continue
            for name, p in zip(names, group["params"], strict=True):
                if len(frozen) == len(tensors) or id(p) not in frozen:
                    pieces.append(Piece(name, Grid(p.shape), p))
        return pieces


def _difference(wanted: Change, moved: Change) -> dict[Direction, Tensor | float]:
    """What has to be added so that a point moved by `moved` is moved by `wanted`."""
    out = dict(wanted)
    for direction, amount in moved.items():
        out[direction] = out[direction] - amount if direction in out else -amount
    return out
