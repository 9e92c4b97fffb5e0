"""What a run asks of a reducer. Only `reduce` is needed; the rest has defaults that do nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from hlat.parallel.buckets import Bucket


class Reducer:
    """Makes the gradient of the global batch from what each replica computed on its rows.

    A step calls `begin`, `start` for each bucket as its gradient becomes complete, `reduce`, `health`, and
    `commit` once it is known whether the update is applied.
    """

    def prepare(self, buckets: Sequence[Bucket]) -> None:
        """Called once, before a checkpoint is loaded: make what `state` holds."""

    def begin(self, step: int, change: float) -> str:
        """A global batch begins.

        Args:
            step: global batches taken before it, on the host.
            change: its learning rate over that of the one before.

        Returns:
            Why this step computes something else than the one before, so that a compiled graph cannot be the
            same; empty if it can.
        """
        return ""

    def start(self, bucket: Bucket) -> None:
        """A bucket's gradient is complete, backward perhaps still goes on: a collective may begin now."""

    def reduce(self, buckets: Sequence[Bucket]) -> list[Tensor]:
        """This rank's share of each reduced bucket, 1-D (all of it without ZeRO-1)."""
        raise NotImplementedError

    def health(self) -> Tensor | None:
        """0, or NaN when something that was not sent is not finite, fp32 (); None: all was sent."""
        return None

    def commit(self, keep: Tensor) -> None:
        """Whether the step's update is applied, bool (). What is remembered of a skipped step must not
        change, and nothing here may read `keep` on the host.
        """

    def state(self) -> dict[str, Tensor]:
        """Tensors that belong in a checkpoint, by name. Those under `local/` are this rank's own and mean
        something only in the layout they were saved in.
        """
        return {}

    def forget(self, reason: str) -> None:
        """A checkpoint of another layout was loaded, without what is under `local/`."""

    def metrics(self) -> dict[str, Tensor]:
        """Scalars for metrics.jsonl, on the device."""
        return {}

    def describe(self) -> list[str]:
        """Lines to print at the start of a run."""
        return []
