"""How the parts of a run are made and joined on a backend, and how masters become weights.

`Assembly` is that of plain PyTorch. A backend that does some of it otherwise overrides that
(`hlat.train.nxd.NxdAssembly`).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hlat.backend.precision import DTYPES, round_to
from hlat.model.decoder import Decoder
from hlat.optim.groups import Group
from hlat.parallel.buckets import Bucket, round_masters
from hlat.parallel.pipeline import StagePart, prune
from hlat.parallel.recompute import apply_recompute
from hlat.parallel.tensor import shard_model
from hlat.reduce.base import Reducer
from hlat.registry import lookup
from hlat.train.engine import Engine
from hlat.train.pipeline_engine import PipelineEngine
from hlat.train.update import needs_backward, optimizer_of
from hlat.train.weights import Initial, build_weights, flat_buckets

if TYPE_CHECKING:
    from hlat.backend.base import Backend
    from hlat.recipe import Recipe
    from hlat.train.frozen import Frozen
    from hlat.train.nxd_pipeline import NxdPipelineEngine
    from hlat.train.run import Run

_PUBLISH_SALT = 104_729  # keeps the rounding of weights apart from that of moments
_SUM_SALT = 1_299_709  # and from that of sums of gradients


class Assembly:
    """Makes one rank's parts.

    Args:
        recipe: what to make.
        backend: where.
        initial: the values training starts from.
    """

    def __init__(self, recipe: Recipe, backend: Backend, initial: Initial) -> None:
        self.recipe, self.backend, self.initial = recipe, backend, initial
        self.lay_out = flat_buckets

    @classmethod
    def check(cls, recipe: Recipe) -> None:
        """Raise UserError for what this backend cannot do, on any machine."""

    @classmethod
    def check_here(cls) -> None:
        """Raise UserError where this machine lacks what the backend needs."""

    def model(
        self, parts: Sequence[StagePart], trained: dict[str, Group]
    ) -> tuple[Decoder, list[Bucket], dict[str, Frozen]]:
        """This rank's layers with their weights, the buckets of what is trained, and what is frozen.

        Args:
            parts: its pipeline stages.
            trained: optimizer group of each trained parameter, by global name.
        """
        recipe, backend = self.recipe, self.backend
        with torch.device("meta"):
            model = Decoder(recipe.model)
        prune(model, parts)
        buckets, frozen = build_weights(recipe, model, trained, backend, self.lay_out, self.initial)
        backend.prepare_model(model)
        if not backend.shard_model(model, DTYPES[recipe.precision.compute]):
            shard_model(model, backend.groups.tp, backend.layout.sequence)
        self.choose_attention(model)
        apply_recompute(model, recipe.parallel.recompute, backend.checkpoint)
        return model, buckets, frozen

    def choose_attention(self, model: Decoder) -> None:
        """Put another attention kernel into the model's layers. Theirs choose for themselves."""

    def optimizer(self, buckets: Sequence[Bucket], method: Any) -> torch.optim.Optimizer:
        """What moves the masters: the recipe's optimizer, or what a method without gradients makes."""
        recipe, backend = self.recipe, self.backend
        if needs_backward(recipe):
            optimizer = optimizer_of(recipe, buckets, backend)
        else:
            optimizer = method.make_optimizer(recipe, buckets, backend.device)
        if hasattr(optimizer, "set_precision"):
            rounding = backend.rounding(recipe.precision.rounding)
            optimizer.set_precision(DTYPES[recipe.precision.states], rounding, recipe.run.seed)
        return optimizer

    def round_sums(self, buckets: Sequence[Bucket], updates: Tensor) -> None:
        """Let sums of gradients that are kept in bf16 be rounded as the recipe says.

        Args:
            buckets: whose sums.
            updates: int64 (), the updates done so far: each has random bits of its own.
        """
        rounding, dtype = self.backend.rounding(self.recipe.precision.rounding), DTYPES["bf16"]
        if rounding == "nearest" or self.recipe.precision.accumulate != "bf16":
            return
        layout, place = self.backend.layout, self.backend.place
        for bucket in buckets:
            # Ranks see other gradients of the same elements: their errors must not be the same. But where
            # each copy has the whole gradient (norms under tensor parallelism), nothing makes the copies
            # equal again: there they must be.
            alike = bucket.copies > 1 and not bucket.sum_over
            number = layout.rank(replace(place, tp=0) if alike else place)
            name = zlib.crc32(bucket.specs[0].name.encode())  # other ranks may have other buckets before it
            seed = self.recipe.run.seed + _SUM_SALT + 7919 * (name * self.backend.world + number)

            def round_sum(total: Tensor, offset: int, turn: int, seed: int = seed) -> Tensor:
                salted = seed + 15_485_863 * turn
                return round_to(total, dtype, rounding, seed=salted, step=updates, offset=offset)

            bucket.round_sum = round_sum

    def reducer(self) -> Reducer:
        """The recipe's reducer over the replicas."""
        section = self.recipe.reduce
        made: Reducer = lookup("reduce", section.name)(
            DTYPES[self.recipe.precision.reduce], self.backend.groups.dp, **section.options
        )
        return made

    def engine(
        self,
        model: Decoder,
        parts: Sequence[StagePart],
        objective: Any,
        buckets: list[Bucket],
        rows_per_example: int,
    ) -> Engine | PipelineEngine | NxdPipelineEngine:
        """What runs forward and backward over a step's micro-batches."""
        recipe, backend = self.recipe, self.backend
        if backend.layout.pp == 1:
            return Engine(model, objective, buckets)
        return PipelineEngine(
            model,
            parts,
            objective,
            buckets,
            schedule=recipe.parallel.schedule,
            micro_batches=recipe.accumulate(backend.world),
            group=backend.groups.pp,
            layout=backend.layout,
            rows=recipe.data.micro_batch * rows_per_example,
            seq_len=recipe.data.seq_len,
            dtype=DTYPES[recipe.precision.compute],
            device=backend.device,
        )

    def publish(self, run: Run) -> None:
        """Round the masters into the weights the model computes with, and fetch the other replicas' shares of
        them.
        """
        rounding = self.backend.rounding(self.recipe.precision.rounding)
        seed, group = self.recipe.run.seed + _PUBLISH_SALT, self.backend.groups.dp

        def rounder(bucket: Bucket, dtype: torch.dtype) -> Tensor:
            step, first = run.updates, bucket.first
            return round_to(bucket.master, dtype, rounding, seed=seed, step=step, offset=first)

        round_masters(run.buckets, None if rounding == "nearest" else rounder)
        for bucket in run.buckets:
            if bucket.apart:
                same = bucket.master.dtype == bucket.weights.dtype
                own = bucket.master.detach() if same else rounder(bucket, bucket.weights.dtype)
                if own.numel() < bucket.length:
                    whole = own.new_empty(bucket.length)
                    group.start_all_gather(whole, own).wait()
                    own = whole
                bucket.hand_out(own)
        if self.backend.layout.zero1 and not any(bucket.apart for bucket in run.buckets):
            waiting = []
            for bucket in run.buckets:
                own = bucket.weights[bucket.first : bucket.last].clone()
                waiting.append(group.start_all_gather(bucket.weights, own))
            for pending in waiting:
                pending.wait()
