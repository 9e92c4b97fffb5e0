"""Runs on the NxD backend: what differs from a native run, and no more.

With ZeRO-1 and the dense reducer NxD's own optimizer holds the shards; every parameter is then a bucket of
its own, cut by rows. Everything else (other reducers, no ZeRO-1, bf16 masters, stochastic rounding) works on
the shared flat buckets, whose collectives the backend's groups send through torch-xla.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hlat.backend.neuron.limits import check_recipe, flash_refused
from hlat.backend.precision import DTYPES
from hlat.optim.groups import Group
from hlat.parallel.buckets import Bucket, ParamSpec, set_parameter
from hlat.parallel.plan import Part
from hlat.reduce.base import Reducer
from hlat.registry import lookup
from hlat.train.assembly import Assembly
from hlat.train.nxd_pipeline import NxdPipelineEngine

if TYPE_CHECKING:
    from hlat.backend.base import Backend
    from hlat.backend.nxd.zero import Zero1
    from hlat.model.decoder import Decoder
    from hlat.parallel.pipeline import StagePart
    from hlat.recipe import Recipe
    from hlat.train.engine import Engine
    from hlat.train.pipeline_engine import PipelineEngine
    from hlat.train.run import Run
    from hlat.train.weights import Initial


class RowBucket(Bucket):
    """One parameter, cut by rows over the replicas. NxD's hooks fill `grad`; `master` has the parameter's own
    number of dimensions.
    """

    padded: int = 0

    @property
    def length(self) -> int:
        """Elements, rows of padding included."""
        return self.padded

    def begin(self, micro_batches: int = 1) -> None:
        """Start a step."""
        self.grad.zero_()

    def finish(self) -> None:
        """Nothing: what no backward pass reached is zero since `begin`."""


class RowSums(Reducer):
    """The reducer of `RowBucket`s: NxD's reduce-scatter."""

    def __init__(self, zero: Zero1) -> None:
        self.zero = zero

    def reduce(self, buckets: Sequence[Bucket]) -> list[Tensor]:
        """This rank's rows of each summed gradient."""
        self.zero.reduce()
        return [bucket.master.grad for bucket in buckets]  # type: ignore[misc]


class NxdAssembly(Assembly):
    """Makes one rank's parts on NxD. See `Assembly`."""

    def __init__(self, recipe: Recipe, backend: Backend, initial: Initial) -> None:
        super().__init__(recipe, backend, initial)
        self.rows = uses_zero1(recipe, backend)
        self.zero: Zero1 | None = None
        if self.rows:
            self.lay_out = row_buckets

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        """Raise UserError for what NxD cannot do."""
        check_recipe(recipe)

    @classmethod
    def check_here(cls) -> None:
        """Raise UserError where NxD is not installed."""
        from hlat.backend.nxd.start import process_group

        process_group()

    def choose_attention(self, model: Decoder) -> None:
        """Take NxD's flash kernel where the recipe allows it and it can be used."""
        choose_attention(self.recipe, model)

    def optimizer(self, buckets: Sequence[Bucket], method: Any) -> torch.optim.Optimizer:
        """See `Assembly`. NxD's own over the rows of each parameter, where that does what is asked for."""
        if not self.rows:
            return super().optimizer(buckets, method)
        self.zero = zero1(self.recipe, self.backend, buckets, self.initial)
        optimizer: Any = self.zero.optimizer
        optimizer.set_precision(DTYPES[self.recipe.precision.states], "nearest", self.recipe.run.seed)
        return optimizer  # type: ignore[no-any-return]

    def reducer(self) -> Reducer:
        """See `Assembly`. Called after `optimizer`."""
        return super().reducer() if self.zero is None else RowSums(self.zero)

    def engine(
        self,
        model: Decoder,
        parts: Sequence[StagePart],
        objective: Any,
        buckets: list[Bucket],
        rows_per_example: int,
    ) -> Engine | PipelineEngine | NxdPipelineEngine:
        """See `Assembly`. Pipelines run in NxD's schedule."""
        if self.backend.layout.pp == 1:
            return super().engine(model, parts, objective, buckets, rows_per_example)
        return NxdPipelineEngine(self.recipe, self.backend, model, parts, objective, buckets)

    def publish(self, run: Run) -> None:
        """See `Assembly`."""
        if self.zero is None:
            super().publish(run)
        else:
            self.zero.publish()


