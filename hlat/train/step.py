"""One training step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from hlat.train.run import Run


def train_step(run: Run) -> dict[str, Tensor]:
    """Take one global batch through the run's method. Returns device scalars; nothing here reads a value on
    the host.
    """
    batches = run.next_batches()
    tokens = run.count_targets(batches)
    run.set_learning_rate()
    metrics = run.method.step(run, batches, tokens)
    run.backend.mark_step()
    run.step += 1
    return metrics
