"""A run: the parts that a recipe chose, put together."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hlat.backend.base import Backend
from hlat.backend.native import NativeBackend
from hlat.backend.precision import DTYPES, round_to
from hlat.errors import UserError
from hlat.model.decoder import Decoder
from hlat.model.init import init_tensor
from hlat.optim.base import create_state, guarded_step
from hlat.optim.groups import Group, Override, assign_groups
from hlat.optim.schedule import Schedule, make_schedule
from hlat.parallel.buckets import Bucket, BucketDtypes, build_buckets, publish, squared_norm
from hlat.parallel.recompute import apply_recompute
from hlat.recipe import Recipe
from hlat.registry import lookup
from hlat.train.engine import Engine

if TYPE_CHECKING:
    from hlat.data.batch import Batch

_PUBLISH_SALT = 104_729  # keeps the rounding of weights apart from that of moments


@dataclass
class Run:
    """Everything one training step touches. `step` counts global batches taken, `updates` (int64, ()) those
    not skipped.
    """

    recipe: Recipe
    backend: Backend
    model: nn.Module
    data: Any
    buckets: list[Bucket]
    engine: Engine
    objective: Any
    reducer: Any
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    guard: Any
    method: Any
    updates: Tensor
    step: int = 0

    def next_batches(self) -> list[Batch]:
        """This rank's micro-batches of the next global batch, on the device."""
        data = self.recipe.data
        rows = self.recipe.accumulate(self.backend.world)
        batches = self.data.batches(self.step, data.micro_batch, rows, self.backend.rank, self.backend.world)
        return [batch.to(self.backend.device) for batch in batches]

    def learning_rate(self, step: int | None = None) -> float:
        """Peak times schedule for the update after `step` updates (default: the next one)."""
        return float(self.recipe.optim.lr * self.schedule(self.step if step is None else step))

    def set_learning_rate(self) -> None:
        """Write the next update's rate into each group, as a tensor: a changed number never reaches a
        compiled graph.
        """
        factor = self.schedule(self.step)
        for group in self.optimizer.param_groups:
            group["lr"].fill_(group["peak_lr"] * factor)

    def clip(self, shards: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Global gradient norm and the factor that brings it down to `optim.clip_norm`; both fp32 ()."""
        norm = self.backend.all_reduce(torch.stack([squared_norm(shard) for shard in shards]).sum()).sqrt()
        if self.recipe.optim.clip_norm is None:
            return norm, torch.ones_like(norm)
        return norm, (self.recipe.optim.clip_norm / (norm + 1e-6)).clamp(max=1.0)

    def update(self, shards: Sequence[Tensor], keep: Tensor, clip: Tensor) -> None:
        """Step the optimizer on the master shards (nothing moves when `keep` is False) and publish the
        weights.
        """
        for bucket, shard in zip(self.buckets, shards, strict=True):
            bucket.master.grad = shard.to(bucket.master.dtype)
        guarded_step(self.optimizer, keep, clip)
        self.updates.add_(keep)
        for bucket in self.buckets:
            bucket.master.grad = None
        self.publish()

    def publish(self) -> None:
        """Round the masters into the weights the model computes with."""
        rounding = self.recipe.precision.rounding
        if rounding == "nearest":
            return publish(self.buckets)
        seed = self.recipe.run.seed + _PUBLISH_SALT

        def rounder(master: Tensor, dtype: torch.dtype) -> Tensor:
            return round_to(master, dtype, rounding, seed=seed, step=self.updates, offset=0)

        publish(self.buckets, rounder)

    def initialise(self) -> None:
        """Create the optimizer's state, which a checkpoint is loaded into."""
        create_state(self.optimizer)
        self.publish()


def build_run(recipe: Recipe, data: Any, backend: Backend | None = None, *, compiled: bool = False) -> Run:
    """Put the parts together; weights are initialised from the recipe's seed.

    Raises:
        UserError: a part of the recipe that cannot run here, with the reason.
    """
    refuse_unsupported(recipe)
    backend = backend or NativeBackend()
    with torch.device("meta"):
        model = Decoder(recipe.model)
    groups = trained_groups(recipe, model)
    buckets = build_buckets(
        model,
        groups,
        lambda name, shape: init_tensor(recipe.model, name, shape, recipe.run.seed),
        dtypes=_dtypes(recipe),
        device=backend.device,
    )
    _materialise_rest(recipe, model, backend.device)
    backend.prepare_model(model)
    apply_recompute(model, recipe.parallel.recompute)
    objective = lookup("objective", recipe.objective.name)(**recipe.objective.options)
    optimizer = _optimizer(recipe, buckets, backend.device)
    if compiled:
        _compile(model, objective, optimizer)
    run = Run(
        recipe=recipe,
        backend=backend,
        model=model,
        data=data,
        buckets=buckets,
        engine=Engine(model, objective, buckets),
        objective=objective,
        reducer=lookup("reduce", recipe.reduce.name)(
            DTYPES[recipe.precision.reduce], backend.all_reduce, **recipe.reduce.options
        ),
        optimizer=optimizer,
        schedule=_schedule(recipe),
        guard=lookup("guard", recipe.guard.name)(**recipe.guard.options).to(backend.device),
        method=lookup("method", recipe.method.name)(**recipe.method.options),
        updates=torch.zeros((), dtype=torch.int64, device=backend.device),
    )
    run.initialise()
    return run


def refuse_unsupported(recipe: Recipe) -> None:
    """Raise UserError for what this version cannot do, rather than ignore it."""
    if recipe.backend != "native":
        raise UserError(
            f"backend {recipe.backend!r} is not in this version of HLAT",
            where="backend",
            fix="write backend=native (and parallel.tp=1 parallel.pp=1) to train on this machine",
        )
    parallel = recipe.parallel
    for key, value in (("tp", parallel.tp), ("pp", parallel.pp), ("dp", parallel.dp)):
        if value not in (1, "auto"):
            raise UserError(
                f"{key}={value} needs more than one process, which this version of HLAT does not have",
                where=f"parallel.{key}",
                fix=f"write parallel.{key}=1",
            )
    if recipe.precision.master == "none" and recipe.precision.compute == "bf16":
        needs = getattr(lookup("optim", recipe.optim.name), "slots", None)
        if needs is None:
            raise UserError(
                f"optimizer {recipe.optim.name!r} cannot keep bf16 weights without fp32 masters",
                where="precision.master",
                fix="write precision.master=fp32, or take one of HLAT's own optimizers",
            )


def trained_groups(recipe: Recipe, model: nn.Module) -> dict[str, Group]:
    """Optimizer group of each parameter that is trained, by name."""
    shapes = [(name, tuple(p.shape)) for name, p in model.named_parameters()]
    patterns = recipe.train_only
    for i, pattern in enumerate(patterns):
        if not any(fnmatch.fnmatchcase(name, pattern) for name, _ in shapes):
            raise UserError(
                f"pattern {pattern!r} matches no parameter",
                where=f"train_only[{i}]",
                fix=f"names look like {shapes[0][0]!r} and {shapes[1][0]!r}; wildcards are * and ?",
            )
    trained = [
        s for s in shapes if not patterns or any(fnmatch.fnmatchcase(s[0], pattern) for pattern in patterns)
    ]
    optim = recipe.optim
    overrides = [Override(g.match, g.lr, g.weight_decay) for g in optim.groups]
    return assign_groups(
        trained, lr=optim.lr, weight_decay=optim.weight_decay, decay=optim.decay, overrides=overrides
    )


def _dtypes(recipe: Recipe) -> BucketDtypes:
    precision = recipe.precision
    master = None if precision.master == "none" or precision.compute == "fp32" else torch.float32
    return BucketDtypes(DTYPES[precision.compute], DTYPES[precision.accumulate], master)


def _materialise_rest(recipe: Recipe, model: nn.Module, device: torch.device) -> None:
    """Give parameters outside the buckets (frozen ones) their values, and buffers their device."""
    dtype = DTYPES[recipe.precision.compute]
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            value = init_tensor(recipe.model, name, parameter.shape, recipe.run.seed)
            owner, _, leaf = name.rpartition(".")
            frozen = nn.Parameter(value.to(device, dtype), requires_grad=False)
            setattr(model.get_submodule(owner), leaf, frozen)
    if isinstance(model, Decoder):
        model.tie()
        model.rope.to_empty(device=device)


def _optimizer(recipe: Recipe, buckets: Sequence[Bucket], device: torch.device) -> torch.optim.Optimizer:
    section = recipe.optim
    groups = [
        {
            "params": [bucket.master],
            "lr": torch.zeros((), device=device),
            "peak_lr": bucket.group.lr,
            "weight_decay": bucket.group.weight_decay,
        }
        for bucket in buckets
    ]
    optimizer: torch.optim.Optimizer = lookup("optim", section.name)(groups, **section.options)
    if hasattr(optimizer, "set_precision"):
        precision = recipe.precision
        optimizer.set_precision(DTYPES[precision.states], precision.rounding, recipe.run.seed)
    return optimizer


def _schedule(recipe: Recipe) -> Schedule:
    section = recipe.schedule
    return make_schedule(
        section.name,
        warmup_steps=section.warmup_steps,
        horizon_steps=section.horizon_steps or recipe.run.steps,
        floor=section.floor,
        **section.options,
    )


def _compile(model: nn.Module, objective: Any, optimizer: torch.optim.Optimizer) -> None:
    """Compile block by block (all blocks share one graph), the loss kernel and the optimizer's update."""
    for block in model.layers.values():  # type: ignore[operator,union-attr]
        block.compile(dynamic=False)
    if model.norm is not None:
        model.norm.compile(dynamic=False)  # type: ignore[operator,union-attr]
    for part in (objective, optimizer):
        if hasattr(part, "compile"):
            part.compile()