def uses_zero1(recipe: Recipe, backend: Backend) -> bool:
    """Whether NxD's ZeRO-1 keeps the masters: it is there, and does what the recipe asks for."""
    layout, precision = backend.layout, recipe.precision
    wide = precision.accumulate == precision.reduce == "fp32" and precision.rounding == "nearest"
    masters = precision.master == "fp32" or precision.compute == "fp32"
    kind = lookup("optim", recipe.optim.name)
    alone = getattr(kind, "needs", "") == "elementwise" and not getattr(kind, "own_scalars", ())
    alone &= "all_reduce" not in inspect.signature(kind).parameters  # each shard by itself
    return layout.zero1 and recipe.reduce.name == "dense" and wide and masters and alone


def choose_attention(recipe: Recipe, model: Decoder) -> str:
    """Take NxD's flash kernel for `model.attention` flash, and for auto where it can be used. Returns why
    not, or nothing.

    Raises:
        UserError: `flash` where the kernel cannot be used.
    """
    from hlat.backend.nxd.flash import flash_attention, unusable

    kind = recipe.model.attention
    if kind == "plain":
        return "model.attention is plain"
    reason = unusable(recipe.data.seq_len, recipe.data.document_mask)
    if reason and kind == "flash":
        raise flash_refused(reason)
    for block in model.layers.values():
        if not reason:
            block.attention.core.forward = flash_attention  # type: ignore[union-attr,assignment]
    return reason


def row_buckets(
    recipe: Recipe,
    backend: Backend,
    model: nn.Module,
    trained: dict[str, tuple[str, Part, Group]],
    initial: Initial,
) -> list[Bucket]:
    """Give every trained parameter its value, and a bucket. `zero1` completes them."""
    buckets: list[Bucket] = []
    for path, (name, part, group) in trained.items():
        value = initial(name, part).to(backend.device, DTYPES[recipe.precision.compute])
        parameter = nn.Parameter(value)
        set_parameter(model, path, parameter)
        spec = ParamSpec(name, part, 0, path)
        buckets.append(RowBucket(group, [spec], parameter.data, parameter.data, parameter))
    return buckets


def zero1(recipe: Recipe, backend: Backend, buckets: Sequence[Bucket], initial: Initial) -> Zero1:
    """NxD's optimizer over the parameters of `row_buckets`; the shards receive their exact fp32 values."""
    from hlat.backend.nxd.zero import Zero1

    replicas, own = backend.layout.dp, backend.place.dp
    groups = [
        {
            "params": [bucket.master for bucket in buckets if bucket.group == group],
            "lr": torch.zeros((), device=backend.device),
            "peak_lr": group.lr,
            "weight_decay": group.weight_decay,
        }
        for group in dict.fromkeys(bucket.group for bucket in buckets)
    ]
    zero = Zero1(groups, lookup("optim", recipe.optim.name), recipe.optim.options, replicas)
    shards = {id(parameter): shard for parameter, shard in zero.pairs()}
    for bucket in buckets:
        shard: Any = shards[id(bucket.master)]
        spec = bucket.specs[0]
        bucket.master, bucket.grad = shard, shard.main_grad
        bucket.first, bucket.padded = own * shard.numel(), replicas * shard.numel()  # type: ignore[attr-defined]
        rows = zero.rows(initial(spec.name, spec.part), own)
        if math.prod(rows.shape) != shard.numel():
            raise ValueError(f"NxD cut {spec.name} into {tuple(shard.shape)}, not {tuple(rows.shape)}")
        with torch.no_grad():
            shard.copy_(rows)
    return zero
