"""Mistakes of the kind a layout can hide, put into the code from outside, and bad values put into one rank.

Each fault is a function of `patches`, whose `set(owner, name, value)` replaces an attribute for one case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hlat.backend import collectives
from hlat.backend.groups import Group
from hlat.objective import causal_lm
from hlat.parallel.buckets import Bucket
from hlat.reduce.dense import Dense
from hlat.train.run import Run


def no_sum_over(name: str) -> Callable[[Any], None]:
    """Partial gradients stay unsummed over one kind of group."""

    def fault(patches: Any) -> None:
        former = Bucket.sum_over.fget
        patches.set(Bucket, "sum_over", property(lambda b: "" if former(b) == name else former(b)))

    return fault


def no_reduction(patches: Any) -> None:
    """Each replica keeps the gradient of its own rows."""

    def start(self: Dense, bucket: Bucket) -> None:
        own = bucket.grad[bucket.first : bucket.last].to(self.dtype, copy=True)
        self._started[id(bucket)] = own, Group().start_all_reduce(own)

    patches.set(Dense, "start", start)


def copies_in_norm(patches: Any) -> None:
    """The norm counts every copy of a replicated parameter."""
    patches.set(Bucket, "primary", property(lambda bucket: True))


def local_gather_backward(patches: Any) -> None:
    """Backward of the sequence gather returns this rank's part of its own gradient, unsummed."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.chunk(ctx.size, 1)[dist.get_rank() % ctx.size].contiguous(), None, None

    patches.set(collectives._Gather, "backward", staticmethod(backward))


def swapped_scatter_backward(patches: Any) -> None:
    """Backward of the sequence scatter puts the ranks' parts together in the wrong order."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        parts = collectives.gather_rows(grad, ctx.group, ctx.size).chunk(ctx.size, 1)
        return torch.cat(parts[::-1], 1), None, None

    patches.set(collectives._Scatter, "backward", staticmethod(backward))


def no_copy_backward(patches: Any) -> None:
    """The gradient that leaves a tensor-parallel region is this rank's partial sum."""
    patches.set(collectives._Copy, "backward", staticmethod(lambda ctx, grad: (grad, None)))


def last_micro_batch_only(patches: Any) -> None:
    """A micro-batch's gradient replaces the former one."""

    def accumulate(self: Bucket, spec: Any, parameter: Tensor) -> None:
        self._fresh.add(spec.path)
        former(self, spec, parameter)

    former = Bucket.accumulate
    patches.set(Bucket, "accumulate", accumulate)


def same_rows(patches: Any) -> None:
    """All replicas read the rows of the first."""
    from conftest import RaggedData

    def batches(
        self: Any, step: int, micro_batch: int, accumulate: int, rank: int = 0, world: int = 1
    ) -> Any:
        return former(self, step, micro_batch, accumulate, 0, world)

    former = RaggedData.batches
    patches.set(RaggedData, "batches", batches)


def own_targets(patches: Any) -> None:
    """Each replica divides by the number of its own targets."""

    def count_targets(self: Run, batches: Any) -> Tensor:
        return torch.stack([batch.targets_count() for batch in batches]).sum().clamp(min=1)

    patches.set(Run, "count_targets", count_targets)


def weights_not_gathered(patches: Any) -> None:
    """With ZeRO-1 a replica sees the update of its own share of the weights only."""
    patches.set(Run, "publish", lambda self: None)


def softmax_of_own_columns(patches: Any) -> None:
    """The cross-entropy knows only this rank's part of the vocabulary."""
    patches.set(causal_lm, "all_reduce", lambda x, group, op="sum": x)


def loss_of_every_rank(patches: Any) -> None:
    """Tensor-parallel ranks, which all know the loss, each add it to the sum."""

    def agree(self: Run, *args: Any) -> Any:
        place = self.backend.place
        self.backend.place = replace(place, tp=0)
        try:
            return former(self, *args)
        finally:
            self.backend.place = place

    former = Run.agree
    patches.set(Run, "agree", agree)


FAULTS: dict[str, Callable[[Any], None]] = {
    "no tp sum": no_sum_over("tp"),
    "no kv sum": no_sum_over("kv"),
    "no tie sum": no_sum_over("tie"),
    "no dp sum": no_reduction,
    "copies in norm": copies_in_norm,
    "local gather backward": local_gather_backward,
    "swapped scatter backward": swapped_scatter_backward,
    "no copy backward": no_copy_backward,
    "last micro-batch only": last_micro_batch_only,
    "same rows": same_rows,
    "own targets": own_targets,
    "weights not gathered": weights_not_gathered,
    "softmax of own columns": softmax_of_own_columns,
    "loss of every rank": loss_of_every_rank,
}


def plant(run: Run, where: str) -> None:
    """Let the second step of one rank produce a bad number: "loss" of the last replica, "gradient" of the
    last rank; "everywhere" for the single process it is compared with; "" for none.
    """
    layout, place = run.backend.layout, run.backend.place
    here = {
        "": False,
        "loss": place.dp == layout.dp - 1,
        "gradient": run.backend.rank == layout.world - 1,
        "everywhere": True,
    }[where]
    if not here:
        return
    if where == "gradient":
        parameter = next(run.model.parameters())
        parameter.register_hook(lambda grad: grad + float("inf") if run.step == 1 else grad)
        return
    forward_backward = run.engine.forward_backward

    def spoiled(batches: Any, tokens: Tensor) -> Tensor:
        loss = forward_backward(batches, tokens)
        return loss * float("nan") if run.step == 1 else loss

    run.engine.forward_backward = spoiled  # type: ignore[method-assign]
