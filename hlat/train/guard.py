"""Guards: which updates are skipped, decided on the device, so that no step waits for the host, and alike on
every rank; and what the run does about it, decided from the metrics once they are fetched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from hlat.errors import TrainingStopped, UserError
from hlat.registry import lookup, register

if TYPE_CHECKING:
    from hlat.recipe import Recipe

_EXACT = 1 << 24  # from here on adding 1 to an fp32 changes nothing
_NOISE = 1e-6  # the least standard deviation, beside the mean: what rounding makes of values that are equal
# How many times above the geometric mean of the first steps, and the least a step counts as there; loss and
# norm. A loss in nats is below 100 and a norm below 1e6 in a healthy run, however small batches and losses so
# far are; one in another unit is judged by its own first steps. A geometric mean hardly follows an outlier.
_ABSURD = ((10.0, 10.0), (1000.0, 1000.0))
GO_ON = (
    "leave the data out (data.skip), or start a new run with a lower optim.lr from a checkpoint of this one "
    "(init.from)"
)


@register("guard", "skip")
class SkipGuard:
    """Skip an update whose loss or gradient norm is not finite or far above the recent ones.

    "Far" is `sigma` standard deviations above the mean of the last `window` steps that were finite, once half
    a window of them has been seen. A standard deviation is at least 1e-6, and 1e-6 of the mean. Finite
    outliers enter the window too, so a lasting change of level is accepted after a while.

    Until then "far" is what no healthy run shows: a loss above 10 times the geometric mean of all so far,
    each taken as at least 10, or a norm above 1000 times that of the norms, each taken as at least 1000. The
    first finite step has nothing to be compared with.

    Args:
        window: steps remembered.
        sigma: standard deviations; 0 skips non-finite steps only.
        patience: stop the run after this many skips in a row.
    """

    _limit = "guard.patience"  # the key that says when to give up

    def __init__(
        self,
        *,
        window: Annotated[int, Field(ge=2, le=100_000)] = 128,
        sigma: Annotated[float, Field(ge=0)] = 6.0,
        patience: Annotated[int, Field(ge=1)] = 100,
    ) -> None:
        if not 2 <= window <= 100_000 or sigma < 0 or patience < 1:
            raise ValueError("guard needs a window of 2 to 100,000, sigma >= 0, patience >= 1")
        self.window, self.sigma, self.patience = window, sigma, patience
        self._state = {
            "history": torch.zeros(2, window),  # a ring; row 0: losses, row 1: gradient norms
            "seen": torch.zeros(()),  # finite steps, counted from `window` again at two windows: see `_seen`
            "skips_in_a_row": torch.zeros(()),
        }

    def to(self, device: torch.device) -> SkipGuard:
        """Move the state to the device that losses live on."""
        self._state = {name: tensor.to(device) for name, tensor in self._state.items()}
        return self

    def __call__(self, loss: Tensor, norm: Tensor) -> Tensor:
        """bool (): whether this step's update is to be applied. `loss` and `norm` are fp32 () and equal on
        all ranks.
        """
        now, seen = torch.stack([loss, norm]).detach().float(), self._seen()
        finite = torch.isfinite(now).all()
        keep = finite & ~self._is_spike(now, seen) if self.sigma else finite
        self._remember(now, seen, finite, keep)
        return keep

    def check(self, skips_in_a_row: float) -> None:
        """Raise TrainingStopped after `patience` skips in a row (a value fetched with the metrics)."""
        if skips_in_a_row >= self.patience:
            raise TrainingStopped(
                f"{self._bad(int(skips_in_a_row))}: loss or norm not finite or far above the recent ones",
                where=self._limit,
                fix=GO_ON,
            )

    def _bad(self, count: int) -> str:
        return "a step was skipped" if count == 1 else f"{count} steps in a row were skipped"

    def metrics(self) -> dict[str, Tensor]:
        """Scalars for metrics.jsonl."""
        return {"skips_in_a_row": self._state["skips_in_a_row"].clone()}  # the state changes in place

    def state(self) -> dict[str, Tensor]:
        """Tensors that belong in a checkpoint, by name; a load writes into them."""
        return self._state

    def _seen(self) -> Tensor:
        """int32 (): finite steps seen, less whole windows that leave at least one, so below two windows. The
        remainder is the slot of the ring that is written next.

        Versions that divided by this number let it grow, and what they saved continues here. One that has
        grown to 2^24 stood still there, and with it the slot: what its ring holds is of no use.
        """
        seen, window = self._state["seen"], self.window
        count = torch.where(seen < _EXACT, seen, 0.0).to(torch.int32)
        return torch.where(count < 2 * window, count, window + count % window)

    def _is_spike(self, now: Tensor, seen: Tensor) -> Tensor:
        history = self._state["history"]
        filled = torch.arange(self.window, device=history.device) < seen
        count = seen.clamp(min=1, max=self.window)
        mean = (history * filled / count).sum(1)
        away = (history - mean[:, None]) * filled
        # In units of the largest: a square must not overflow where the value does not.
        largest = away.abs().amax(1).clamp(min=1e-30)
        deviation = largest * ((away / largest[:, None]).square().sum(1) / count).sqrt()
        usual = mean + self.sigma * torch.maximum(deviation, _NOISE * mean.abs().clamp(min=1.0))
        logs = [row.clamp(min=least).log() * filled for row, (_, least) in zip(history, _ABSURD, strict=True)]
        first = [factor * (log.sum() / count).exp() for log, (factor, _) in zip(logs, _ABSURD, strict=True)]
        far = now > torch.where(seen >= self.window // 2, usual, torch.stack(first))
        return far.any() & (seen > 0)

    def _remember(self, now: Tensor, seen: Tensor, finite: Tensor, keep: Tensor) -> None:
        state, window = self._state, self.window
        slot = torch.arange(window, device=now.device) == seen % window
        state["history"].copy_(torch.where(slot & finite, now[:, None], state["history"]))
        # Where the count was too large, skips may have been for that alone: they do not count.
        skips = torch.where(state["seen"] < 2 * window, state["skips_in_a_row"], 0.0)
        state["skips_in_a_row"].copy_(torch.where(keep, 0.0, skips + 1))
        following = seen + finite
        state["seen"].copy_(torch.where(following < 2 * window, following, window))


@register("guard", "stop")
class StopGuard(SkipGuard):
    """Stop the run at the first step whose loss or gradient norm is not finite or far above the recent ones.
    Its update is not applied.

    Args:
        window, sigma: see `SkipGuard`.
    """

    _limit = "guard.name: stop"

    def __init__(
        self,
        *,
        window: Annotated[int, Field(ge=2, le=100_000)] = 128,
        sigma: Annotated[float, Field(ge=0)] = 6.0,
    ) -> None:
        super().__init__(window=window, sigma=sigma, patience=1)

    def _bad(self, count: int) -> str:
        return "a step is bad"


@register("guard", "rewind")
class RewindGuard(SkipGuard):
    """Go back to the checkpoint before a bad step and leave out its data; until then its update is skipped.

    A step whose loss or norm is finite but far above the recent ones is bad at once, as what led to it may be
    in the weights already; one that is not finite when `bad_steps` in a row are.

    Args:
        window, sigma: see `SkipGuard`.
        bad_steps: steps that are not finite in a row after which the run goes back.
        before, after: steps whose data is left out too, before the first bad one and after the last.
        rewinds: stop the run instead of going back more often than this ...
        within: ... for bad steps that lie within so many steps of the data.
    """

    def __init__(
        self,
        *,
        window: Annotated[int, Field(ge=2, le=100_000)] = 128,
        sigma: Annotated[float, Field(ge=0)] = 6.0,
        bad_steps: Annotated[int, Field(ge=1)] = 1,
        before: Annotated[int, Field(ge=0)] = 0,
        after: Annotated[int, Field(ge=0)] = 0,
        rewinds: Annotated[int, Field(ge=1)] = 3,
        within: Annotated[int, Field(ge=1)] = 1000,
    ) -> None:
        super().__init__(window=window, sigma=sigma)
        self.bad_steps, self.before, self.after = bad_steps, before, after
        self.rewinds, self.within = rewinds, within

    @staticmethod
    def refuse(recipe: Recipe) -> None:
        """Raise UserError where going back is not possible or of no use."""
        if recipe.checkpoint.format == "nxd":
            raise UserError(
                "NxD's files are marked as complete some steps late, so that a run cannot go back to them",
                where="guard.name: rewind",
                fix="write checkpoint.format=hlat, or guard.name=skip",
            )
        if getattr(lookup("method", recipe.method.name), "same_rows", False):
            raise UserError(
                f"method {recipe.method.name!r} reads the same rows in every step: none can be left out",
                where="guard.name: rewind",
                fix="write guard.name=skip or stop",
            )

    def check(self, skips_in_a_row: float) -> None:
        """Never stops a run; the loop does after `rewinds`."""

    def steps_back(self, row: Mapping[str, Any]) -> int:
        """How many steps, ending with that of a metrics row, are to be taken back; 0 for none."""
        in_a_row = int(row.get("skips_in_a_row") or 0)
        far_off = row.get("loss") is not None and row.get("grad_norm") is not None
        return in_a_row if far_off or in_a_row >= self.bad_steps else 0


@register("guard", "none")
class NoGuard:
    """Apply every update, whatever it holds."""

    def to(self, device: torch.device) -> NoGuard:
        """Nothing to move."""
        return self

    def __call__(self, loss: Tensor, norm: Tensor) -> Tensor:
        """bool () True."""
        return torch.ones((), dtype=torch.bool, device=loss.device)

    def check(self, skips_in_a_row: float) -> None:
        """Never stops a run."""

    def metrics(self) -> dict[str, Tensor]:
        """Nothing to report."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """No state."""
        return {}
