"""First-order training: gradients by backpropagation."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from hlat.registry import register

if TYPE_CHECKING:
    from hlat.data.batch import Batch
    from hlat.recipe import Recipe
    from hlat.train.run import Run


@register("method", "backprop")
class Backprop:
    """Loss, backward, reduce, clip, guard, update, publish."""

    def step(self, run: Run, batches: list[Batch], tokens: Tensor) -> dict[str, Tensor]:
        """One optimizer step on the micro-batches of a global batch.

        Args:
            run: the parts of the run.
            batches: this rank's micro-batches, on the device.
            tokens: int64 (): targets in the global batch.

        Returns:
            `loss` (global token mean before the update), `grad_norm` (before clipping), `skipped`, what
            guard and optimizer say of themselves; device scalars.
        """
        loss = run.engine.forward_backward(batches, tokens)
        shards = run.reduce()
        loss, norm, clip = run.agree(loss, shards)
        keep = run.guard(loss, norm)
        run.update(shards, keep, clip)
        return {"loss": loss, "grad_norm": norm, "skipped": ~keep, **run.metrics()}

    def queries(self, recipe: Recipe, steps: int) -> int:
        """Examples that went forward through the model in the first `steps` steps, on all ranks; what a
        backward pass costs is not in it.
        """
        return recipe.data.global_batch * steps
